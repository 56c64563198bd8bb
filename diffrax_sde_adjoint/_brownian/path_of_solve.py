"""Paths as a solve sees them: its range is checked once, before its first step, and not
in each of them. On an accelerator, a check would be a way out to the host in each step.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._compat import RealScalarLike, WrapTerm, Y, direction_of, known_value
from .arguments import time_dtype
from .interval import BrownianInterval, QueryKind


class PathOfSolve(diffrax.AbstractBrownianPath):
    """A path whose queries are known to be of one `kind`: there is NaN for another one,
    and no error. If it is `on_cells`, the steps of the solve are its cells.
    """

    path: BrownianInterval
    on_cells: bool = eqx.field(static=True)
    kind: QueryKind = eqx.field(static=True)

    def __init__(
        self, path: BrownianInterval, on_cells: bool, kind: QueryKind = "within"
    ):
        self.path = path
        self.on_cells = on_cells
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        # Terms may look at what the path is made of.
        if name == "path":
            raise AttributeError(name)
        return getattr(self.path, name)

    @property
    def t0(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.path.t0

    @property
    def t1(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.path.t1

    @property
    def levy_area(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.path.levy_area

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        del left
        return self.path._query(t0, t1, use_levy, self.kind)


def with_paths_of_solve(
    terms: PyTree[diffrax.AbstractTerm],
    y: Y,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    *,
    has_planned_steps: bool,
    goes_to_end: bool,
) -> tuple[PyTree[diffrax.AbstractTerm], Y]:
    """`terms`, each path of which is that of a solve, if its increments are all that
    the term is driven by; and `y`, with an error if one of them does not hold the whole
    interval of a solve that `goes_to_end`.

    `t0`, `t1` and `dt0` are those of an adjoint, where the solve is forward in time
    whatever its direction. It `has_planned_steps` if it is known that these are as
    many, and as long, as for a new `diffrax.ConstantStepSize`.
    """
    times = [known_value(x) for x in (t0, t1, dt0)] if has_planned_steps else None

    def with_path(term: Any) -> Any:
        nonlocal y
        if not (is_term(term) and _has_path(term.term)):
            return term
        path, direction = term.term.control, direction_of(term)
        # These hold the interval, as they begin and end with it.
        on_cells = times is not None and _are_cells(path, direction, times)
        if not (on_cells or goes_to_end):
            return term
        if not on_cells:
            y = _checked(y, path, direction, t0, t1)
        return eqx.tree_at(lambda x: x.term.control, term, PathOfSolve(path, on_cells))

    is_term = lambda x: isinstance(x, WrapTerm)
    return jtu.tree_map(with_path, terms, is_leaf=is_term), y


def _is_on_cells(x: Any) -> bool:
    return isinstance(x, PathOfSolve) and x.on_cells


def has_steps_on_cells(terms: PyTree[diffrax.AbstractTerm]) -> bool:
    leaves = jtu.tree_leaves(terms, is_leaf=_is_on_cells)
    return any(map(_is_on_cells, leaves))


def of_whole_steps(term: diffrax.AbstractTerm) -> diffrax.AbstractTerm:
    """`term`, for queries of a whole step each."""
    change = lambda x: PathOfSolve(x.path, True, "cell") if _is_on_cells(x) else x
    return jtu.tree_map(change, term, is_leaf=_is_on_cells)


def _has_path(term: Any) -> bool:
    """Whether the control of a term is a path, and nothing else."""
    return (
        isinstance(term, diffrax.ControlTerm)
        and type(term).contr is diffrax.ControlTerm.contr
        and isinstance(term.control, BrownianInterval)
    )


def _are_cells(
    path: BrownianInterval, direction: Any, times: list[np.ndarray | None]
) -> bool:
    """Whether it is known that steps from `t0` to `t1` of `dt0` are the cells of a
    path: they are made of the same three numbers, by the same formula.
    """
    sign, constants = known_value(direction), path._constants
    if constants is None or sign is None or sign != 1:
        return False
    is_equal = lambda x, y: x is not None and x.dtype == path.t0.dtype and x == y
    return all(map(is_equal, times, constants))


def _checked(
    x: Y,
    path: BrownianInterval,
    direction: Any,
    t0: RealScalarLike,
    t1: RealScalarLike,
) -> Y:
    """`x`, with an error if a solve is not within the path."""
    start, end = (jnp.asarray(t, path.t0.dtype) for t in (t0, t1))
    ts = jnp.where(direction == 1, jnp.stack([start, end]), -jnp.stack([end, start]))
    tol = path._tolerance((path.t0.dtype, time_dtype(t0, t1)))
    # A solve of no length is at one time only, where the increment is zero.
    is_within = path._is_within(ts, tol) | (start == end)
    return path._error_unless(x, is_within, ts)
