"""Brownian motion, drawn by the cell.

The interval is divided into cells, and the increment over cell `i` is drawn from a key
of its own, the `i`-th one folded from the path's key. As increments over disjoint
intervals are independent, that is all there is to a path known at the edges of its
cells: the increment over a union of cells is the join of theirs. Nothing is stored, and
every value can be drawn again in any order.

A step of a solver with fixed steps is one cell, if the cells are its steps. The query
of one cell is one draw; the loop that is there for all others is not entered.
"""

from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree, Real

from .._compat import RealScalarLike, nondifferentiable
from .._errors import error_if
from . import increments
from .cells import AbstractCells, ConstantStepCells, ListedCells


# A time within this many units of rounding of an edge is that edge: steps are computed
# in a few roundings, from either end of the interval.
_ULPS = 4


class BrownianInterval(diffrax.AbstractBrownianPath):
    """Exact Brownian motion over an interval, for the cost of drawing it.

    The interval `[t0, t1]` is cut into cells. A query of one cell is one draw of normal
    numbers; with cells that are the steps of a solve, this is the cost of each step,
    forwards and again when the solve is undone. Nothing is stored.

    For given constructor arguments, `evaluate` is a pure function of its arguments: it
    does not depend on the order of queries, on `jit` or `vmap`, on the direction of the
    solve, or on what differentiates it.

    For the time being, each query has to be a union of cells. In a solve, that means
    passing the step size `dt=dt0` of [`diffrax.ConstantStepSize`][], or the times `ts`
    of [`diffrax.StepTo`][], to this too:

    ```python
    path = BrownianInterval(t0, t1, shape=(3,), key=key, dt=dt0)
    terms = MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))
    diffeqsolve(terms, ReversibleHeun(), t0, t1, dt0, y0)
    ```

    !!! info "Steps that do not divide the interval"

        [`diffrax.ConstantStepSize`][] makes `n = ceil((t1 - t0) / dt0)` steps, of equal
        length but for the first two, which meet at `t0 + dt0`. These are the cells. The
        steps of a solve backwards in time are the mirror image of this; so if `dt0`
        does not divide the interval, such a solve needs [`diffrax.StepTo`][] and `ts=`.

    !!! info "Derivatives"

        A path has no derivative in time. Differentiating a query with respect to its
        times is an error, as is differentiating through the constructor with respect
        to `t0`, `t1`, `dt` or `ts`.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    levy_area: type[diffrax.BrownianIncrement] = eqx.field(static=True)
    key: PRNGKeyArray
    _cells: AbstractCells
    # Flattened, as a static field has to be hashable and a PyTree need not be.
    _shape: tuple[tuple[jax.ShapeDtypeStruct, ...], Any] = eqx.field(static=True)

    def __init__(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        shape: tuple[int, ...] | PyTree[jax.ShapeDtypeStruct],
        key: PRNGKeyArray,
        *,
        dt: RealScalarLike | None = None,
        ts: ArrayLike | Sequence[RealScalarLike] | None = None,
        levy_area: type[
            diffrax.BrownianIncrement
            | diffrax.SpaceTimeLevyArea
            | diffrax.SpaceTimeTimeLevyArea
        ] = diffrax.BrownianIncrement,
    ):
        if levy_area is not diffrax.BrownianIncrement:
            raise NotImplementedError(
                "`BrownianInterval(levy_area=...)` supports only "
                "`diffrax.BrownianIncrement`. Use `diffrax.VirtualBrownianTree` for "
                "paths with Lévy areas."
            )
        if dt is not None and ts is not None:
            raise ValueError("`BrownianInterval` takes either `dt` or `ts`, not both.")

        for name, x in (("t0", t0), ("t1", t1), ("dt", dt)):
            if x is not None and jnp.ndim(x) != 0:
                raise ValueError(f"`BrownianInterval({name}=...)` must be a scalar.")
        given = [x for x in (t0, t1, dt) if x is not None]
        given += [] if ts is None else [jnp.asarray(ts)]
        dtype = _time_dtype(*given)
        # What is known now stays known, so that `error_if` can check it right here.
        with jax.ensure_compile_time_eval():
            start, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
            step = None if dt is None else jnp.asarray(dt, dtype)
            edges = jnp.stack([start, end]) if ts is None else jnp.asarray(ts, dtype)
        end = error_if(
            end,
            lambda: ~((start < end) & jnp.isfinite(start) & jnp.isfinite(end)),
            "`BrownianInterval(t0=..., t1=...)` must be finite, with `t0 < t1`. (Also "
            "for solves that go backwards in time.)",
        )
        edges = edges if ts is None else _check_ts(start, end, edges)
        step = None if step is None else _check_dt(start, end, step)
        start, end, step, edges = nondifferentiable(
            (start, end, step, edges),
            name="The times `t0`, `t1`, `dt` and `ts` of a `BrownianInterval`",
        )
        self.t0 = start
        self.t1 = end
        if step is None:
            self._cells = ListedCells(edges)
        else:
            self._cells = ConstantStepCells(start, end, step)

        if isinstance(shape, tuple) and all(isinstance(n, int) for n in shape):
            shape = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
        for x in jtu.tree_leaves(shape):
            if not isinstance(x, jax.ShapeDtypeStruct):
                raise ValueError(
                    "`BrownianInterval(shape=...)` must be a tuple of integers or a "
                    f"PyTree of `jax.ShapeDtypeStruct`s, but has a leaf {x}."
                )
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                raise ValueError(
                    "`BrownianInterval(shape=...)` must have floating-point dtypes, "
                    f"but has a leaf of dtype {x.dtype}."
                )
        leaves, treedef = jtu.tree_flatten(shape)
        self._shape = (tuple(leaves), treedef)
        self.key = key
        self.levy_area = levy_area

    @property
    def shape(self) -> PyTree[jax.ShapeDtypeStruct]:
        leaves, treedef = self._shape
        return jtu.tree_unflatten(treedef, leaves)

    def evaluate(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike | None = None,
        left: bool = True,
        use_levy: bool = False,
    ) -> PyTree[Array]:
        """The increment of the path over `[t0, t1]`.

        Over a single cell this costs one draw; over more, one draw for each.

        **Arguments:**

        - `t0`: the start of the query.
        - `t1`: the end of the query. If not passed, then the query is from the start of
            the path to `t0`: the value of the path at `t0`, which starts at zero.
        - `left`: ignored, as Brownian motion has no jumps.
        - `use_levy`: whether to return a [`diffrax.BrownianIncrement`][] instead of
            just the increment `W`.

        **Returns:**

        A PyTree of arrays with the shapes and dtypes of `shape`. Over a query of length
        `h` (in units of time), each entry is normal with mean zero and variance `h`.
        With `use_levy=True`, a [`diffrax.BrownianIncrement`][] of such PyTrees.

        **Raises:**

        An error, when run, if the query is not a union of cells: if either end is more
        than a few units of rounding from an edge, outside of `[self.t0, self.t1]`, or
        NaN, or if `t0 > t1`.
        """
        del left
        query = (lax.stop_gradient(self.t0), t0) if t1 is None else (t0, t1)
        dtypes = (self.t0.dtype, *(_time_dtype(t) for t in query))
        t0, t1 = (jnp.asarray(t, self.t0.dtype) for t in query)
        out = self._evaluate(t0, t1, dtypes)
        return out if use_levy else out.W

    # Apart from `evaluate`, so that Python floats are arrays before they get here: they
    # would be compiled anew for each value.
    @eqx.filter_jit
    def _evaluate(
        self, t0: Float[Array, ""], t1: Float[Array, ""], dtypes: tuple[jnp.dtype, ...]
    ) -> diffrax.BrownianIncrement:
        t0, t1 = nondifferentiable((t0, t1), name="The times of a Brownian increment")
        cells, start, end = lax.stop_gradient((self._cells, self.t0, self.t1))
        tol = _tolerance(start, end, dtypes)

        first = cells.nearest_edge(t0)
        is_edge0 = jnp.abs(t0 - cells.edge(first)) <= tol
        # Surely one cell, and cheap to find out: the end of the query is the next edge,
        # and is not near to any other one.
        second = jnp.minimum(first + 1, cells.count - 1)
        shortest = jnp.minimum(cells.length(first), cells.length(second))
        from_next_edge = jnp.abs(t1 - cells.edge(first + 1))
        is_near = from_next_edge <= jnp.minimum(tol, 0.25 * shortest)
        is_cell = is_edge0 & (first < cells.count) & is_near

        def many_cells():
            last = cells.nearest_edge(t1)
            is_edge1 = jnp.abs(t1 - cells.edge(last)) <= tol
            is_union = is_edge0 & is_edge1 & (first <= last)
            return lax.fori_loop(
                eqx.error_if(first, ~is_union, _not_a_union_of_cells),
                last,
                lambda i, inc: increments.join(inc, self._cell(cells, i)),
                increments.zero(self.shape),
            )

        # A loop of at most one iteration, as XLA runs it faster than a conditional.
        _, out = lax.while_loop(
            lambda val: val[0],
            lambda val: (jnp.zeros_like(val[0]), many_cells()),
            (~is_cell, self._cell(cells, first)),
        )
        return out

    def _cell(
        self, cells: AbstractCells, i: Int[Array, ""]
    ) -> diffrax.BrownianIncrement:
        return increments.sample(jr.fold_in(self.key, i), cells.length(i), self.shape)


BrownianInterval.__init__.__doc__ = """**Arguments:**

- `t0`, `t1`: the start and end of the interval, with `t0 < t1`. Any unit of time;
    variances are in the same unit.
- `shape`: a PyTree of `jax.ShapeDtypeStruct`s, giving the shape, dtype and PyTree
    structure of the path. May also be a tuple of integers, for an array of this shape
    with the default floating-point dtype. Every floating-point dtype can be used.
- `key`: a JAX random key, typed (`jax.random.key`) or not (`jax.random.PRNGKey`).
- `dt`: divide the interval into the steps of a [`diffrax.ConstantStepSize`][] solve
    from `t0` to `t1` with `dt0=dt`. Must be positive and at most `t1 - t0`.
- `ts`: divide the interval at these times, which are strictly increasing, start with
    `t0` and end with `t1`; for solves with [`diffrax.StepTo`][].
- `levy_area`: must be [`diffrax.BrownianIncrement`][].

With neither `dt` nor `ts` the whole interval is one cell. Paths that are divided in
different ways are different paths, even for the same key.

**Raises:**

`ValueError` for bad arguments: `t1 <= t0`, both of `dt` and `ts`, a `dt` or `ts`
outside of what is said above, or a `shape` with integer dtypes. `NotImplementedError`
for other `levy_area`s. If the offending value is traced by JAX, an error when run.
"""

_not_a_union_of_cells = (
    "`BrownianInterval.evaluate(t0, t1)` was queried over an interval that is not a "
    "union of the cells of the path. Pass the steps of the solve to the path: `dt=...` "
    "for `diffrax.ConstantStepSize`, or `ts=...` for `diffrax.StepTo`. Also check that "
    "the query has `t0 <= t1`, within the interval of the path. (If `dt` does not "
    "divide the interval, then the steps of a solve backwards in time differ from "
    "those of a solve forwards in time; see the documentation of `BrownianInterval`.) "
    "For other queries use `diffrax.VirtualBrownianTree`."
)


def _check_dt(
    t0: Float[Array, ""], t1: Float[Array, ""], dt: Float[Array, ""]
) -> Float[Array, ""]:
    dt = error_if(dt, lambda: ~(dt > 0), "`BrownianInterval(dt=...)` must be positive.")
    # A step that was computed as the length of the interval may be rounded upwards.
    return error_if(
        dt,
        lambda: dt > t1 - t0 + _tolerance(t0, t1, (t0.dtype,)),
        "`BrownianInterval(dt=...)` must be at most the length of the interval, "
        "`t1 - t0`.",
    )


def _check_ts(
    t0: Float[Array, ""], t1: Float[Array, ""], ts: Float[Array, "..."]
) -> Float[Array, " times"]:
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(
            "`BrownianInterval(ts=...)` must be one-dimensional, with at least two "
            "times."
        )
    ts = error_if(
        ts,
        lambda: ~jnp.all(ts[1:] > ts[:-1]),
        "`BrownianInterval(ts=...)` must be strictly increasing. (Also for solves that "
        "go backwards in time.)",
    )
    return error_if(
        ts,
        lambda: (ts[0] != t0) | (ts[-1] != t1),
        "`BrownianInterval(ts=...)` must start with `t0` and end with `t1`.",
    )


def _time_dtype(*times: Real[Array, "..."] | RealScalarLike) -> jnp.dtype:
    # As in `diffrax.diffeqsolve`: times may be given as a mix of integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*times)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    return dtype


def _tolerance(
    t0: Float[Array, ""], t1: Float[Array, ""], dtypes: tuple[jnp.dtype, ...]
) -> Float[Array, ""]:
    """How far from an edge a time may be, if it was rounded in any of `dtypes`."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return _ULPS * eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
