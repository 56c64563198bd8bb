"""Step size controllers that a user wrote."""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_sde_adjoint import ReversibleHeun, StochasticAdjoint


def make_controller(length):
    """Steps of length `length(t, y)`, in which all that it refers to is a closure."""

    class Controller(diffrax.AbstractStepSizeController):
        def wrap(self, direction):
            return self

        def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
            return t0 + length(t0, y0), None

        def adapt_step_size(
            self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
        ):
            tnext = t1 + length(t1, y1_candidate)
            return True, t1, tnext, False, None, diffrax.RESULTS.successful

    return Controller()


def solve(controller, adjoint, solver, y0=0.3):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.sin(y + 3 * t)),
        solver,
        0.0,
        1.0,
        None,
        jnp.asarray(y0),
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(ts=[0.4], t1=True),
        adjoint=adjoint,
    ).ys


solvers = pytest.mark.parametrize("solver", (ReversibleHeun(), diffrax.Heun()))


@solvers
def test_what_it_refers_to(solver):
    def loss(dt, adjoint):
        length = lambda t, y: dt * (1 + t) / (1 + lax.stop_gradient(y) ** 2)
        return jnp.sum(solve(make_controller(length), adjoint, solver))

    gradient = eqx.filter_jit(jax.value_and_grad(loss))
    ours = gradient(jnp.array(0.1), StochasticAdjoint())
    dt, forward = jnp.array(0.1), diffrax.ForwardMode()
    theirs = jax.jit(
        lambda dt: jax.jvp(lambda dt: loss(dt, forward), (dt,), (jnp.ones(()),))
    )(dt)
    assert theirs[1] != 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@solvers
def test_looking_at_the_solution(solver):
    controller = make_controller(lambda t, y: 0.1 / (1 + y**2))

    def loss(y0, adjoint):
        return jnp.sum(solve(controller, adjoint, solver, y0))

    solved = eqx.filter_jit(loss)
    ours = solved(0.3, StochasticAdjoint())
    theirs = solved(0.3, diffrax.ForwardMode())
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    with pytest.raises(ValueError, match="step sizes depend on the solution"):
        jax.grad(loss)(0.3, StochasticAdjoint())
