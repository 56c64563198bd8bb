"""Whether the steps of a solve are drawn at the cost of a draw, as far as this can be
told before the solve is run.
"""

import math
import warnings

import diffrax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Float, PyTree

from .._compat import RealScalarLike, WrapTerm, direction_of, known_value
from .cells import ListedCells
from .interval import BrownianInterval


# How far from an edge a time counts as rounded, as a part of a cell.
_tolerance = 1e-3
# The first steps are looked at: the others are like them, or there is nothing to gain.
_num_steps = 100
# So many cells in a step are for comparing step sizes on one path, and no mistake.
_max_cells = 16


def warn_of_costly_steps(
    terms: PyTree[diffrax.AbstractTerm],
    controller: diffrax.AbstractStepSizeController,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
) -> None:
    """Warns if the steps of a solve are known now, and are neither cells of a
    [`diffrax_sde_adjoint.BrownianInterval`][], nor several of them, nor dyadic parts.

    `terms`, `t0`, `t1` and `dt0` are those of an adjoint, where the solve is forward in
    time whatever its direction.
    """
    is_term = lambda x: isinstance(x, WrapTerm)
    for term in filter(is_term, jtu.tree_leaves(terms, is_leaf=is_term)):
        path = getattr(term.term, "control", None)
        if not isinstance(path, BrownianInterval) or path._known.numbers is None:
            continue
        given = (direction_of(term), t0, t1, 0.0 if dt0 is None else dt0)
        known = [known_value(x) for x in given]
        if any(x is None for x in known):
            continue
        sign, start, end, first = map(float, known)  # pyright: ignore[reportArgumentType]
        if type(controller) is diffrax.ConstantStepSize:
            if 0 < first <= end - start < math.inf:
                times = np.sort(sign * _step_times(start, end, first))
                _warn_of_constant_steps(path, times)
        elif type(controller) is diffrax.StepTo:
            _warn_of_listed_steps(path, len(controller.ts) - 1, end - start)


def _step_times(start: float, end: float, first: float) -> Float[np.ndarray, " times"]:
    """The times between the first steps of constant size."""
    num = _count(end - start, first)
    i = np.arange(min(num, _num_steps) + 1)
    times = start + (end - start) * i / num
    times[1] = start + first if num > 1 else end
    return times


def _count(length: float, dt: float) -> int:
    """The number of constant steps; a quotient that is rounded up does not add one."""
    return math.ceil(length / dt * (1 - 1e-6))


def _warn_of_constant_steps(
    path: BrownianInterval, times: Float[np.ndarray, " times"]
) -> None:
    if isinstance(path._cells, ListedCells):
        return
    start, end, dt = path._known.numbers
    size = f"{np.median(np.diff(times)):.6g}"
    if dt is None:
        if not _are_dyadic(times, start, end - start, path.levels):
            _warn(
                f"`BrownianInterval(...)` without `dt` is made for adaptive steps, "
                f"but the steps are constant, of {size}",
                path,
                "Pass `BrownianInterval(..., dt=dt0)`, with `dt0` of the solve.",
            )
        return
    cell = (end - start) / _count(end - start, dt)
    edges = start + cell * np.round((times - start) / cell)
    distances = np.minimum(np.abs(times - edges), np.abs(times - (start + dt)))
    are_edges = np.all(distances < _tolerance * cell)
    num_cells = round(float(np.max(np.diff(times))) / cell)
    if are_edges and num_cells > _max_cells:
        warnings.warn(
            f"Each step of the solve, of {size}, draws the {num_cells} cells of "
            f"`BrownianInterval(..., dt={dt:.6g})` in it. Pass `dt=dt0`, with `dt0` of "
            "the solve, unless this is to be the path of a solve with smaller steps.",
            stacklevel=2,
        )
    if not (are_edges or _are_dyadic(times, start, cell, path.levels)):
        way_out = "Pass `dt=dt0`, with `dt0` of the solve."
        if np.any(np.abs(np.diff(times) - dt) < _tolerance * dt):
            way_out = (
                "The steps start elsewhere, or go backwards in time and `dt` does not "
                "divide the interval: let them begin and end where cells do."
            )
        _warn(
            f"`BrownianInterval(..., dt={dt:.6g})` is not made for the steps of the "
            f"solve, which are of {size}",
            path,
            way_out,
        )


def _warn_of_listed_steps(
    path: BrownianInterval, num_steps: int, length: float
) -> None:
    start, end, dt = path._known.numbers
    if abs(length - (end - start)) > _tolerance * length:
        return
    num_cells = 1 if dt is None else _count(end - start, dt)
    if isinstance(path._cells, ListedCells):
        num_cells = len(path._cells.edges) - 1
    is_part = num_steps % num_cells == 0 and math.log2(num_steps / num_cells) % 1 == 0
    if num_cells % num_steps != 0 and not is_part:
        _warn(
            f"`StepTo(ts=...)` makes {num_steps} steps, but the path has {num_cells} "
            f"cell{'s' if num_cells > 1 else ''}, which are not these steps",
            path,
            "Pass `BrownianInterval(..., ts=ts)`, with the same times.",
        )


def _are_dyadic(
    times: Float[np.ndarray, " times"], start: float, cell: float, levels: int
) -> bool:
    """Whether steps are halves, quarters, ... of cells of equal length."""
    position = (times - start) / cell
    length = np.diff(position)
    depth = np.round(-np.log2(length))
    begin = position[:-1] * 2.0**depth
    return bool(
        np.all((depth >= 0) & (depth <= levels))
        and np.all(np.abs(length * 2.0**depth - 1) < _tolerance)
        and np.all(np.abs(begin - np.round(begin)) < _tolerance)
    )


def _warn(what: str, path: BrownianInterval, way_out: str) -> None:
    warnings.warn(
        f"{what}. So each step draws {2 * (path.levels + 2)} times the numbers of one "
        f"cell. {way_out}",
        stacklevel=2,
    )
