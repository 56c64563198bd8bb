"""What a solve is told of its paths, and what becomes of what is not so."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint
from diffrax_sde_adjoint._brownian.path_of_solve import (
    PathOfSolve,
    has_steps_on_cells,
    with_paths_of_solve,
)
from diffrax_sde_adjoint._compat import WrapTerm


reversible_heun = ReversibleHeun()


def solve(
    key,
    *,
    path=(0.0, 1.0, 0.1),
    times=(0.0, 1.0, 0.1),
    cls=diffrax.ControlTerm,
    solver=reversible_heun,
    levy_area=diffrax.BrownianIncrement,
):
    t0, t1, dt = path
    path = BrownianInterval(t0, t1, (), key, dt=dt, levy_area=levy_area)
    # Not at the ends of steps, which may be rounded either way.
    at = times[0] + (times[1] - times[0]) * jnp.array([0.13, 0.57, 0.91])
    sol = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y),
            cls(lambda t, y, args: 0.3 * y, path),
        ),
        solver,
        t0=times[0],
        t1=times[1],
        dt0=times[2],
        y0=jnp.array(1.0),
        saveat=diffrax.SaveAt(ts=at),
        adjoint=StochasticAdjoint(),
        max_steps=64,
    )
    assert sol.ys is not None
    return sol.ys


def terms_of_solve(path, times, direction=1):
    """Of a solve that is being traced."""
    found = []
    times = tuple(map(jnp.asarray, times))

    def trace(key):
        t0, t1, dt = path
        term = diffrax.ControlTerm(
            lambda t, y, args: y, BrownianInterval(t0, t1, (), key, dt=dt)
        )
        terms, _ = with_paths_of_solve(
            WrapTerm(term, jnp.array(direction)),
            jnp.array(1.0),
            *times,
            has_planned_steps=True,
            goes_to_end=True,
        )
        found.append(has_steps_on_cells(terms))

    jax.jit(trace)(jr.key(0))
    return found[0]


@pytest.mark.parametrize(
    "times,is_known",
    (
        ((0.0, 1.0, 0.1), True),
        ((0.0, 1.0, 0.05), False),
        ((0.0, 0.9, 0.1), False),
        ((0.1, 1.0, 0.1), False),
    ),
)
def test_steps_on_cells(times, is_known):
    # In JAX 0.6, what diffrax makes of times is not known.
    is_known = is_known and jax.__version_info__ >= (0, 7)
    assert terms_of_solve((0.0, 1.0, 0.1), times) == is_known


def test_steps_backwards_are_not_on_cells():
    assert not terms_of_solve((-1.0, 0.0, 0.1), (0.0, 1.0, 0.1), direction=-1)


half = diffrax.HalfSolver(diffrax.Euler())


@pytest.mark.parametrize(
    "solver,levy_area,dt",
    (
        pytest.param(
            ReversibleHeun(), diffrax.BrownianIncrement, 0.1, marks=pytest.mark.slow
        ),
        # This does not divide the interval.
        (ReversibleHeun(), diffrax.BrownianIncrement, 0.15),
        pytest.param(
            diffrax.SPaRK(), diffrax.SpaceTimeLevyArea, 0.15, marks=pytest.mark.slow
        ),
        pytest.param(half, diffrax.BrownianIncrement, 0.1, marks=pytest.mark.slow),
        pytest.param(half, diffrax.BrownianIncrement, 0.15, marks=pytest.mark.slow),
    ),
    ids=str,
)
def test_same_as_traced(solver, levy_area, dt):
    """It does not matter whether times are known when a solve is traced."""
    times = (0.0, 1.0, dt)
    kwargs = dict(solver=solver, levy_area=levy_area)
    known = eqx.filter_jit(lambda key: solve(key, path=times, times=times, **kwargs))
    traced = eqx.filter_jit(
        lambda key, times: solve(key, path=times, times=times, **kwargs)
    )
    expected = traced(jr.key(0), tuple(map(jnp.asarray, times)))
    assert np.all(np.isfinite(expected))
    np.testing.assert_allclose(known(jr.key(0)), expected, rtol=1e-12)


@pytest.mark.parametrize("jit", (pytest.param(False, marks=pytest.mark.slow), True))
@pytest.mark.parametrize(
    "times", ((0.0, 1.5, 0.1), (-0.1, 1.0, 0.1), (1.2, 0.2, -0.1)), ids=str
)
def test_solve_outside(times, jit):
    start, end = sorted(times[:2])
    message = f"was called from {start:g} to {end:g}, but the path is from 0 to 1"
    run = lambda key: solve(key, times=times)
    with pytest.raises(RuntimeError, match=message):
        (eqx.filter_jit(run) if jit else run)(jr.key(0))
    with pytest.raises(RuntimeError, match=message):
        eqx.filter_vmap(run)(jr.split(jr.key(0)))


class Delayed(diffrax.ControlTerm):
    """Looks ahead, so that it is not known from the times of a solve where."""

    def contr(self, t0, t1, **kwargs):
        return super().contr(t0 + 0.25, t1 + 0.25, **kwargs)


def test_term_that_looks_elsewhere():
    times = (0.0, 0.7, 0.1)
    assert np.all(np.isfinite(solve(jr.key(0), times=times, cls=Delayed)))
    message = "to 1.05, but the path is from 0 to 1"
    with pytest.raises(RuntimeError, match=message):
        solve(jr.key(0), times=(0.0, 0.8, 0.1), cls=Delayed)


def test_wrong_queries_are_not_numbers():
    path = BrownianInterval(0.0, 1.0, (2,), jr.key(0), dt=0.25)
    within = PathOfSolve(path, on_cells=False)
    on_cells = PathOfSolve(path, on_cells=True, kind="cell")
    for query in ((0.25, 0.5), (0.1, 0.7)):
        assert np.all(within.evaluate(*query) == path.evaluate(*query))
    assert np.all(on_cells.evaluate(0.25, 0.5) == path.evaluate(0.25, 0.5))
    assert np.all(on_cells.evaluate(0.25, 0.25) == 0)
    assert np.all(np.isnan(within.evaluate(0.5, 1.25)))
    for query in ((0.1, 0.35), (0.25, 0.75), (0.5, 0.25), (1.0, 1.25)):
        assert np.all(np.isnan(on_cells.evaluate(*query)))


def langevin(key, times, adjoint):
    shape = jax.ShapeDtypeStruct((2,), jnp.float64)
    t0, t1, dt = times
    path = BrownianInterval(
        t0, t1, shape, key, dt=dt, levy_area=diffrax.SpaceTimeTimeLevyArea
    )
    terms = diffrax.MultiTerm(
        diffrax.UnderdampedLangevinDriftTerm(1.0, 1.0, lambda x, args: args * x),
        diffrax.UnderdampedLangevinDiffusionTerm(1.0, 1.0, path),
    )
    run = lambda args: diffrax.diffeqsolve(
        terms,
        diffrax.ALIGN(0.1),
        t0,
        t1,
        dt,
        (jnp.ones(2), jnp.zeros(2)),
        args,
        adjoint=adjoint,
        max_steps=16,
    )
    loss = lambda args: jnp.sum(run(args).ys[0])
    return jax.value_and_grad(loss)(2.0)


@pytest.mark.slow
def test_langevin():
    """Its solvers look into the terms."""
    times = (0.0, 1.0, 0.1)
    run = eqx.filter_jit(langevin)
    expected = run(jr.key(0), times, diffrax.RecursiveCheckpointAdjoint())
    actual = run(jr.key(0), times, StochasticAdjoint())
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


@pytest.mark.slow
def test_solve_that_ends_before():
    """It is allowed that a path does not hold what an event cuts off."""
    path = lambda key: BrownianInterval(0.0, 1.0, (), key, dt=0.1)

    def run(key, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: -y),
                diffrax.ControlTerm(lambda t, y, args: 0.3 * y, path(key)),
            ),
            reversible_heun,
            0.0,
            jnp.inf,
            0.1,
            jnp.array(1.0),
            event=diffrax.Event(lambda t, y, args, **kwargs: t > 0.55),
            adjoint=adjoint,
        )
        assert sol.ys is not None
        return sol.ys[-1]

    expected = eqx.filter_jit(run)(jr.key(0), diffrax.RecursiveCheckpointAdjoint())
    actual = eqx.filter_jit(run)(jr.key(0), StochasticAdjoint())
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.slow
def test_element_of_no_length_elsewhere():
    """Of a batch; a step of no length is evaluated for it."""

    def loss(args, t0):
        path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=0.1)
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: -args * y),
                diffrax.ControlTerm(lambda t, y, args: 0.3 * args * y, path),
            ),
            reversible_heun,
            t0,
            jnp.where(t0 > 1, t0, 1.0),
            0.1,
            jnp.array(1.0),
            args,
            adjoint=StochasticAdjoint(),
        )
        assert sol.ys is not None
        return sol.ys[-1]

    of_batch = lambda args, t0: jnp.sum(jax.vmap(loss, (None, 0))(args, t0))
    gradient = jax.jit(jax.grad(of_batch))
    actual = gradient(0.7, jnp.array([5.0, 0.0]))
    np.testing.assert_allclose(actual, gradient(0.7, jnp.array([0.0])), rtol=1e-10)


def test_term_may_look_at_the_path():
    path = PathOfSolve(BrownianInterval(0.0, 1.0, (2,), jr.key(3)), on_cells=False)
    assert jnp.array_equal(jr.key_data(path.key), jr.key_data(jr.key(3)))
    assert path.levels == 20
    with pytest.raises(AttributeError):
        _ = path.something
