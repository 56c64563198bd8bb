"""SDEs whose solution, and so its gradient, is known for each path.

`gbm`, `arctan` and `damped` are the three test problems of Li et al. 2020 (in ten
dimensions, each with parameters and noise of its own). `scalar` and `general` are
geometric Brownian motions in ten dimensions with one noise and with four; columns of
their diffusion commute.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from helpers import make_terms, struct
from jaxtyping import Array, Float, PRNGKeyArray

from diffrax_sde_adjoint import BrownianInterval, ito_to_stratonovich


dim = 10


class Params(NamedTuple):
    y0: Float[Array, "10"]
    a: Float[Array, "10"]
    b: Float[Array, "..."]


class Problem(NamedTuple):
    """An Itô SDE, and its solution at time one as a function of that of the noise."""

    noise_shape: tuple[int, ...]
    drift: Callable[[Any, Any, Params], Float[Array, "10"]]
    diffusion: Callable[[Any, Any, Params], Any]
    exact: Callable[[Params, Array], Float[Array, "10"]]
    is_additive: bool = False

    def params(self, dtype: type = jnp.float64) -> Params:
        keys = jr.split(jr.key(5), 3)
        uniform = lambda key, shape: jr.uniform(key, shape, dtype, 0.1, 0.6)
        b_shape = (dim, 4) if self.noise_shape == (4,) else (dim,)
        return Params(
            uniform(keys[0], (dim,)),
            uniform(keys[1], (dim,)),
            uniform(keys[2], b_shape),
        )

    def path(
        self,
        key: PRNGKeyArray,
        num_steps: int,
        levy_area: type = diffrax.BrownianIncrement,
        dtype: type = jnp.float64,
    ) -> BrownianInterval:
        t0, t1, dt = (jnp.array(x, dtype) for x in (0, 1, 1 / num_steps))
        shape = struct(self.noise_shape, dtype)
        return BrownianInterval(t0, t1, shape, key, dt=dt, levy_area=levy_area)

    def terms(
        self, path: diffrax.AbstractPath, solver: diffrax.AbstractSolver
    ) -> diffrax.MultiTerm:
        """Of which the solver finds the solution, be it for Itô SDEs or not."""
        terms = make_terms(self.drift, self.diffusion, path)
        if isinstance(solver, diffrax.AbstractItoSolver):
            return terms
        return ito_to_stratonovich(terms)


def _diagonal(fn):
    return lambda t, y, p: lx.DiagonalLinearOperator(fn(t, y, p))


def _exact_damped(p, w):
    return (p.y0 + p.a * (1 + p.b * w)) / jnp.sqrt(2.0).astype(p.y0.dtype)


problems = {
    "gbm": Problem(
        (dim,),
        lambda t, y, p: p.a * y,
        _diagonal(lambda t, y, p: p.b * y),
        lambda p, w: p.y0 * jnp.exp(p.a - p.b**2 / 2 + p.b * w),
    ),
    "arctan": Problem(
        (dim,),
        lambda t, y, p: -(p.a**2) * jnp.sin(y) * jnp.cos(y) ** 3,
        _diagonal(lambda t, y, p: p.a * jnp.cos(y) ** 2),
        lambda p, w: jnp.arctan(p.a * w + jnp.tan(p.y0)),
    ),
    "damped": Problem(
        (dim,),
        lambda t, y, p: p.a / jnp.sqrt(1 + t) - y / (2 * (1 + t)),
        _diagonal(lambda t, y, p: p.a * p.b / jnp.sqrt(1 + t)),
        _exact_damped,
        is_additive=True,
    ),
    "scalar": Problem(
        (),
        lambda t, y, p: p.a * y,
        lambda t, y, p: p.b * y,
        lambda p, w: p.y0 * jnp.exp(p.a - p.b**2 / 2 + p.b * w),
    ),
    "general": Problem(
        (4,),
        lambda t, y, p: p.a * y,
        lambda t, y, p: p.b * y[:, None],
        lambda p, w: p.y0 * jnp.exp(p.a - jnp.sum(p.b**2, axis=1) / 2 + p.b @ w),
    ),
}


def gradient_errors(
    problem: Problem,
    solver: diffrax.AbstractSolver,
    adjoint: diffrax.AbstractAdjoint,
    keys: PRNGKeyArray,
    all_num_steps: Float[Array, " sizes"],
    levy_area: type = diffrax.BrownianIncrement,
    dtype: type = jnp.float64,
) -> Float[Array, " sizes"]:
    """The mean error of the gradient of the sum of squares at time one, relative to its
    mean size, for solves with so many steps.
    """
    params = problem.params(dtype)

    def errors(key):
        finest = 512
        path = problem.path(key, finest, levy_area, dtype)
        w = path.evaluate(path.t0, path.t1)

        def exact(params):
            return jnp.sum(problem.exact(params, w) ** 2)

        def solve(params, num_steps):
            sol = diffrax.diffeqsolve(
                problem.terms(path, solver),
                solver,
                path.t0,
                path.t1,
                (1 / num_steps).astype(dtype),
                params.y0,
                params,
                adjoint=adjoint,
                max_steps=finest,
            )
            assert sol.ys is not None
            return jnp.sum(sol.ys[0] ** 2)

        flat = lambda grads: jnp.concatenate([x.ravel() for x in grads])
        expected = flat(jax.grad(exact)(params))
        size = lambda x: jnp.sqrt(jnp.sum(x**2))
        error = lambda n: size(flat(jax.grad(solve)(params, n)) - expected)
        return jax.lax.map(error, all_num_steps), size(expected)

    error, size = jax.jit(jax.vmap(errors))(keys)
    return jnp.mean(error, axis=0) / jnp.mean(size)
