"""Whether the steps of a solve are drawn at the cost of a draw, as far as this can be
told before the solve is run.
"""

import math
import warnings
from typing import Any

import diffrax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Float, PyTree

from .._compat import (
    IntScalarLike,
    RealScalarLike,
    WrapTerm,
    direction_of,
    known_value,
)
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
    for term in jtu.tree_leaves(terms, is_leaf=is_term):
        if not is_term(term):
            continue
        path = getattr(term.term, "control", None)
        if not isinstance(path, BrownianInterval):
            continue
        times = _step_times(controller, direction_of(term), t0, t1, dt0)
        if times is not None:
            _warn_of_constant_steps(path, times)
        elif type(controller) is diffrax.StepTo:
            _warn_of_listed_steps(path, len(controller.ts) - 1, t0, t1)


def _step_times(
    controller: diffrax.AbstractStepSizeController,
    direction: IntScalarLike,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
) -> Float[np.ndarray, " times"] | None:
    """The times between the first steps of constant size, in increasing order; `None`
    if they are not known.
    """
    if type(controller) is not diffrax.ConstantStepSize or dt0 is None:
        return None
    values = [known_value(x) for x in (direction, t0, t1, dt0)]
    if any(x is None for x in values):
        return None
    sign, start, end, first = map(float, values)  # pyright: ignore[reportArgumentType]
    if not 0 < first <= end - start < math.inf:
        return None
    num = math.ceil((end - start) / first * (1 - 1e-6))
    i = np.arange(min(num, _num_steps) + 1)
    times = start + (end - start) * i / num
    times[1] = start + first if num > 1 else end
    return np.sort(sign * times)


def _warn_of_constant_steps(path: BrownianInterval, times: Any) -> None:
    known = path._known.numbers
    if known is None:
        return
    start, end, dt = known
    if dt is None:
        if not isinstance(path._cells, ListedCells):
            if not _are_dyadic(times, start, end - start, path.levels):
                _warn(
                    f"`BrownianInterval(...)` without `dt` is made for adaptive steps, "
                    f"but the steps are constant, of {np.median(np.diff(times)):.6g}",
                    path,
                    "Pass `BrownianInterval(..., dt=dt0)`, with `dt0` of the solve.",
                )
        return
    num = max(1, math.ceil((end - start) / dt * (1 - 1e-6)))
    cell = (end - start) / num
    edges = start + cell * np.round((times - start) / cell)
    distances = np.minimum(np.abs(times - edges), np.abs(times - (start + dt)))
    are_edges = np.all(distances < _tolerance * cell)
    num_cells = round(float(np.max(np.diff(times))) / cell)
    if are_edges and num_cells > _max_cells:
        warnings.warn(
            f"Each step of the solve, of {np.median(np.diff(times)):.6g}, draws the "
            f"{num_cells} cells of `BrownianInterval(..., dt={dt:.6g})` in it. Pass "
            "`dt=dt0`, with `dt0` of the solve, unless this is to be the path of a "
            "solve with smaller steps.",
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
            f"solve, which are of {np.median(np.diff(times)):.6g}",
            path,
            way_out,
        )


def _warn_of_listed_steps(
    path: BrownianInterval, num_steps: int, t0: RealScalarLike, t1: RealScalarLike
) -> None:
    known = path._known.numbers
    ends = [known_value(x) for x in (t0, t1)]
    if known is None or any(x is None for x in ends):
        return
    start, end, dt = known
    length = abs(float(ends[1]) - float(ends[0]))  # pyright: ignore[reportArgumentType]
    if abs(length - (end - start)) > _tolerance * length:
        return
    if isinstance(path._cells, ListedCells):
        num_cells = len(path._cells.edges) - 1
    elif dt is not None:
        num_cells = math.ceil((end - start) / dt * (1 - 1e-6))
    else:
        num_cells = 1
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
