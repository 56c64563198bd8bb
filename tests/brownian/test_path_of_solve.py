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
        args = (
            WrapTerm(term, jnp.array(direction)),
            diffrax.ConstantStepSize(),
            *times,
        )
        found.append(has_steps_on_cells(with_paths_of_solve(*args)[0]))

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


@pytest.mark.parametrize(
    "solver,levy_area",
    (
        (ReversibleHeun(), diffrax.BrownianIncrement),
        (diffrax.SPaRK(), diffrax.SpaceTimeLevyArea),
        (diffrax.HalfSolver(diffrax.Euler()), diffrax.BrownianIncrement),
    ),
    ids=("ReversibleHeun", "SPaRK", "HalfSolver"),
)
# The second does not divide the interval.
@pytest.mark.parametrize("dt", (0.1, 0.15))
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


@pytest.mark.parametrize("jit", (False, True))
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
