"""Every SDE solver of diffrax on a `BrownianInterval`: strong orders, and adaptive
steps.
"""

import functools as ft
import itertools
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import by_default_unless, keys, make_terms, struct
from jaxtyping import PyTree

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun


f64 = jnp.float64
W = diffrax.BrownianIncrement
H = diffrax.SpaceTimeLevyArea
K = diffrax.SpaceTimeTimeLevyArea


class Problem(NamedTuple):
    """An SDE over `[0, 1]`, and where its strong orders can be seen."""

    terms: Callable[[diffrax.AbstractBrownianPath], diffrax.MultiTerm]
    y0: PyTree[np.ndarray]
    noises: int
    levy_area: type[diffrax.AbstractBrownianIncrement]
    # Errors are of the solves with steps `2**-k` for these `k`, and with respect to one
    # with a much smaller step by a solver of a high order, or else to the solve with
    # half the step. (That has the same order. It is of use where no solver has a high
    # order.)
    ks: range
    reference: tuple[str, int] | None


def rotation(y):
    """A drift that mixes the entries and does not contract: `ReversibleHeun` is not
    stable for drifts that do.
    """
    return jnp.stack([jnp.sin(y[1]), jnp.cos(y[0])])


def diagonal(path):
    """Noise that commutes, in the sense of Stratonovich. It does not commute with the
    drift, so that order 1.5 needs the Lévy area.
    """
    return make_terms(
        lambda t, y, args: rotation(y),
        lambda t, y, args: jnp.diag(0.6 * jnp.cos(y)),
        path,
    )


def diagonal_ito(path):
    """The same process in the sense of Itô: its drift has half of `g g'` added, where
    `g(y) = 0.6 cos(y)`.
    """
    return make_terms(
        lambda t, y, args: rotation(y) - 0.18 * jnp.cos(y) * jnp.sin(y),
        lambda t, y, args: jnp.diag(0.6 * jnp.cos(y)),
        path,
    )


def additive(path):
    sigma = jnp.array([[0.5, -0.3, 0.2], [0.1, 0.4, 0.6]])
    return make_terms(lambda t, y, args: rotation(y), lambda t, y, args: sigma, path)


def general(path):
    """Noise that does not commute."""
    return make_terms(
        lambda t, y, args: rotation(y),
        lambda t, y, args: jnp.stack([0.6 * jnp.cos(y), 0.5 * jnp.sin(y[::-1])], -1),
        path,
    )


def langevin(path):
    """In the double well `|x|**2 / 2 + 2 sum(cos(x))`."""
    gamma, u = jnp.array([1.0, 0.5]), jnp.array([1.0, 0.7])
    grad = lambda x, args: x - 2 * jnp.sin(x)
    return diffrax.MultiTerm(
        diffrax.UnderdampedLangevinDriftTerm(gamma, u, grad),
        diffrax.UnderdampedLangevinDiffusionTerm(gamma, u, path),
    )


_y0 = np.array([0.3, -0.2])
_ks = range(3, 8)
problems = {
    "diagonal": Problem(diagonal, _y0, 2, H, _ks, ("SlowRK", 10)),
    # The reference is of `diagonal`: the two must be one process.
    "diagonal Itô": Problem(diagonal_ito, _y0, 2, H, _ks, ("SlowRK", 10)),
    "additive": Problem(additive, _y0, 3, H, _ks, ("ShARK", 10)),
    "general": Problem(general, _y0, 2, H, _ks, None),
    "Langevin": Problem(langevin, (_y0, -_y0), 2, K, range(1, 6), ("QUICSORT", 8)),
}


class Case(NamedTuple):
    solver: diffrax.AbstractSolver
    problem: str
    strong_order: float  # that the solver says to have, whatever the problem
    order: float  # that it is known to have for this problem
    slow: bool = False


half_euler = diffrax.HalfSolver(diffrax.Euler())
half_euler_heun = diffrax.HalfSolver(diffrax.EulerHeun())
# By default some of those for stochastic Runge-Kutta methods and Langevin dynamics, of
# increments of W, H and K.
cases = {
    "Euler": Case(diffrax.Euler(), "diagonal Itô", 0.5, 0.5, slow=True),
    "HalfSolver(Euler)": Case(half_euler, "diagonal Itô", 0.5, 0.5, slow=True),
    "ItoMilstein": Case(diffrax.ItoMilstein(), "diagonal Itô", 1, 1, slow=True),
    # Order 0.5 in general, but 1 as the noise commutes.
    "EulerHeun": Case(diffrax.EulerHeun(), "diagonal", 0.5, 1, slow=True),
    "HalfSolver(EulerHeun)": Case(half_euler_heun, "diagonal", 0.5, 1, slow=True),
    "Heun": Case(diffrax.Heun(), "diagonal", 0.5, 1, slow=True),
    "Midpoint": Case(diffrax.Midpoint(), "diagonal", 0.5, 1, slow=True),
    "Ralston": Case(diffrax.Ralston(), "diagonal", 0.5, 1, slow=True),
    "ReversibleHeun": Case(diffrax.ReversibleHeun(), "diagonal", 0.5, 1, slow=True),
    "our ReversibleHeun": Case(ReversibleHeun(), "diagonal", 0.5, 1, slow=True),
    "GeneralShARK": Case(diffrax.GeneralShARK(), "diagonal", 0.5, 1, slow=True),
    "SPaRK": Case(diffrax.SPaRK(), "diagonal", 0.5, 1, slow=True),
    "StratonovichMilstein": Case(
        diffrax.StratonovichMilstein(), "diagonal", 1, 1, slow=True
    ),
    "SlowRK": Case(diffrax.SlowRK(), "diagonal", 1.5, 1.5),
    "SEA": Case(diffrax.SEA(), "additive", 1, 1, slow=True),
    "SRA1": Case(diffrax.SRA1(), "additive", 1.5, 1.5, slow=True),
    "ShARK": Case(diffrax.ShARK(), "additive", 1.5, 1.5, slow=True),
    # Order 1.5 for additive noise, and 0.5 for noise that does not commute.
    "SPaRK, additive": Case(diffrax.SPaRK(), "additive", 0.5, 1.5, slow=True),
    "SPaRK, general": Case(diffrax.SPaRK(), "general", 0.5, 0.5, slow=True),
    # Below this step (times friction) their coefficients are Taylor expanded; the
    # steps are on either side of it.
    "ALIGN": Case(diffrax.ALIGN(0.1), "Langevin", 2, 2, slow=True),
    "ShOULD": Case(diffrax.ShOULD(0.1), "Langevin", 3, 3, slow=True),
    "QUICSORT": Case(diffrax.QUICSORT(0.1), "Langevin", 3, 3),
}
# Start, end and `dt` of a path.
grids = {
    # Each step is a union of cells.
    "on the grid": (0.0, 1.0, 2.0**-10),
    # Steps are parts of cells, or reach across them.
    "off the grid": (-0.3, 1.4, 0.0371),
    # No step ends at a point of the path's own bisection.
    "one cell": (-0.3, 1.4, None),
}


def as_arrays(*xs, dtype=f64):
    return [None if x is None else jnp.array(x, dtype) for x in xs]


def make_path(problem, key, start, end, dt):
    return BrownianInterval(
        start, end, (problem.noises,), key, dt=dt, levy_area=problem.levy_area
    )


@ft.cache
def make_solve(case: str, with_dt: bool) -> Callable:
    """Compiled once for all step sizes, and for all paths with a `dt`."""
    problem = problems[cases[case].problem]

    def solve(start, end, dt, dt0):
        def solve_one(key):
            sol = diffrax.diffeqsolve(
                problem.terms(make_path(problem, key, start, end, dt)),
                cases[case].solver,
                0.0,
                1.0,
                dt0,
                jtu.tree_map(jnp.asarray, problem.y0),
                max_steps=1024,
            )
            return jnp.concatenate(jtu.tree_leaves(sol.ys), axis=-1)

        return jax.vmap(solve_one)(keys(128))

    return jax.jit(solve)


@ft.cache
def fixed_steps(case: str, grid: str, k: int) -> np.ndarray:
    start, end, dt, dt0 = as_arrays(*grids[grid], 2.0**-k)
    return np.asarray(make_solve(case, dt is not None)(start, end, dt, dt0))


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def test_no_solver_is_missing():
    sde_solvers = (
        diffrax.AbstractItoSolver,
        diffrax.AbstractStratonovichSolver,
        diffrax.AbstractSRK,
        diffrax.AbstractFosterLangevinSRK,
    )
    names = {
        name
        for name, cls in vars(diffrax).items()
        if isinstance(cls, type)
        and issubclass(cls, sde_solvers)
        and not name.startswith("Abstract")
    }
    assert names <= {type(case.solver).__name__ for case in cases.values()}


def is_slow(grid, case):
    return cases[case].slow or grid != "off the grid"


@pytest.mark.parametrize(
    "grid,case",
    by_default_unless(
        is_slow,
        itertools.product(grids, cases),
        long=lambda grid, case: cases[case].slow and grid != "off the grid",
    ),
)
def test_strong_order(grid, case):
    problem = problems[cases[case].problem]
    path = make_path(problem, jr.key(0), *grids[grid])
    solver = cases[case].solver
    assert solver.strong_order(problem.terms(path)) == cases[case].strong_order

    if problem.reference is None:
        ks = [*problem.ks, problem.ks[-1] + 1]
        differences = np.diff([fixed_steps(case, grid, k) for k in ks], axis=0)
    else:
        name, k = problem.reference
        exact = fixed_steps(name, grid, k)
        differences = [fixed_steps(case, grid, k) - exact for k in problem.ks]
    errors = [root_mean_square(x) for x in differences]
    assert np.all(np.isfinite(errors))
    assert np.all(np.diff(errors) < 0)
    # With 128 paths an error has a standard error of 6% or a little more, so if those
    # of different steps were independent, then the slope would have one of 0.04; and
    # the errors of the largest steps have yet to be of their leading order. Other
    # orders are at least 0.5 away.
    slope = -np.polyfit(problem.ks, np.log2(errors), deg=1)[0]
    assert slope >= cases[case].order - 0.15


@pytest.mark.parametrize(
    "solver,problem,levy_area,match",
    (
        (diffrax.ShARK(), "additive", W, "levy_area=diffrax.SpaceTimeLevyArea"),
        (diffrax.ALIGN(0.1), "Langevin", W, "must have `levy_area=.*SpaceTimeLevyArea"),
        (
            diffrax.QUICSORT(0.1),
            "Langevin",
            H,
            "must have `levy_area=.*SpaceTimeTimeLevyArea",
        ),
    ),
    ids=("ShARK", "ALIGN", "QUICSORT"),
)
def test_levy_area_is_missing(solver, problem, levy_area, match):
    """Of solvers for Langevin dynamics, it is diffrax that raises an error."""
    problem = problems[problem]._replace(levy_area=levy_area)
    terms = problem.terms(make_path(problem, jr.key(0), 0.0, 1.0, 0.1))
    y0 = jtu.tree_map(jnp.asarray, problem.y0)
    with pytest.raises(ValueError, match=match):
        diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.1, y0)


def make_controller(name: str, rtol) -> diffrax.AbstractAdaptiveStepSizeController:
    # The coefficients that diffrax suggests for SDEs.
    controller = diffrax.PIDController(
        rtol=rtol, atol=rtol, pcoeff=0.1, icoeff=0.3, dcoeff=0
    )
    if name == "clip":
        controller = diffrax.ClipStepSizeController(
            controller,
            step_ts=jnp.array([0.35, 0.5], rtol.dtype),
            store_rejected_steps=100,
        )
    return controller


# Geometric Brownian motion: its solution is a function of the path's increment.
rate, volatility = 0.4, 0.8
paths = {
    "dt": dict(dt=0.07),
    "ts": dict(ts=(-0.3, 0.01, 0.02, 0.3, 0.31, 0.85, 1.4)),
    "one cell": dict(),
}


class Adaptive(NamedTuple):
    solver: diffrax.AbstractSolver
    rtols: tuple[float, float]
    # diffrax 0.7.2 is wrong for its stochastic Runge-Kutta solvers backwards in time,
    # on every path: https://github.com/patrick-kidger/diffrax/issues/598
    backward: bool = True


adaptive = {
    "SPaRK": Adaptive(diffrax.SPaRK(), (1e-2, 1e-3), backward=False),
    "Heun": Adaptive(diffrax.Heun(), (1e-1, 1e-2)),
    "our ReversibleHeun": Adaptive(ReversibleHeun(), (3e-2, 3e-3)),
    "HalfSolver(EulerHeun)": Adaptive(half_euler_heun, (1e-2, 1e-3)),
}


def make_geometric(case: str, grid: str, controller: str, dtype=f64) -> Callable:
    """For a key: the logarithm of the solution, with adaptive steps and of the exact
    one, and the number of rejected steps.
    """
    start, end = as_arrays(-0.3, 1.4, dtype=dtype)
    levy_area = H if case == "SPaRK" else W
    cells = {name: jnp.array(x, dtype) for name, x in paths[grid].items()}

    def solve(key, t0, t1, rtol):
        path = BrownianInterval(
            start, end, struct((), dtype), key, levy_area=levy_area, **cells
        )
        drift, diffusion = (lambda t, y, args, c=c: c * y for c in (rate, volatility))
        sol = diffrax.diffeqsolve(
            make_terms(drift, diffusion, path),
            adaptive[case].solver,
            t0,
            t1,
            0.5 * (t1 - t0),  # far too long
            jnp.ones((), dtype),
            stepsize_controller=make_controller(controller, rtol),
        )
        increment = path.evaluate(jnp.minimum(t0, t1), jnp.maximum(t0, t1))
        increment = jnp.where(t0 < t1, increment, -increment)
        exact = rate * (t1 - t0) + volatility * increment
        return jnp.log(sol.ys[0]), exact, sol.stats["num_rejected_steps"]

    return solve


def batched(solve: Callable, num: int) -> Callable:
    solve = jax.vmap(solve, in_axes=(0, None, None, None))
    return jax.jit(lambda *args: solve(keys(num), *args))


@pytest.mark.parametrize(
    "case,grid,controller,num",
    by_default_unless(
        lambda *case: case[-1] > 1000,
        (
            ("SPaRK", "dt", "PID", 2048),
            ("SPaRK", "ts", "PID", 2048),
            ("SPaRK", "dt", "clip", 2048),
            ("SPaRK", "one cell", "clip", 2048),
            ("Heun", "ts", "clip", 2048),
            ("Heun", "ts", "clip", 512),
            ("our ReversibleHeun", "one cell", "PID", 2048),
            ("our ReversibleHeun", "one cell", "PID", 512),
            ("HalfSolver(EulerHeun)", "dt", "clip", 2048),
        ),
        long=lambda case, *_: case.startswith("HalfSolver"),
    ),
)
def test_adaptive_steps(case, grid, controller, num):
    """Rejected steps leave the path, and so the law of the solution, as they were: seen
    on `num` of them, which few are quick to compute.
    """
    solve = batched(make_geometric(case, grid, controller), num)
    for t0, t1 in (
        ((0.0, 1.0), (1.0, 0.0)) if adaptive[case].backward else ((0.0, 1.0),)
    ):
        coarse, fine = (
            [np.asarray(x) for x in solve(*as_arrays(t0, t1, rtol))]
            for rtol in adaptive[case].rtols
        )
        errors = [root_mean_square(log_y - exact) for log_y, exact, _ in (coarse, fine)]
        log_y, _, rejected = fine
        assert np.mean(rejected) >= 1
        # The estimates of the error of a step say little of that of the solve, so these
        # bounds are of what was measured, 0.6 and 0.025 at most, with some room.
        assert errors[1] < 0.7 * errors[0]
        assert errors[1] < 0.03
        # The law of the last solve, in standard errors.
        normal = (log_y - rate * (t1 - t0)) / volatility
        assert abs(np.mean(normal)) < 5 / np.sqrt(num)
        assert abs(np.mean(normal**2) - 1) < 5 * np.sqrt(2 / num)


def test_adaptive_steps_in_float32():
    solve = batched(make_geometric("Heun", "dt", "clip", jnp.float32), 256)
    for times in ((0.0, 1.0), (1.0, 0.0)):
        args = as_arrays(*times, 1e-2, dtype=jnp.float32)
        log_y, exact, rejected = map(np.asarray, solve(*args))
        assert log_y.dtype == np.float32
        assert np.mean(rejected) >= 1
        assert root_mean_square(log_y - exact) < 0.03


def test_vmap_equals_a_loop():
    """Elements of a batch finish at different times."""
    num = 16

    # Not adaptive: rounding decides which steps are rejected.
    def solve(key, dt0):
        path = BrownianInterval(-0.3, 1.4, (), key, dt=0.07)
        terms = make_terms(
            lambda t, y, args: rate * y, lambda t, y, args: volatility * y, path
        )
        sol = diffrax.diffeqsolve(terms, diffrax.Heun(), 0.0, 1.0, dt0, 1.0)
        return sol.ys[0], sol.stats["num_steps"]

    steps = 1 / jnp.linspace(1, 40, num)
    in_batch = jax.jit(jax.vmap(solve))(keys(num), steps)
    looped = list(map(jax.jit(solve), keys(num), steps))
    y1, num_steps = map(np.stack, zip(*looped, strict=True))
    assert len(np.unique(num_steps)) == num
    np.testing.assert_array_equal(in_batch[1], num_steps)
    # Where times differ by rounding, the path differs by up to the root of that.
    np.testing.assert_allclose(in_batch[0], y1, rtol=1e-7)


@pytest.mark.parametrize(
    "case",
    (
        pytest.param("SRA1", marks=pytest.mark.slow),
        pytest.param("ShARK", marks=pytest.mark.slow),
        pytest.param("ALIGN", marks=pytest.mark.slow),
    ),
)
def test_adaptive_steps_tend_to_fixed_ones(case):
    """For the solvers of other SDEs: with a finer tolerance they come closer to the
    solution with many fixed steps.
    """
    problem = problems[cases[case].problem]

    def solve_one(key, start, end, dt, rtol):
        sol = diffrax.diffeqsolve(
            problem.terms(make_path(problem, key, start, end, dt)),
            cases[case].solver,
            0.0,
            1.0,
            0.5,
            jtu.tree_map(jnp.asarray, problem.y0),
            stepsize_controller=make_controller("clip", rtol),
        )
        ys = jnp.concatenate(jtu.tree_leaves(sol.ys), axis=-1)[0]
        return ys, sol.stats["num_rejected_steps"]

    batch = jax.vmap(solve_one, in_axes=(0, None, None, None, None))
    solve = jax.jit(lambda *args: batch(keys(128), *args))
    assert problem.reference is not None
    name, k = problem.reference
    expected = fixed_steps(name, "off the grid", k)[:, 0]
    coarse, fine = (
        [np.asarray(x) for x in solve(*as_arrays(*grids["off the grid"], rtol))]
        for rtol in (1e-2, 1e-4)
    )
    errors = [root_mean_square(ys - expected) for ys, _ in (coarse, fine)]
    assert np.any(fine[1] > 0)
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 1e-2
