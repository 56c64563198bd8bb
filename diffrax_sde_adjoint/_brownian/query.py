"""Queries of a path that is cut into cells.

A query joins the part that it covers of the cell it starts in, the cells between, and
the part of the cell it ends in. If both are one cell, it is a part of that.

A simple query is one of the intervals that halving a cell makes, which may be the cell
itself, or several whole cells. It draws only what it is made of, one after the other.
Any other query draws what is around each of its ends, all at once (`refine.py`). Which
of the two is used does not change values, but for rounding.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt32

from .._misc import zeros_like
from . import increments, refine
from .cells import AbstractCells, OneCell
from .draws import Rows, at_least_single, combine, draw as draw_normal
from .increments import Increment


T = TypeVar("T")


class Source(NamedTuple):
    """What a path is made from."""

    key: Key[Array, ""]
    cells: AbstractCells
    levels: int
    # The `num` components of an increment, stacked along the first axis.
    like: PyTree[jax.ShapeDtypeStruct]
    num: int
    # Which rows of a batch are drawn, along the second axis; all, if it is `None`.
    rows: Rows | None


def draw_cell(source: Source, i: Int[Array, ""], dt: Float[Array, ""]) -> Increment:
    """Cell `i` as a whole, of length `dt`."""
    key = jr.fold_in(source.key, i)
    return increments.sample(key, at_least_single(dt), source.like, source.rows)


def value_at_end(source: Source) -> PyTree[Array]:
    """What the path adds over all of its cells; in single precision at least."""
    cells = source.cells
    get_w = lambda i: jtu.tree_map(
        lambda x: x[0], draw_cell(source, i, cells.length(i)).components
    )
    add = lambda i, w: jtu.tree_map(jnp.add, w, get_w(i))
    first = get_w(jnp.zeros_like(cells.count))
    return lax.fori_loop(jnp.ones_like(cells.count), cells.count, add, first)


def any_query(
    source: Source,
    drawn_cell: Int[Array, ""],
    drawn: Increment | None,
    ts: Float[Array, " ends=2"],
    tol: Float[Array, ""],
) -> Increment:
    """The increment from `ts[0]` to `ts[1]`, of which the latter may be smaller. A time
    within `tol` of an edge, or of a dyadic point of a cell, is that edge or point. What
    was `drawn` is `drawn_cell`, in which the query most likely starts.
    """
    cells = source.cells
    is_reversed = ts[0] > ts[1]
    ts = jnp.sort(ts)
    cell, ends = _locate(cells, ts, tol, source.levels)
    interval = refine.interval_between(ends, source.levels)
    is_simple = (interval == 1) | ((cell[0] == cell[1]) & (interval > 0))
    if drawn is not None:
        is_simple = is_simple & (cell[0] == drawn_cell)
    draw = lambda i: draw_cell(source, i, cells.length(i))

    # In a batch, both are run for each element if any needs them. So that this takes no
    # longer than for those, there are no cells to join for the others.
    def join_until(stop, is_used, inc):
        if isinstance(cells, OneCell):
            return inc
        join = lambda i, x: increments.join(x, draw(i))
        return lax.fori_loop(cell[0] + 1, jnp.where(is_used, stop, 0), join, inc)

    def simple(inc):
        inc = draw(cell[0]) if drawn is None else inc
        inc = _halve_until(source, cell[0], interval, inc)
        return join_until(cell[1] + 1, is_simple, inc)

    def general(inc):
        # As in `interval.py`, not to be moved out of the loop.
        here, at, _ = lax.optimization_barrier((cell, ends, inc))
        first, last = _parts(source, here, at)
        if isinstance(cells, OneCell):
            return first
        return increments.join(join_until(cell[1], ~is_simple, first), last)

    inc = zeros_like(jax.eval_shape(draw, cell[0])) if drawn is None else drawn
    inc = run_if(is_simple, simple, inc)
    inc = run_if(~is_simple, general, inc)
    return increments.reverse_if(is_reversed, inc)


def run_if(pred: Bool[Array, ""], function: Callable[[T], T], x: T) -> T:
    """`function(x)` if `pred`, else `x`.

    This is a loop of at most one iteration: XLA runs it faster than a conditional, and
    in a batch it is entered only if an element needs it.
    """
    body = lambda val: (jnp.zeros_like(val[0]), function(val[1]))
    return lax.while_loop(lambda val: val[0], body, (pred, x))[1]


def _halve_until(
    source: Source, cell: Int[Array, ""], interval: Int[Array, ""], inc: Increment
) -> Increment:
    """The increment over an interval that halving a cell makes, from that of the cell:
    this goes to the half that holds the interval, until it is the interval.
    """
    # The position of the leading bit is how often a cell is halved.
    depth = 31 - lax.clz(interval)

    def halve(i, inc):
        whole, half = interval >> (depth - i), interval >> (depth - i - 1)
        of_inside = jr.fold_in(source.key, _inside(cell))
        key = jr.fold_in(of_inside, whole)
        numbers = draw_normal(key, source.like, source.rows)
        return increments.halve(inc, numbers, half % 2 == 1)

    return lax.fori_loop(0, depth, halve, inc)


def _parts(
    source: Source, cell: Int[Array, " ends=2"], ends: refine.Point
) -> tuple[Increment, Increment]:
    """The parts of a query in the cells that it starts and ends in. If this is one
    cell, then the second part is empty.
    """
    in_one_cell = cell[0] == cell[1]
    widths, coefs = refine.coefficients(ends, in_one_cell, source.levels, source.num)
    lengths = at_least_single(source.cells.length(cell))
    scale = jnp.sqrt(lengths)
    coefs_of_ends = [[x[i] * scale[i] for x in coefs] for i in (0, 1)]
    # With cells, most queries are for one of them.
    is_rare = not isinstance(source.cells, OneCell)
    keys = _keys(source, cell, ends)
    around = combine(keys, coefs_of_ends, source.like, source.rows, is_rare)
    first, last = (
        Increment(dt, x) for dt, x in zip(widths * lengths, around, strict=True)
    )
    components = jtu.tree_map(jnp.add, first.components, last.components)
    whole = Increment(first.dt, components)
    select = lambda x, y: jnp.where(in_one_cell, x, y)
    first = jtu.tree_map(select, whole, first)
    last = jtu.tree_map(select, zeros_like(last), last)
    return first, last


def _locate(
    cells: AbstractCells,
    ts: Float[Array, " ends=2"],
    tol: Float[Array, ""],
    levels: int,
) -> tuple[Int[Array, " ends=2"], refine.Point]:
    """The cells that a query starts and ends in, and where in them."""
    edge = cells.nearest_edge(ts)
    from_edge = ts - cells.edge(edge)
    is_edge = jnp.abs(from_edge) <= tol
    first_cell = jnp.where(from_edge[0] >= -tol, edge[0], edge[0] - 1)
    first_cell = jnp.clip(first_cell, 0, cells.count - 1)
    # At an edge, a query ends in the cell before; but not before it starts.
    is_after = ~is_edge[1] & (from_edge[1] >= 0)
    last_cell = jnp.where(is_after, edge[1], edge[1] - 1)
    last_cell = jnp.clip(last_cell, first_cell, cells.count - 1)
    cell = jnp.stack([first_cell, last_cell])
    # If XLA knows the number of cells, it multiplies by its rounded reciprocal instead
    # of dividing, and edges are off by a unit of rounding.
    unknown_cells = lax.optimization_barrier(cells)
    point = refine.locate(unknown_cells, cell, ts, levels)
    point = refine.snap(point, cells.length(cell), tol, levels)
    dtype = point.place.dtype
    point_of_edge = refine.where(
        edge == cell, refine.start_of_cell(dtype), refine.end_of_cell(levels, dtype)
    )
    return cell, refine.where(is_edge, point_of_edge, point)


def _inside(cell: Int[Array, "..."]) -> UInt32[Array, "..."]:
    """What is folded in for the inside of a cell: more than for any cell as a whole."""
    return cell.astype(jnp.uint32) + np.uint32(2**31)


def _keys(
    source: Source, cell: Int[Array, " ends=2"], ends: refine.Point
) -> list[Key[Array, " rows"]]:
    """For each end, the keys of its cell and of the intervals around it."""
    data = jnp.stack([cell.astype(jnp.uint32), _inside(cell)])
    of_cell, of_inside = jax.vmap(jax.vmap(lambda x: jr.fold_in(source.key, x)))(data)
    fold_in_all = jax.vmap(jr.fold_in, in_axes=(None, 0))
    ids = refine.intervals_around(ends, source.levels)
    return [
        jnp.concatenate([of_cell[i, None], fold_in_all(of_inside[i], ids[i])])
        for i in (0, 1)
    ]
