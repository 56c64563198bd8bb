"""The same numbers as torchsde, when both are given the same Brownian increments.

torchsde implements the reversible Heun method, and the backward pass that undoes it, by
hand-derived cotangents. So solutions and gradients have to agree to rounding.

Every model is written once, over the functions that `jax.numpy` and `torch` share, and
for arrays with or without a leading batch axis. (JAX solves one trajectory, and is
`vmap`ped; torchsde solves a batch.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from jaxtyping import Float

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


pytestmark = pytest.mark.parity

_batch, _dim, _noise_dim = 4, 3, 2
_num_steps = 50
# A power of two, so that no library's times are rounded and each makes the same steps.
_dt = 1 / 32
_t1 = _num_steps * _dt
_edges = np.arange(_num_steps + 1) * _dt
_ts = _edges[[0, 1, 7, 8, 30, _num_steps]]
_rtol = 1e-10

_Params = dict[str, Float[np.ndarray, "..."]]


def _drift(xp: Any, t, y, params):
    return xp.tanh(y @ params["drift_weight"] + params["drift_bias"] + t)


class _Noise(NamedTuple):
    """A noise type: the shape of the Brownian motion of one trajectory, the shape of a
    parameter, and the diffusion.
    """

    path_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    diffusion: Callable[..., Any]


_noises = {
    "diagonal": _Noise(
        (_dim,), (_dim,), lambda xp, t, y, params: xp.sin(params["weight"] * y + t)
    ),
    "scalar": _Noise(
        (), (_dim,), lambda xp, t, y, params: xp.sin(params["weight"] * y + t)
    ),
    "additive": _Noise(
        (_noise_dim,),
        (_dim, _noise_dim),
        lambda xp, t, y, params: params["weight"] * (1 + t),
    ),
    "general": _Noise(
        (_noise_dim,),
        (_dim, _noise_dim),
        lambda xp, t, y, params: xp.sin(params["weight"] * y[..., None] + t),
    ),
}


class _Problem(NamedTuple):
    """The loss is the sum over the saved states of `loss_weights * ys**2`."""

    noise_type: str
    params: _Params
    y0: Float[np.ndarray, "batch dim"]
    loss_weights: Float[np.ndarray, "saves batch dim"]
    keys: jax.Array


class _Results(NamedTuple):
    ys: Float[np.ndarray, "saves batch dim"]
    grad_y0: Float[np.ndarray, "batch dim"]
    grad_params: _Params


def _make_problem(noise_type: str) -> _Problem:
    rng = np.random.default_rng(0)
    params = {
        "drift_weight": rng.normal(size=(_dim, _dim)),
        "drift_bias": rng.normal(size=(_dim,)),
        "weight": rng.normal(size=_noises[noise_type].weight_shape),
    }
    y0 = rng.normal(size=(_batch, _dim))
    loss_weights = rng.normal(size=(len(_ts), _batch, _dim))
    return _Problem(noise_type, params, y0, loss_weights, jr.split(jr.key(0), _batch))


def _make_path(noise_type: str, key) -> BrownianInterval:
    shape = jax.ShapeDtypeStruct(_noises[noise_type].path_shape, jnp.float64)
    return BrownianInterval(0.0, _t1, shape, key, dt=_dt)


def _solve_ours(problem: _Problem) -> _Results:
    noise_type = problem.noise_type

    def drift(t, y, params):
        return _drift(jnp, t, y, params)

    def diffusion(t, y, params):
        out = _noises[noise_type].diffusion(jnp, t, y, params)
        return lx.DiagonalLinearOperator(out) if noise_type == "diagonal" else out

    def solve(key, y0, params):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift),
            diffrax.ControlTerm(diffusion, _make_path(noise_type, key)),
        )
        sol = diffrax.diffeqsolve(
            terms,
            ReversibleHeun(),
            t0=0.0,
            t1=_t1,
            dt0=_dt,
            y0=y0,
            args=params,
            saveat=diffrax.SaveAt(ts=jnp.asarray(_ts)),
            adjoint=StochasticAdjoint(),
            max_steps=_num_steps,
        )
        return sol.ys

    def loss(y0, params):
        ys = jax.vmap(solve, in_axes=(0, 0, None), out_axes=1)(problem.keys, y0, params)
        return jnp.sum(problem.loss_weights * ys**2), ys

    loss_and_grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    y0, params = jtu.tree_map(jnp.asarray, (problem.y0, problem.params))
    (_, ys), grads = loss_and_grads(y0, params)
    return _Results(*jtu.tree_map(np.asarray, (ys, *grads)))


def _increments(problem: _Problem) -> Float[np.ndarray, "steps batch noise"]:
    """Our path's increments over the steps, in the shape that torchsde has them."""

    def of_one_path(key):
        path = _make_path(problem.noise_type, key)
        return jax.vmap(path.evaluate)(_edges[:-1], _edges[1:])

    increments = jax.vmap(of_one_path, out_axes=1)(problem.keys)
    return np.asarray(increments).reshape(_num_steps, _batch, -1)


def _solve_torchsde(problem: _Problem) -> _Results:
    # Not at the top, as this module is collected in every run of the tests, but this is
    # run in few of them, and torch takes long to import.
    import torch
    import torchsde

    table = torch.tensor(_increments(problem))

    class TabulatedPath(torchsde.BaseBrownian):
        """Answers the steps of a solve, which are all that is asked by the forward
        solve, and by the adjoint (whose queries torchsde turns round itself).
        """

        @property
        def dtype(self):
            return table.dtype

        @property
        def device(self):
            return table.device

        @property
        def shape(self):
            return table.shape[1:]

        @property
        def levy_area_approximation(self):
            return "none"

        def __call__(self, ta, tb=None, return_U=False, return_A=False):
            assert tb is not None and not return_U and not return_A
            assert tb - ta == _dt
            assert ta % _dt == 0
            return table[int(ta / _dt)]

        def __repr__(self):
            return "TabulatedPath()"

    class SDE(torch.nn.Module):
        sde_type = "stratonovich"
        noise_type = problem.noise_type

        def __init__(self):
            super().__init__()
            self.params = torch.nn.ParameterDict(
                {
                    k: torch.nn.Parameter(torch.tensor(v))
                    for k, v in problem.params.items()
                }
            )

        def f(self, t, y):
            return _drift(torch, t, y, self.params)

        def g(self, t, y):
            out = _noises[self.noise_type].diffusion(torch, t, y, self.params)
            if self.noise_type == "scalar":
                return out[..., None]
            if self.noise_type == "additive":
                return out.expand(_batch, _dim, _noise_dim)
            return out

    sde = SDE()
    y0 = torch.tensor(problem.y0, requires_grad=True)
    ys = torchsde.sdeint_adjoint(
        sde,
        y0,
        torch.tensor(_ts),
        bm=TabulatedPath(),
        dt=_dt,
        method="reversible_heun",
        adjoint_method="adjoint_reversible_heun",
    )
    assert isinstance(ys, torch.Tensor)
    (torch.tensor(problem.loss_weights) * ys**2).sum().backward()

    def to_numpy(x: torch.Tensor | None):
        assert x is not None
        return x.detach().numpy()

    grad_params = {k: to_numpy(v.grad) for k, v in sde.params.items()}
    return _Results(to_numpy(ys), to_numpy(y0.grad), grad_params)


@pytest.mark.parametrize("noise_type", _noises)
def test_equals_torchsde(noise_type):
    problem = _make_problem(noise_type)
    ours = _solve_ours(problem)
    theirs = _solve_torchsde(problem)

    def check(path, a, b):
        assert a.shape == b.shape
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= _rtol, f"{jtu.keystr(path)}: relative error {error:.1e}"

    jtu.tree_map_with_path(check, ours, theirs)
