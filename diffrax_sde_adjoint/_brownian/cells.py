"""Divisions of a time interval into cells.

Cells are numbered from the left, from zero; edge `i` is the left end of cell `i`. A
time becomes the number of an edge in one direction, and an edge a time in the other,
neither with a loop, as both are done in every step of a solve.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class AbstractCells(eqx.Module):
    """A division of `[edge(0), edge(count)]` into `count` cells, of which the shortest
    has length `shortest`.
    """

    count: eqx.AbstractVar[Int[Array, ""]]
    shortest: eqx.AbstractVar[Float[Array, ""]]

    @abc.abstractmethod
    def edge(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        """The time of edge `i`, for `i` in `0, ..., count`."""

    @abc.abstractmethod
    def length(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        """The length of cell `i`, more precisely than as a difference of edges."""

    @abc.abstractmethod
    def nearest_edge(self, t: Float[Array, "..."]) -> Int[Array, "..."]:
        """The number of the edge nearest to a time."""

    @abc.abstractmethod
    def cell_from(self, t: Float[Array, ""], tol: Float[Array, ""]) -> Int[Array, ""]:
        """The cell that holds a time; from an edge, which is what a time within `tol`
        of one is, this is the cell to its right, as it may be for a time that is
        somewhat further away.
        """


class OneCell(AbstractCells):
    """The whole interval."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    count: Int[Array, ""]
    shortest: Float[Array, ""]

    def __init__(self, t0: Float[Array, ""], t1: Float[Array, ""]):
        self.t0 = t0
        self.t1 = t1
        self.count = jnp.asarray(1, jnp.int32)
        self.shortest = t1 - t0

    def edge(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(i == 0, self.t0, self.t1)

    def length(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        return jnp.broadcast_to(self.t1 - self.t0, i.shape)

    def nearest_edge(self, t: Float[Array, "..."]) -> Int[Array, "..."]:
        return (t - self.t0 > self.t1 - t).astype(jnp.int32)

    def cell_from(self, t: Float[Array, ""], tol: Float[Array, ""]) -> Int[Array, ""]:
        return jnp.asarray(0, jnp.int32)


class ConstantStepCells(AbstractCells):
    """The steps of a forward solve with `diffrax.ConstantStepSize`.

    This rounds `dt` down such that a whole number of steps fits into the interval: all
    steps have length `(t1 - t0) / count`. Only the first one ends at `t0 + dt`
    nonetheless, which is elsewhere if `dt` did not divide the interval.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    dt: Float[Array, ""]
    count: Int[Array, ""]
    shortest: Float[Array, ""]

    def __init__(
        self, t0: Float[Array, ""], t1: Float[Array, ""], dt: Float[Array, ""]
    ):
        self.t0 = t0
        self.t1 = t1
        self.dt = dt
        # Just above `dt`, so that rounding in the quotient does not add a step.
        above_dt = jnp.nextafter(dt, jnp.inf)
        self.count = jnp.ceil((t1 - t0) / above_dt).astype(jnp.int32)
        # Only the first two can differ from the others.
        i = jnp.minimum(jnp.arange(3, dtype=jnp.int32), self.count - 1)
        self.shortest = jnp.min(self.length(i))

    def edge(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        fraction = i.astype(self.t0.dtype) / self.count.astype(self.t0.dtype)
        edge = self.t0 + (self.t1 - self.t0) * fraction
        edge = jnp.where(i == 1, self.t0 + self.dt, edge)
        return jnp.where(i == self.count, self.t1, edge)

    def length(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        even = (self.t1 - self.t0) / self.count.astype(self.t0.dtype)
        length = jnp.where(i == 0, self.dt, even)
        length = jnp.where(i == 1, even + (even - self.dt), length)
        return jnp.where(self.count == 1, self.t1 - self.t0, length)

    def nearest_edge(self, t: Float[Array, "..."]) -> Int[Array, "..."]:
        i = jnp.round((t - self.t0) * self._rate)
        i = jnp.clip(i.astype(jnp.int32), 0, self.count)
        # Edge 1 can lie anywhere between its even place and that of edge 2.
        one = jnp.ones_like(i)
        is_one = jnp.abs(t - self.edge(one)) < jnp.abs(t - self.edge(i))
        return jnp.where(is_one, one, i)

    def cell_from(self, t: Float[Array, ""], tol: Float[Array, ""]) -> Int[Array, ""]:
        # Not by comparing `t` to an edge, where there is a division: XLA would not fuse
        # it with all that depends on the cell.
        # Not less than the cell, with the rounding of the next two lines.
        from_start = t - self.t0 + 2 * tol
        i = jnp.floor(from_start * self._rate).astype(jnp.int32)
        i = jnp.where(i > 1, i, (from_start >= self.dt).astype(jnp.int32))
        return jnp.clip(i, 0, self.count)

    @property
    def _rate(self) -> Float[Array, ""]:
        # Does not depend on a time, so loops over queries evaluate it once.
        return self.count.astype(self.t0.dtype) / (self.t1 - self.t0)


class ListedCells(AbstractCells):
    """Cells with given, strictly increasing edges."""

    edges: Float[Array, " edges"]
    count: Int[Array, ""]
    shortest: Float[Array, ""]

    def __init__(self, edges: Float[Array, " edges"]):
        self.edges = edges
        self.count = jnp.asarray(len(edges) - 1, jnp.int32)
        self.shortest = jnp.min(jnp.diff(edges))

    def edge(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        return self.edges[i]

    def length(self, i: Int[Array, "..."]) -> Float[Array, "..."]:
        return self.edges[i + 1] - self.edges[i]

    def nearest_edge(self, t: Float[Array, "..."]) -> Int[Array, "..."]:
        i = jnp.searchsorted(self.edges, t, method="scan_unrolled").astype(jnp.int32)
        i = jnp.clip(i, 1, self.count)
        is_left = t - self.edges[i - 1] < self.edges[i] - t
        return jnp.where(is_left, i - 1, i)

    def cell_from(self, t: Float[Array, ""], tol: Float[Array, ""]) -> Int[Array, ""]:
        i = jnp.searchsorted(self.edges, t + tol, "right", method="scan_unrolled")
        return jnp.clip(i.astype(jnp.int32) - 1, 0, self.count)
