"""Gradients of batches of solves: what is shared is summed over, what is not is not."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    SmoothPath,
    keys,
    make_terms,
    relative_error,
    struct,
    value_and_grad_in_forward_mode,
)
from recorded_steps import Recording, Repeating

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


def solve(adjoint, solver, record, shared, own, key):
    """Adaptive, so that the elements of a batch make different numbers of steps; or
    with those of a record, see `recorded_steps.py`.
    """
    path = BrownianInterval(0.0, 1.0, struct((2,), jnp.float64), key, dt=0.1)
    args = {"weight": shared, "own": own}
    terms = make_terms(
        lambda t, y, args: jnp.sin(args["weight"] @ y) + args["own"],
        lambda t, y, args: jnp.outer(jnp.cos(y), args["own"]),
        path,
    )
    if record is None:
        controller = Recording(diffrax.PIDController(rtol=1e-2, atol=1e-2), 256)
    else:
        controller = Repeating(record)
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        1.0,
        0.1,
        jnp.array([0.5, -0.2]),
        args,
        saveat=diffrax.SaveAt(
            ts=[0.3, 0.31, 0.7],
            t1=True,
            fn=lambda t, y, args: y * args["own"],
            controller_state=record is None,
        ),
        adjoint=adjoint,
        stepsize_controller=controller,
        max_steps=256,
    )
    if record is None:
        assert sol.controller_state is not None
        *_, record = sol.controller_state
    return sol.ys, record


both_ways = pytest.mark.parametrize(
    "solver",
    (pytest.param(ReversibleHeun(), marks=pytest.mark.slow), diffrax.Heun()),
)


@pytest.mark.slow
@both_ways
def test_parameters_shared_over_some_axes(solver):
    """An ensemble of weights, each of which a batch shares."""
    weights = jr.normal(jr.key(1), (2, 2, 2))
    own = jr.normal(jr.key(2), (3, 2))

    def loss(inputs, adjoint, record):
        weights, own = inputs
        one = lambda record, *x: solve(adjoint, solver, record, *x)
        batch = jax.vmap(one, in_axes=(0, None, 0, 0))
        # Of all axes, `own` has the inner one, `weights` the outer one, `key` both.
        ensemble = jax.jit(jax.vmap(batch, in_axes=(0, 0, None, 0)))
        ys, record = ensemble(record, weights, own, keys(6).reshape(2, 3))
        scale = jnp.cos(1 + jnp.arange(ys.size)).reshape(ys.shape)
        return jnp.sum(ys * scale), record

    inputs = (weights, own)
    gradient = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))
    ours, record = gradient(inputs, StochasticAdjoint(), None)
    num_steps = jnp.sum(record.decisions[0], axis=-1)
    assert len(set(num_steps.ravel().tolist())) > 3
    _, theirs = value_and_grad_in_forward_mode(
        lambda inputs: loss(inputs, diffrax.ForwardMode(), record), inputs
    )
    assert relative_error(ours, theirs) < 1e-9


@pytest.mark.slow
def test_pages_of_which_states_are_kept():
    """Long enough for the sweep to look at the states within them, of a batch whose
    elements are elsewhere on their pages.
    """
    path = lambda key: SmoothPath(struct((), jnp.float64), key)

    def one(rate, t1, key, adjoint):
        terms = make_terms(
            lambda t, y, rate: -rate * y, lambda t, y, rate: rate * y, path(key)
        )
        y0 = jnp.array(1.0)
        return diffrax.diffeqsolve(
            terms, ReversibleHeun(), 0.0, t1, 0.05, y0, rate, adjoint=adjoint
        ).ys

    def loss(rate, adjoint):
        t1s = jnp.array([1.0, 0.85, 0.3])
        batch = jax.vmap(one, in_axes=(None, 0, 0, None))
        return jnp.sum(batch(rate, t1s, keys(3), adjoint) ** 2)

    adjoint = StochasticAdjoint(checkpoint_every=16)
    ours = jax.jit(lambda rate: jax.grad(loss)(rate, adjoint))(0.7)
    theirs = jax.jit(lambda rate: jax.jacfwd(loss)(rate, diffrax.ForwardMode()))(0.7)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.slow
def test_steps_of_a_batch_are_kept_together():
    """All elements of a step, if it is known how many there are, and not all steps of
    an element: these would be written and read in as many pieces as there are elements.
    """
    batch, num_steps, width = 11, 6, 7
    drift = lambda t, y, args: jnp.tanh(args @ y)
    weight, y0 = jnp.eye(width), jnp.ones((batch, width))

    def loss(weight, dt0, solver, adjoint):
        one = lambda y0: (
            diffrax.diffeqsolve(
                diffrax.ODETerm(drift),
                solver,
                0.0,
                1.0,
                dt0,
                y0,
                weight,
                adjoint=adjoint,
                max_steps=num_steps,
            ).ys
        )
        return jnp.sum(jax.vmap(one)(y0))

    def kept(is_known, *args):
        """How what has all steps and all elements begins."""
        dt0 = 1 / num_steps
        if is_known:
            program = jax.jit(jax.grad(lambda weight: loss(weight, dt0, *args)))
            text = program.lower(weight).as_text()
        else:
            program = jax.jit(jax.grad(lambda weight, dt0: loss(weight, dt0, *args)))
            text = program.lower(weight, dt0).as_text()
        return set(re.findall(r"tensor<(6x11|11x6)x[0-9x]+xf64>", text))

    stored = StochasticAdjoint(store_all=True)
    for solver in (ReversibleHeun(), diffrax.Heun(), diffrax.Tsit5()):
        assert kept(True, solver, stored) == {"6x11"}
    assert kept(True, diffrax.Heun(), StochasticAdjoint(checkpoint_every=1)) == {"6x11"}
    # One page, of which it makes all steps again.
    assert kept(True, diffrax.Heun(), StochasticAdjoint(checkpoint_every=6)) == {"6x11"}
    # What this looks for is there if the number of steps is not known.
    assert kept(False, diffrax.Heun(), stored) == {"11x6"}


@pytest.mark.slow
def test_no_gradient_for_each_element():
    """The gradient of shared weights is summed in a matrix product."""
    batch, width = 11, 7
    drift = lambda t, y, args: jnp.tanh(args @ y)
    weight, y0 = jnp.eye(width), jnp.ones((batch, width))
    path = BrownianInterval(
        0.0,
        1.0,
        struct((), jnp.float64),
        jr.key(0),
        dt=0.1,
        levy_area=diffrax.SpaceTimeLevyArea,
    )

    def loss(weight, adjoint, solver):
        terms = diffrax.ODETerm(drift)
        if isinstance(solver, diffrax.SPaRK):
            terms = make_terms(drift, drift, path)
        one = lambda y0: (
            diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, 0.1, y0, weight, adjoint=adjoint
            ).ys
        )
        return jnp.sum(jax.vmap(one)(y0))

    def shapes(*args):
        program = jax.jit(jax.grad(lambda weight: loss(weight, *args))).lower(weight)
        return set(re.findall(r"tensor<([0-9x]+)xf64>", program.as_text()))

    for solver in (ReversibleHeun(), diffrax.Heun(), diffrax.SPaRK()):
        ours = shapes(StochasticAdjoint(), solver)
        assert "11x7" in ours
        assert "11x7x7" not in ours
    # What this looks for is there if JAX batches the rule of each element.
    assert "11x7x7" in shapes(diffrax.BacksolveAdjoint(), diffrax.Heun())


def test_elements_whose_steps_cannot_be_undone():
    """With `throw=False`, they alone have no gradient of their own."""

    def loss(inputs):
        shared, rates = inputs

        def one(rate):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: -args[0] * args[1] * y),
                ReversibleHeun(),
                0.0,
                10.0,
                0.01,
                jnp.array(1.0),
                (shared, rate),
                adjoint=StochasticAdjoint(),
                throw=False,
            )
            return sol.ys[0]

        return jnp.sum(jax.vmap(one)(rates))

    inputs = (jnp.array(1.0), jnp.array([0.1, 5.0, 0.2]))
    grad_shared, grad_rates = jax.jit(jax.grad(loss))(inputs)
    assert jnp.isnan(grad_shared)
    np.testing.assert_array_equal(jnp.isnan(grad_rates), [False, True, False])


def assert_equal_gradients_where_defined(solver, y0, t1s, rate, saveat):
    """Of solves to different times, with a vector field that is not defined
    everywhere.
    """

    def loss(rate, adjoint):
        def one(t1):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, rate: rate * jnp.sqrt(y)),
                solver,
                0.0,
                t1,
                0.25,
                y0(rate),
                rate,
                saveat=saveat,
                adjoint=adjoint,
            ).ys

        return jnp.sum(jax.vmap(one)(jnp.array(t1s)))

    rate = jnp.array(rate)
    ours = jax.jit(lambda rate: jax.grad(loss)(rate, StochasticAdjoint()))(rate)
    theirs = jax.jit(lambda rate: jax.jacfwd(loss)(rate, diffrax.ForwardMode()))(rate)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize(
    "solver",
    (ReversibleHeun(), pytest.param(diffrax.Heun(), marks=pytest.mark.slow)),
)
def test_elements_wait_at_their_start(solver):
    saveat = diffrax.SaveAt(ts=[0.1, 0.2], fn=lambda t, y, args: args * y**2)
    y0 = lambda rate: jnp.array(0.01)
    assert_equal_gradients_where_defined(solver, y0, [1.0, 2.0], 1.0, saveat)


@both_ways
def test_element_without_steps(solver):
    saveat = diffrax.SaveAt(t0=True, t1=True)
    y0 = lambda rate: 0.5 * rate
    assert_equal_gradients_where_defined(solver, y0, [0.0, 1.0], 1.3, saveat)


def test_outputs_of_other_elements():
    """While these have some within a step, a function of the solution is not evaluated
    where it was not, and could overflow.
    """

    def loss(rate, adjoint):
        def one(dt):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(
                    lambda t, y, rate: -rate * jnp.where(t > 0.985, 100, 0)
                ),
                diffrax.Euler(),
                0.0,
                1.0,
                dt,
                jnp.array(0.0),
                rate,
                saveat=diffrax.SaveAt(ts=[0.2, 1.0], fn=lambda t, y, args: jnp.exp(y)),
                adjoint=adjoint,
                max_steps=100,
            ).ys

        return jnp.sum(jax.vmap(one)(jnp.array([1.0, 0.01])))

    rate = jnp.array(10.0)
    ours = jax.jit(lambda rate: jax.grad(loss)(rate, StochasticAdjoint()))(rate)
    theirs = jax.jit(lambda rate: jax.jacfwd(loss)(rate, diffrax.ForwardMode()))(rate)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    np.testing.assert_allclose(theirs, -np.exp(-10), rtol=1e-10)


def test_conditional():
    """JAX keeps what is inside of it, for its derivative, without weak types."""
    path = SmoothPath(struct((), jnp.float64), jr.key(0))
    terms = make_terms(lambda t, y, args: -y, lambda t, y, args: args * y, path)

    def loss(args, adjoint):
        solve = lambda: diffrax.diffeqsolve(
            terms, diffrax.Heun(), 0.0, 1.0, 0.25, 1.0, args, adjoint=adjoint
        ).ys[0]
        return jax.lax.cond(args > 0, solve, lambda: args)

    ours = jax.jit(lambda args: jax.grad(loss)(args, StochasticAdjoint()))
    theirs = jax.jit(lambda args: jax.jacfwd(loss)(args, diffrax.ForwardMode()))
    for args in (jnp.array(0.7), jnp.array(-0.7)):
        assert relative_error(ours(args), theirs(args)) < 1e-12
