"""Values inside a cell.

A cell is halved again and again, `levels` times. What is new at each split is a
combination of normal numbers that are drawn from a key of the interval that is split
(`increments.py`), and adds up to zero over it. The last intervals, the *leaves*, are
split at the points that are asked for (`leaf_bridge.py`). So the increment over a part
of a cell is linear in the normal numbers of the cell, of the intervals that hold an end
of the part strictly inside, one on each level, and of the leaf that holds it.

Which intervals these are, and the coefficients, depend on the ends only. They are found
for all levels at once, without a search. What each interval contributes is the integral
of its own white noise over the query, so a short query is not the difference of two
large values.
"""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .cells import AbstractCells
from .double_word import divide_differences
from .draws import at_least_single
from .increments import embed, halves, restrict, stds
from .leaf_bridge import bridge


# The points that halving makes and that times near them are taken for are at least this
# many tolerances apart, so that few times are mistaken for one. As this is not a power
# of two, which points these are is not up to rounding.
_spacing = 100


class Point(eqx.Module):
    """A place in a cell, `leaf + place` leaves after its start, where `place` is from 0
    to 1. The end of a cell is the end of its last leaf. One floating-point number would
    not be precise enough for short queries in a cell of many levels.
    """

    leaf: Int[Array, "..."]
    place: Float[Array, "..."]

    def __sub__(self, other: "Point") -> Float[Array, "..."]:
        """The distance of two points, in leaves."""
        leaves = (self.leaf - other.leaf).astype(self.place.dtype)
        return leaves + (self.place - other.place)


def locate(
    cells: AbstractCells, cell: Int[Array, "..."], t: Float[Array, "..."], levels: int
) -> Point:
    """Where in a cell a time is; at its ends, for times outside of it."""
    ts = (t, cells.edge(cell), cells.edge(cell + 1))
    quotient, remainder = divide_differences(*map(at_least_single, ts))
    num_leaves = 2**levels
    scaled = quotient * num_leaves
    whole = jnp.floor(scaled)
    place = (scaled - whole) + remainder * num_leaves
    # The remainder may lead to another leaf.
    carry = jnp.floor(place)
    leaf = whole.astype(jnp.int32) + carry.astype(jnp.int32)
    place = jnp.where(leaf < 0, 0, jnp.where(leaf < num_leaves, place - carry, 1))
    return Point(jnp.clip(leaf, 0, num_leaves - 1), place)


def snap(
    point: Point, length: Float[Array, "..."], tol: Float[Array, ""], levels: int
) -> Point:
    """The dyadic point within `tol` of a point, in a cell of the given length; or, if
    there is none, the point.
    """
    tol_in_leaves = at_least_single(tol / length) * 2**levels
    # The dyadic points are a power of two leaves apart: the next one above this.
    _, exponent = jnp.frexp(_spacing * tol_in_leaves)
    shift = jnp.clip(exponent, 0, levels)
    leaf = (point.leaf >> shift) << shift
    start_of_leaf = lambda leaf: Point(leaf, jnp.zeros_like(point.place))
    before, after = start_of_leaf(leaf), start_of_leaf(leaf + (1 << shift))
    nearest = where(point - before < after - point, before, after)
    # Cells meet at edges, which are not for one of them to tell.
    is_inside = (nearest.leaf > 0) & (nearest.leaf < 2**levels)
    is_near = is_inside & (jnp.abs(point - nearest) <= tol_in_leaves)
    return where(is_near, nearest, point)


def interval_between(ends: Point, levels: int) -> Int[Array, ""]:
    """The number, as in `intervals_around`, of the interval between two points: one for
    the whole cell, zero if halving never makes such an interval.
    """
    edge = jnp.where(ends.place == 1, ends.leaf + 1, ends.leaf)
    is_edge = (ends.place == 0) | (ends.place == 1)
    size = edge[1] - edge[0]
    # A power of two that divides both ends.
    is_interval = (size > 0) & ((size | edge[0]) & (size - 1) == 0)
    interval = (edge[0] + 2**levels) >> lax.population_count(size - 1)
    return jnp.where(jnp.all(is_edge) & is_interval, interval, 0)


def where(pred: Bool[ArrayLike, "..."], x: Point, y: Point) -> Point:
    return Point(jnp.where(pred, x.leaf, y.leaf), jnp.where(pred, x.place, y.place))


def start_of_cell(dtype: jnp.dtype) -> Point:
    return Point(jnp.zeros((), jnp.int32), jnp.zeros((), dtype))


def end_of_cell(levels: int, dtype: jnp.dtype) -> Point:
    return Point(jnp.asarray(2**levels - 1, jnp.int32), jnp.ones((), dtype))


def intervals_around(
    point: Point, levels: int
) -> Int[Array, "*points levels_and_leaf"]:
    """The numbers, unique in the cell, of the intervals that hold a point: from the
    whole cell, where it is first split, to the leaf.
    """
    shift = np.arange(levels, -1, -1, dtype=np.int32)
    return (point.leaf[..., None] + 2**levels) >> shift


def coefficients(
    ends: Point, in_one_cell: Bool[Array, ""], levels: int, num: int
) -> tuple[Float[Array, " ends=2"], list[Float[Array, "ends=2 rows num"]]]:
    """A query from `ends[0]` in one cell to `ends[1]`, in the same or in a later one.

    Returns the widths, in units of the cell, of the parts of it in the two cells; and
    for cells of length one the components of these parts, as coefficients of the normal
    numbers (last axis) of the cell and of the `intervals_around` the end (middle axis).
    In one cell, there is only one part; its components are the sums of what is around
    both ends, and what is around both counts for the first.
    """
    dtype = ends.place.dtype
    is_first = np.array([True, False])
    first, last = (Point(ends.leaf[i], ends.place[i]) for i in (0, 1))
    upper = where(is_first & ~in_one_cell, end_of_cell(levels, dtype), last)
    lower = where(is_first | in_one_cell, first, start_of_cell(dtype))
    around = _around(ends, lower, upper, levels, num)
    ids = intervals_around(ends, levels)
    is_new = jnp.concatenate([jnp.zeros(1, bool), ids[0] != ids[1]])
    is_counted = is_first[:, None] | ~in_one_cell | is_new
    width = jnp.maximum(upper - lower, 0) / 2**levels
    return width, [jnp.where(is_counted[..., None], x, 0) for x in around]


def _around(
    point: Point, lower: Point, upper: Point, levels: int, num: int
) -> list[Float[Array, "points rows num"]]:
    """The components over the part `[lower, upper]` of a cell of length one, as far as
    they come from the cell and the intervals around a point.
    """
    dtype = point.place.dtype
    width = upper - lower
    # Of an empty part everything is zero.
    scale = jnp.where(width > 0, 1 / jnp.where(width > 0, width, 1), 0)

    # The halves of each interval that is split: axes are points, intervals, halves.
    # What is known of the cell before all splits goes before them, as if the cell were
    # the left half of an interval.
    exponent = np.arange(levels, -1, -1, dtype=np.int32)[:, None]
    size = 2**exponent
    each = lambda x: jtu.tree_map(lambda y: y[..., None, None], x)
    begin = (each(point).leaf >> (exponent + 1)) << (exponent + 1)
    begin = begin + size * np.array([0, 1], np.int32)
    half_lower = Point(begin, jnp.zeros(begin.shape, dtype))
    half_upper = Point(begin + size, jnp.zeros(begin.shape, dtype))
    known = np.stack([np.diag(stds[:num]), np.zeros((num, num))])[None]
    new = halves(num) * 2.0 ** (-0.5 * np.arange(levels)).reshape(-1, 1, 1, 1)
    means = jnp.asarray(np.concatenate([known, new]), dtype)

    piece_lower = where(each(lower).leaf >= begin, each(lower), half_lower)
    piece_upper = where(each(upper).leaf < begin + size, each(upper), half_upper)
    length = jnp.maximum(piece_upper - piece_lower, 0)
    mid_in_half = (piece_lower - half_lower) + length / 2
    mid_in_part = (piece_lower - each(lower)) + length / 2
    length, mid_in_half, mid_in_part = (
        x[..., None] for x in (length, mid_in_half, mid_in_part)
    )
    unit = jnp.asarray(1 / size, dtype)[..., None]
    in_part = scale[:, None, None, None]
    of_halves = embed(
        restrict(
            [means[:, :, i] for i in range(num)], mid_in_half * unit, length * unit
        ),
        mid_in_part * in_part,
        length * in_part,
    )

    # The leaf of the point.
    a = jnp.where(lower.leaf == point.leaf, lower.place, 0)
    b = jnp.where(upper.leaf == point.leaf, upper.place, 1)
    mid_in_part = (Point(point.leaf, a) - lower) + (b - a) / 2
    of_leaf = embed(
        [2 ** (-0.5 * levels) * x for x in bridge(a, b, num)],
        (mid_in_part * scale)[:, None],
        ((b - a) * scale)[:, None],
    )

    return [
        jnp.concatenate([jnp.sum(x, axis=2), y[:, None]], axis=1)
        for x, y in zip(of_halves, of_leaf, strict=True)
    ]
