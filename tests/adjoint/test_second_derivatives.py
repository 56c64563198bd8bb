"""Derivatives of gradients by `StochasticAdjoint`."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers import (
    SmoothPath,
    keys,
    make_system,
    make_terms,
    noise_shapes,
    relative_error,
    struct,
)
from test_adjoint import scalar_args, scalar_loss

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)


def make_loss(solver, saveat, **kwargs):
    """The loss of a batch, as a function of a vector: what is in `args`, and `y0`."""
    drift, diffusion, y0, _ = make_system("general")
    shape = struct(noise_shapes["general"], jnp.float64)

    def loss(adjoint, x):
        args = dict(rate=x[0], level=x[1])

        def solve(key):
            path = (
                BrownianInterval(
                    0.0, 1.0, shape, key, dt=0.1, levy_area=diffrax.SpaceTimeLevyArea
                )
                if isinstance(solver, diffrax.SlowRK)
                else SmoothPath(shape, key)
            )
            ys = diffrax.diffeqsolve(
                make_terms(drift, diffusion, path),
                solver,
                0.0,
                1.0,
                0.1,
                y0 * x[2],
                args,
                saveat=saveat,
                adjoint=adjoint,
                max_steps=16,
                **kwargs,
            ).ys
            # As many as there may be steps.
            return jnp.where(jnp.isfinite(ys), ys, 0)

        return jnp.sum(jnp.sin(jax.vmap(solve)(keys(2))))

    return loss, jnp.array([0.3, 0.5, 1.2])


@pytest.mark.parametrize(
    "solver,checkpoint_every",
    (
        (ReversibleHeun(), None),
        pytest.param(ReversibleHeun(), 3, marks=pytest.mark.slow),
        pytest.param(diffrax.Heun(), None, marks=pytest.mark.slow),
        pytest.param(diffrax.SlowRK(), None, marks=pytest.mark.slow),
    ),
)
def test_hessian(solver, checkpoint_every):
    saveat = diffrax.SaveAt(
        t0=True, ts=[0.2, 0.33], steps=True, fn=lambda t, y, _: y**2
    )
    loss, x = make_loss(solver, saveat)
    adjoint = StochasticAdjoint(checkpoint_every=checkpoint_every)
    actual = jax.jit(jax.hessian(lambda x: loss(adjoint, x)))(x)
    forward = lambda x: loss(diffrax.ForwardMode(), x)
    expected = jax.jit(jax.jacfwd(jax.jacfwd(forward)))(x)
    assert relative_error(actual, expected) < 1e-10
    np.testing.assert_allclose(actual, actual.T, rtol=1e-10)


@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(diffrax.Kvaerno3(), marks=pytest.mark.slow),
        pytest.param(diffrax.Heun(), marks=pytest.mark.slow),
    ),
)
def test_hessian_with_times(solver):
    """Among them that of `t1`, for an adaptive solve."""

    def loss(adjoint, x):
        return jnp.sin(
            diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: jnp.sin(args * y) + t * y),
                solver,
                0.0,
                x[2],
                0.1,
                x[0],
                x[1],
                stepsize_controller=pid,
                adjoint=adjoint,
                max_steps=32,
            ).ys[0]
        )

    x = jnp.array([1.3, 0.3, 1.0])
    actual = jax.jit(jax.hessian(lambda x: loss(StochasticAdjoint(), x)))(x)
    forward = lambda x: loss(diffrax.ForwardMode(), x)
    expected = jax.jit(jax.jacfwd(jax.jacfwd(forward)))(x)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("jit", (lambda f: f, jax.jit))
def test_mixed_derivative(jit):
    """The outer derivative is one that the inner one knows nothing of."""

    def mixed(adjoint, inner):
        loss = jit(
            lambda y0, rate: scalar_loss(adjoint, y0, scalar_args | {"rate": rate})
        )
        return jax.jacfwd(lambda rate: inner(loss)(0.3, rate))(1.3)

    np.testing.assert_allclose(
        mixed(StochasticAdjoint(), jax.grad),
        mixed(diffrax.ForwardMode(), jax.jacfwd),
        rtol=1e-11,
    )


def test_derivatives_that_do_not_exist():
    loss = lambda y0, rate=1.3: scalar_loss(
        StochasticAdjoint(), y0, scalar_args | {"rate": rate}
    )
    with pytest.raises(RuntimeError, match="DirectAdjoint"):
        jax.grad(jax.grad(loss))(0.3)
    with pytest.raises(RuntimeError, match="DirectAdjoint"):
        jax.jacrev(lambda rate: jax.jit(jax.grad(loss))(0.3, rate))(1.3)
    with pytest.raises(ValueError, match="does not support forward mode"):
        jax.jvp(loss, (0.3,), (1.0,))


@pytest.mark.slow
def test_inner_derivative_of_an_event():
    """It does not pass through the steps, but the outer one does."""

    def loss(adjoint, y0, level):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(y) + t),
            diffrax.Heun(),
            0.0,
            1.0,
            0.11,
            y0,
            adjoint=adjoint,
            max_steps=32,
            event=diffrax.Event(
                lambda t, y, args, **kwargs: y - level, optx.Newton(1e-10, 1e-10)
            ),
        ).ts[0]

    mixed = lambda adjoint, inner: jax.jacfwd(inner(loss, argnums=2), argnums=1)(
        adjoint, 1.2, 1.5
    )
    np.testing.assert_allclose(
        mixed(StochasticAdjoint(), jax.grad),
        mixed(diffrax.ForwardMode(), jax.jacfwd),
        rtol=1e-9,
    )
