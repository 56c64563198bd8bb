"""Queries of a path that is cut into cells.

A query joins the part that it covers of the cell it starts in, the cells between, and
the part of the cell it ends in. If it starts and ends in the same cell, it is a part of
that.
"""

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from . import increments, refine
from .cells import AbstractCells, OneCell
from .draws import at_least_single, combine
from .increments import Increment


def draw_cell(
    key: Key[Array, ""],
    cells: AbstractCells,
    i: Int[Array, ""],
    shape: PyTree[jax.ShapeDtypeStruct],
    num: int,
) -> Increment:
    """Cell `i` as a whole."""
    dt = at_least_single(cells.length(i))
    return increments.sample(jr.fold_in(key, i), dt, shape, num)


def any_query(
    key: Key[Array, ""],
    cells: AbstractCells,
    ts: Float[Array, " ends=2"],
    tol: Float[Array, ""],
    levels: int,
    shape: PyTree[jax.ShapeDtypeStruct],
    num: int,
) -> Increment:
    """From `ts[0]` to `ts[1]`, in which a time within `tol` of an edge is that edge."""
    cell, ends = _locate(cells, ts, tol, levels)
    in_one_cell = cell[0] == cell[1]
    widths, coefs = refine.coefficients(ends, in_one_cell, levels, num)
    lengths = at_least_single(cells.length(cell))
    scale = jnp.sqrt(lengths)
    coefs_of_ends = [[x[i] * scale[i] for x in coefs] for i in (0, 1)]
    # With cells, most queries are for one of them.
    is_rare = not isinstance(cells, OneCell)
    around = combine(_keys(key, cell, ends, levels), coefs_of_ends, shape, is_rare)
    first, last = (
        Increment(dt, x) for dt, x in zip(widths * lengths, around, strict=True)
    )

    components = jtu.tree_map(jnp.add, first.components, last.components)
    whole = Increment(first.dt, components)
    if isinstance(cells, OneCell):
        return whole
    select = lambda x, y: jnp.where(in_one_cell, x, y)
    first = jtu.tree_map(select, whole, first)
    last = jtu.tree_map(select, jtu.tree_map(jnp.zeros_like, last), last)
    # The only loop: over the cells between, of which there are none most often.
    first = lax.fori_loop(
        cell[0] + 1,
        cell[1],
        lambda i, inc: increments.join(inc, draw_cell(key, cells, i, shape, num)),
        first,
    )
    return increments.join(first, last)


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
    # From an edge, a query starts in the cell after, and ends in the one before.
    is_after = jnp.where(is_edge, np.array([True, False]), from_edge >= 0)
    cell = jnp.where(is_after, edge, edge - 1)
    # From an edge to itself, it would end before it starts.
    cell = jnp.stack([cell[0], jnp.maximum(cell[0], cell[1])])
    cell = jnp.clip(cell, 0, cells.count - 1)
    # If XLA knows the number of cells, it multiplies by its rounded reciprocal instead
    # of dividing, and edges are off by a unit of rounding.
    unknown_cells = lax.optimization_barrier(cells)
    point = refine.locate(unknown_cells, cell, ts, levels)
    dtype = point.place.dtype
    point_of_edge = refine.where(
        edge == cell, refine.start_of_cell(dtype), refine.end_of_cell(levels, dtype)
    )
    return cell, refine.where(is_edge, point_of_edge, point)


def _keys(
    key: Key[Array, ""],
    cell: Int[Array, " ends=2"],
    ends: refine.Point,
    levels: int,
) -> list[Key[Array, " rows"]]:
    """For each end, the keys of its cell and of the intervals around it."""
    # What is folded in for cells as a whole is less than this.
    data = jnp.stack([cell, cell]).astype(jnp.uint32)
    data = data + np.array([[0], [2**31]], np.uint32)
    of_cell, of_inside = jax.vmap(jax.vmap(lambda x: jr.fold_in(key, x)))(data)
    fold_in_all = jax.vmap(jr.fold_in, in_axes=(None, 0))
    ids = refine.intervals_around(ends, levels)
    return [
        jnp.concatenate([of_cell[i, None], fold_in_all(of_inside[i], ids[i])])
        for i in (0, 1)
    ]
