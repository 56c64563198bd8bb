"""The cost of a solve with adaptive steps, on either path."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import pytest
from timing import interleaved_minima

from diffrax_sde_adjoint import BrownianInterval


_f32 = jnp.float32
_resolution = 1e-5
_num_keys = 20


def _brownian_interval(struct, key):
    # The longer steps are about as long as a cell.
    return BrownianInterval(
        _f32(0), _f32(1), struct, key, dt=_f32(1024 * _resolution), levels=10
    )


def _virtual_brownian_tree(struct, key):
    return diffrax.VirtualBrownianTree(_f32(0), _f32(1), _resolution, struct, key)


def _diffusion(t, y, args):
    return lx.DiagonalLinearOperator(0.5 + 0.3 * jnp.cos(y))


def _solver(make_path, dim):
    """From a key to the number of steps that were tried, and the final value."""

    @jax.jit
    def solve(key):
        path = make_path(jax.ShapeDtypeStruct((dim,), jnp.float32), key)
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: -jnp.sin(y)),
                diffrax.ControlTerm(
                    lambda t, y, args: lx.DiagonalLinearOperator(
                        0.5 + 0.3 * jnp.cos(y)
                    ),
                    path,
                ),
            ),
            diffrax.Heun(),
            _f32(0),
            _f32(1),
            _f32(0.01),
            jnp.ones(dim, jnp.float32),
            stepsize_controller=diffrax.PIDController(
                rtol=1e-3, atol=1e-3, pcoeff=0.1, icoeff=0.3
            ),
            max_steps=10_000,
        )
        return sol.stats["num_steps"], sol.ys

    return solve


@pytest.mark.parametrize("dim", (1, 64, 1024))
def test_adaptive_solve(dim, record_row):
    """`PIDController` and Heun. As paths differ, so do the numbers of steps: what is
    compared is the time of a step that is tried.
    """
    keys = jr.split(jr.key(0), _num_keys)
    solvers = {
        "BrownianInterval": _solver(_brownian_interval, dim),
        "VirtualBrownianTree": _solver(_virtual_brownian_tree, dim),
    }
    num_steps = {k: sum(int(f(key)[0]) for key in keys) for k, f in solvers.items()}
    functions = {k: lambda f=f: [f(key) for key in keys] for k, f in solvers.items()}
    times = interleaved_minima(functions)
    microseconds = {k: 1e6 * times[k] / num_steps[k] for k in times}
    ratio = microseconds["VirtualBrownianTree"] / microseconds["BrownianInterval"]
    record_row(
        "Adaptive solve, float32",
        {
            "dimension": str(dim),
            **{f"{k}, steps": f"{n / _num_keys:.1f}" for k, n in num_steps.items()},
            **{f"{k}, µs a step": f"{t:.1f}" for k, t in microseconds.items()},
            "VirtualBrownianTree / BrownianInterval": f"{ratio:.1f}",
        },
    )
    assert ratio >= 3
