"""Solves whose number of steps is known when they are traced."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import by_default_unless

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint
from diffrax_sde_adjoint._adjoint import _full_pages
from diffrax_sde_adjoint._forward.controllers import known_num_steps
from diffrax_sde_adjoint._solver import never_fails
from diffrax_sde_adjoint._sweep.sweep import Sweep


constant = diffrax.ConstantStepSize()


def known(controller, *times):
    return known_num_steps(controller, *map(np.asarray, times))


@pytest.mark.parametrize(
    "times",
    (
        (0.0, 1.0, 0.1),
        (0.0, 1.0, 1 / 3),
        (0.0, 1.0, 0.3),
        (0.0, 1.0, 1.0),
        (0.0, 0.7, 0.1),
        (-1.0, 2.0, 0.01),
        # Steps are so short that diffrax makes one of the last two.
        (999.0, 1000.0, 0.005),
        (99.0, 100.0, 5e-4),
        # The first step does not reach the end, or goes beyond it.
        (0.0, 1.0, 0.9999999403953552),
        (-0.18, -0.11, 0.07),
        (-2.0, -1.93, 0.07),
        (1.73, 1.83, 0.1),
    ),
    ids=str,
)
@pytest.mark.parametrize(
    "dtype", (np.float32, pytest.param(np.float64, marks=pytest.mark.slow))
)
def test_number(times, dtype):
    times = tuple(map(dtype, times))
    t0, t1, dt0 = map(jnp.asarray, times)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.Euler(),
        t0,
        t1,
        dt0,
        jnp.asarray(1, dtype),
    )
    num_steps = known(constant, *times)
    assert num_steps in (None, sol.stats["num_steps"])
    is_sure = times[0] in (-1, 0) and times[2] not in (0.9999999403953552,)
    assert num_steps is not None or not is_sure


def test_unknown():
    assert known(diffrax.StepTo(jnp.array([0.0, 0.1, 1.0])), 0.0, 1.0, 0.1) == 2
    assert known(diffrax.PIDController(1e-3, 1e-3), 0.0, 1.0, 0.1) is None
    assert known(constant, 0.0, np.inf, 0.1) is None
    assert known(constant, 1.0, 1.0, 0.1) is None
    assert known_num_steps(constant, np.asarray(0.0), np.asarray(1.0), None) is None
    numbers = []

    @jax.jit
    def trace(t1):
        numbers.append(known_num_steps(constant, np.asarray(0.0), t1, np.asarray(0.1)))

    trace(1.0)
    assert numbers == [None]


class _Euler(diffrax.Euler):
    """As if a user wrote it."""


def test_never_fails():
    for solver in (
        ReversibleHeun(),
        diffrax.Tsit5(),
        diffrax.HalfSolver(diffrax.Heun()),
    ):
        assert never_fails(solver)
    half = diffrax.HalfSolver
    for solver in (diffrax.Kvaerno3(), half(diffrax.ImplicitEuler()), half(_Euler())):
        assert not never_fails(solver)


@pytest.mark.parametrize("is_limit", (False, True))
def test_full_pages(is_limit):
    assert _full_pages(63, None, is_limit) == 63
    assert _full_pages(63, 1000, True) == 50
    assert _full_pages(32, 1000, False) == 40
    assert _full_pages(10, 100, False) == 10
    assert _full_pages(63, 211, is_limit) == 63
    for num_steps in range(1, 300):
        for wanted in (1, 7, 16, 63):
            length = _full_pages(wanted, num_steps, is_limit)
            assert wanted / 2 <= length <= wanted * (1 if is_limit else 2) or (
                length == num_steps
            )


def solve(
    y0, key, *, solver, adjoint, num_steps, event=None, throw=True, max_steps=4096
):
    dt = 1 / num_steps
    path = BrownianInterval(0.0, 1.0, (), key, dt=dt)
    sol = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(3 * y)),
            diffrax.ControlTerm(lambda t, y, args: 0.3 * jnp.cos(y), path),
        ),
        solver,
        0.0,
        1.0,
        dt,
        y0,
        event=event,
        adjoint=adjoint,
        throw=throw,
        max_steps=max_steps,
    )
    return sol.ys[-1], sol.stats["num_steps"]


@functools.cache
def gradient(solver, adjoint, num_steps):
    """Alone, and in a batch."""
    settings = dict(solver=solver, adjoint=adjoint, num_steps=num_steps)
    loss = lambda y0, key: solve(y0, key, **settings)[0]
    of_batch = lambda y0, keys: jnp.sum(jax.vmap(loss)(y0, keys))
    both = lambda y0, keys: (
        jax.grad(loss)(y0[0], keys[0]),
        jax.grad(of_batch)(y0, keys),
    )
    return jax.jit(both)(jnp.array([0.3, -0.2]), jr.split(jr.key(0)))


_ways = {
    "undone": (ReversibleHeun(), StochasticAdjoint()),
    "undone, checkpoints": (ReversibleHeun(), StochasticAdjoint(checkpoint_every=3)),
    "undone, kept": (ReversibleHeun(), StochasticAdjoint(store_all=True)),
    "made again": (diffrax.Heun(), StochasticAdjoint()),
    "made again, checkpoints": (diffrax.Heun(), StochasticAdjoint(checkpoint_every=3)),
    "kept": (diffrax.Heun(), StochasticAdjoint(store_all=True)),
}
_cases = [
    # Pages that are full, some of which are cut in two; and one that is not.
    pytest.param(
        *way,
        num_steps,
        id=f"{name}, {num_steps} steps",
        # By default, most gradients of other tests are of such solves.
        marks=pytest.mark.slow if num_steps in (30, 67) else pytest.mark.long,
    )
    for num_steps in (1, 30, 64, 67)
    for name, way in _ways.items()
]


@pytest.mark.parametrize("solver,adjoint,num_steps", _cases)
def test_gradient(solver, adjoint, num_steps):
    actual = gradient(solver, adjoint, num_steps)
    expected = gradient(solver, diffrax.RecursiveCheckpointAdjoint(), num_steps)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


@pytest.mark.parametrize(
    "name", by_default_unless(lambda name: name != "undone, kept", _ways)
)
def test_fewer_steps_are_allowed(name):
    solver, adjoint = _ways[name]

    def gradient(adjoint):
        loss = lambda y0: solve(
            y0,
            jr.key(0),
            solver=solver,
            adjoint=adjoint,
            num_steps=30,
            throw=False,
            max_steps=20,
        )
        return jax.jit(jax.grad(loss, has_aux=True))(0.3)

    actual, num_steps = gradient(adjoint)
    expected, _ = gradient(diffrax.RecursiveCheckpointAdjoint())
    assert num_steps == 20
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


@pytest.mark.slow
def test_looks_at_what_is_spurious(monkeypatch):
    """Where the state was kept, in a long solve where they would be if the number of
    steps were not known.
    """
    look, looks = Sweep._look, []

    def look_and_tell(sweep, known, t, grad, state):
        new = look(sweep, known, t, grad, state)
        nothing = eqx.tree_at(lambda x: x.worth, known, jnp.zeros(()))
        worth = look(sweep, nothing, t, grad, state).worth
        jax.debug.callback(lambda *x: looks.append(np.array(x)), t, state.y, worth)
        return new

    monkeypatch.setattr(Sweep, "_look", look_and_tell)

    def looks_of(dt):
        def loss(y0, dt):
            path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=dt)
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: jnp.sin(3 * y)),
                diffrax.ControlTerm(lambda t, y, args: 0.3 * jnp.cos(y), path),
            )
            adjoint = StochasticAdjoint(store_all=True)
            return diffrax.diffeqsolve(
                terms, ReversibleHeun(), 0.0, 1.0, dt, y0, adjoint=adjoint
            ).ys[-1]

        looks.clear()
        eqx.filter_jit(jax.grad(loss))(0.3, dt)
        jax.effects_barrier()
        return np.array(sorted(map(tuple, looks)))

    known = looks_of(1 / 40)
    np.testing.assert_allclose(known[:, 0], [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(known, looks_of(jnp.array(1 / 40)), atol=1e-12)
    np.testing.assert_allclose(looks_of(1 / 13)[:, 0], [0, 6 / 13, 12 / 13])


@pytest.mark.slow
def test_event_ends_a_solve():
    event = diffrax.Event(lambda t, y, args, **kwargs: t > 0.5)
    settings = dict(solver=ReversibleHeun(), num_steps=30, event=event)
    for adjoint in (StochasticAdjoint(), StochasticAdjoint(store_all=True)):
        run = lambda y0, adjoint=adjoint: solve(
            y0, jr.key(0), adjoint=adjoint, **settings
        )
        grad, num = eqx.filter_jit(jax.grad(run, has_aux=True))(0.3)
        assert 15 <= num <= 17
        reference = lambda y0: solve(
            y0, jr.key(0), adjoint=diffrax.RecursiveCheckpointAdjoint(), **settings
        )[0]
        np.testing.assert_allclose(grad, jax.grad(reference)(0.3), rtol=1e-10)


@pytest.mark.slow
def test_passed_controller_state():
    """It has the number of steps, and their lengths."""
    adjoint = StochasticAdjoint()

    @eqx.filter_jit
    def solves(y0, key, adjoint):
        saveat = diffrax.SaveAt(t1=True, controller_state=True)
        first = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Heun(),
            0.0,
            1.0,
            0.05,
            y0,
            saveat=saveat,
            adjoint=adjoint,
        )
        path = BrownianInterval(1.0, 2.0, (), key, dt=0.1)
        second = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: -y),
                diffrax.ControlTerm(lambda t, y, args: 0.3 * y, path),
            ),
            diffrax.Heun(),
            1.0,
            2.0,
            0.1,
            first.ys[-1],
            controller_state=first.controller_state,
            adjoint=adjoint,
        )
        return second.ys[-1], second.stats["num_steps"]

    args = (jnp.array(1.0), jr.key(0))
    actual = solves(*args, adjoint)
    expected = solves(*args, diffrax.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
