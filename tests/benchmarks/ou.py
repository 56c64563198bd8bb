"""The Ornstein-Uhlenbeck process of the benchmarks, as a diffrax program.

    dy = theta (mu - y) dt + sigma dW

with the gradient of a loss of its final value, with respect to the parameters and `y0`.
Everything has the dtype of `y0`, and what is differentiated is always `(params, y0)`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
from hand_written import Loss, Model
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


class Params(NamedTuple):
    theta: Float[Array, ""]
    mu: Float[Array, ""]
    sigma: Float[Array, ""]


Y: TypeAlias = Float[Array, "*dim"]
MakePath: TypeAlias = Callable[
    [int, jax.ShapeDtypeStruct, PRNGKeyArray, type[diffrax.AbstractBrownianIncrement]],
    diffrax.AbstractBrownianPath,
]

# The time interval is [0, 1].


def number(x: float, dtype: jax.typing.DTypeLike) -> float | Float[Array, ""]:
    """A time. As Python's numbers have JAX's default dtype, one of another is an array,
    which is not known when a program is traced.
    """
    return float(x) if dtype == jnp.result_type(float) else jnp.asarray(x, dtype)


def initial(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> tuple[Params, Y]:
    params = Params(*(jnp.asarray(x, dtype) for x in (0.7, 0.3, 0.5)))
    return params, jnp.ones(shape, dtype)


def drift(t: ArrayLike, y: Y, params: Params) -> Y:
    return params.theta * (params.mu - y)


def diffusion(t: ArrayLike, y: Y, params: Params) -> Y:
    return jnp.broadcast_to(params.sigma, y.shape)


def loss_of_final(y1: Y) -> Float[Array, ""]:
    return jnp.sum(y1**2)


model = Model(drift, diffusion, loss_of_final)


def diffrax_loss(
    num_steps: int,
    make_path: MakePath,
    solver: diffrax.AbstractSolver,
    adjoint: diffrax.AbstractAdjoint,
) -> Loss:
    def diffusion_operator(t, y, params):
        out = diffusion(t, y, params)
        return out if y.ndim == 0 else lx.DiagonalLinearOperator(out)

    def loss(params, y0, key):
        struct = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
        is_srk = isinstance(solver, diffrax.AbstractSRK)
        levy_area = diffrax.SpaceTimeLevyArea if is_srk else diffrax.BrownianIncrement
        path = make_path(num_steps, struct, key, levy_area)
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(drift),
                diffrax.ControlTerm(diffusion_operator, path),
            ),
            solver,
            t0=number(0, y0.dtype),
            t1=number(1, y0.dtype),
            dt0=number(1 / num_steps, y0.dtype),
            y0=y0,
            args=params,
            saveat=diffrax.SaveAt(t1=True),
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return loss_of_final(sol.ys[-1])

    return loss


def brownian_interval(
    num_steps: int,
    struct: jax.ShapeDtypeStruct,
    key: PRNGKeyArray,
    levy_area: type[diffrax.AbstractBrownianIncrement],
) -> BrownianInterval:
    zero, one, dt = (number(x, struct.dtype) for x in (0, 1, 1 / num_steps))
    return BrownianInterval(zero, one, struct, key, dt=dt, levy_area=levy_area)


def virtual_brownian_tree(
    num_steps: int,
    struct: jax.ShapeDtypeStruct,
    key: PRNGKeyArray,
    levy_area: type[diffrax.AbstractBrownianIncrement],
) -> diffrax.VirtualBrownianTree:
    zero, one = (number(x, struct.dtype) for x in (0, 1))
    tol = 1 / (2 * num_steps)
    return diffrax.VirtualBrownianTree(zero, one, tol, struct, key, levy_area)


def ours(
    num_steps: int,
    solver: diffrax.AbstractSolver | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Loss:
    """By default with `ReversibleHeun` and `StochasticAdjoint`."""
    solver = ReversibleHeun() if solver is None else solver
    adjoint = StochasticAdjoint() if adjoint is None else adjoint
    return diffrax_loss(num_steps, brownian_interval, solver, adjoint)


def checkpointed(
    num_steps: int,
    make_path: MakePath = brownian_interval,
    solver: diffrax.AbstractSolver | None = None,
) -> Loss:
    """diffrax's default adjoint. Its default path is a `virtual_brownian_tree`."""
    solver = diffrax.ReversibleHeun() if solver is None else solver
    return diffrax_loss(
        num_steps, make_path, solver, diffrax.RecursiveCheckpointAdjoint()
    )
