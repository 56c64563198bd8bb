"""Brownian motion, drawn by the cell.

The interval is divided into cells (`cells.py`), and what is known of cell `i` is drawn
from a key of its own, the `i`-th one folded from the path's key. Here the path is
defined, and the query of a whole cell, such as a step of a solve whose steps are the
cells: it is one draw. All other queries are in `query.py`. The method is told in
`docs/how_it_works/brownian_interval.md`.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import (
    Array,
    ArrayLike,
    Bool,
    Float,
    Inexact,
    Int,
    Key,
    PRNGKeyArray,
    PyTree,
)

from .._compat import RealScalarLike, control_of_solver, nondifferentiable
from .._misc import error_with_values_if
from .arguments import (
    KnownTimes,
    check_end,
    check_key,
    check_options,
    check_rows,
    check_shape,
    check_times,
    constants,
    num_components,
    time_dtype,
    tolerance,
)
from .cells import AbstractCells, ConstantStepCells, ListedCells, OneCell
from .draws import Rows, at_least_single
from .increments import Increment, add_constant
from .query import Source, any_query, draw_cell, run_if, value_at_end


_LevyArea = type[
    diffrax.BrownianIncrement
    | diffrax.SpaceTimeLevyArea
    | diffrax.SpaceTimeTimeLevyArea
]


_T = TypeVar("_T", bound=PyTree)

# Whether nothing is known of a query, or that it is within the interval, or a cell.
QueryKind: TypeAlias = Literal["any", "within", "cell"]


class BrownianInterval(diffrax.AbstractBrownianPath):
    """Exact Brownian motion over an interval, for the cost of drawing it.

    The interval `[t0, t1]` is cut into cells. A query of one cell is one draw of normal
    numbers: with cells that are the steps of a solve, this is the cost of each step,
    forwards and again when the solve is undone. A query of several cells draws each of
    them, and one of a half, quarter, ... of a cell draws once more for each halving.
    Any other query draws `levels + 2` times as many numbers as a cell for each of its
    ends, and the cells it spans. Nothing is stored.

    For given constructor arguments, `evaluate` is a pure function of its arguments. Up
    to rounding, it does not depend on the order of queries, on `jit` or `vmap`, on the
    direction of the solve, or on what differentiates it. So any solver and step size
    controller sees one and the same path; a step that is rejected has been a look at
    that path, and the steps tried next are consistent with it.

    ```python
    # Fixed steps: these are the cells. So that step sizes can be compared on one path,
    # steps may also be halves, quarters, ... or multiples of a cell.
    path = BrownianInterval(t0, t1, shape=(3,), key=key, dt=dt0)
    # Adaptive steps: `dt` should be about the size of the longer steps.
    path = BrownianInterval(
        t0, t1, shape=(3,), key=key, dt=0.1, levy_area=diffrax.SpaceTimeLevyArea
    )
    terms = MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))
    ```

    `W`, `H` and `K` have the exact joint law, as long as no two ends of queries are
    different points of one leaf, of `2**-levels` of a cell; there it is smooth. For
    [`diffrax.VirtualBrownianTree`][] and torchsde's `BrownianInterval`, see
    [the comparison](../how_it_works/brownian_interval.md#compared-with-others).

    !!! info "Steps that do not divide the interval"

        [`diffrax.ConstantStepSize`][] makes `n = ceil((t1 - t0) / dt0)` steps, of equal
        length but for the first two, which meet at `t0 + dt0`. These are the cells. The
        steps of a solve backwards in time are the mirror image of this; so if `dt0`
        does not divide the interval, they are not cells, and cost as any other query.

    !!! info "Derivatives"

        A path has no derivative in time. Differentiating a query with respect to its
        times is an error, as is differentiating through the constructor with respect
        to `t0`, `t1`, `dt` or `ts`.

    Sources: Foster, *Numerical approximations for stochastic differential equations*,
    Oxford 2020; Jelinčić, Foster and Kidger, arXiv:2405.06464, 2024.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    levy_area: _LevyArea = eqx.field(static=True)
    key: Key[Array, ""]
    levels: int = eqx.field(static=True)
    _cells: AbstractCells
    _known: KnownTimes = eqx.field(static=True, repr=False)
    _constants: tuple[float, ...] | None = eqx.field(static=True, repr=False)
    # Flattened, as a static field has to be hashable and a PyTree need not be.
    _shape: tuple[tuple[jax.ShapeDtypeStruct, ...], Any] = eqx.field(static=True)
    _rows: Rows | None
    # What is added to the white noise, for a path with a given end.
    _constant: PyTree[Inexact[Array, "..."]] | None

    def __init__(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        shape: tuple[int, ...] | PyTree[jax.ShapeDtypeStruct],
        key: PRNGKeyArray,
        *,
        dt: RealScalarLike | None = None,
        ts: ArrayLike | Sequence[RealScalarLike] | None = None,
        levy_area: _LevyArea = diffrax.BrownianIncrement,
        levels: int | None = None,
        rows: tuple[int | Int[Array, ""], int] | None = None,
        end: PyTree[ArrayLike] | None = None,
        tol: Any = None,
    ):
        self.levels = check_options(
            levy_area, levels, tol, has_cells=dt is not None or ts is not None
        )
        times = check_times(t0, t1, dt, ts)
        self._known = KnownTimes(*times[:3])
        self._constants = constants(*times[:3])
        self.t0, self.t1, step, edges = nondifferentiable(
            times, name="The times `t0`, `t1`, `dt` and `ts` of a `BrownianInterval`"
        )
        if step is not None:
            self._cells = ConstantStepCells(self.t0, self.t1, step)
        elif edges is not None:
            self._cells = ListedCells(edges)
        else:
            self._cells = OneCell(self.t0, self.t1)
        leaves, treedef = jtu.tree_flatten(check_shape(shape))
        self._shape = (tuple(leaves), treedef)
        self.key = check_key(key)
        self.levy_area = levy_area
        self._rows = None
        if rows is not None:
            self._rows = check_rows(rows, leaves, num_components[levy_area])
        self._constant = None
        if end is not None:
            length = lax.stop_gradient(self.t1 - self.t0)
            end = check_end(end, self.shape)
            self._constant = _constant_for(end, length, self._source)

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
        """The increment of the path over `[t0, t1]`, and its Lévy areas.

        **Arguments:**

        - `t0`: the start of the query.
        - `t1`: the end of the query. If not passed, then the query is from the start of
            the path to `t0`: the value of the path at `t0`, which starts at zero.
        - `left`: ignored, as Brownian motion has no jumps.
        - `use_levy`: whether to return an instance of `levy_area`, which also has the
            length `dt` of the query, instead of just the increment `W`.

        If `t0 > t1`, then this is what the path adds from right to left: `W` and `K`
        are the negative of those over `[t1, t0]`, `H` is the same, and the length `dt`
        is negative.

        A time within two units of rounding of the edge of a cell (of the size of the
        path's ends) is that edge, and so with halves, as long as they are 200 units.

        **Returns:**

        A PyTree of arrays with the shapes and dtypes of `shape`. Over a query of length
        `h` (in units of time), each entry is normal with mean zero and variance `h`.
        With `use_levy=True`, an instance of `levy_area` of such PyTrees; `H` and `K`,
        in the sense of diffrax, are independent of `W` and each other and have
        variances `h / 12` and `h / 720`.

        **Raises:**

        An error, when run, if either end is outside of `[self.t0, self.t1]` (by more
        than rounding) or NaN.
        """
        del left
        return self._query(t0, t1, use_levy, "any")

    def _query(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike | None,
        use_levy: bool,
        kind: QueryKind,
    ) -> PyTree[Array]:
        if use_levy:
            _check_levy_area(self.levy_area)
        query = (lax.stop_gradient(self.t0), t0) if t1 is None else (t0, t1)
        dtypes = (self.t0.dtype, *(time_dtype(t) for t in query))
        t0, t1 = (jnp.asarray(t, self.t0.dtype) for t in query)
        out = self._evaluate(t0, t1, dtypes, kind)
        return out if use_levy else out.W

    # Apart from `evaluate`, so that Python floats are arrays before they get here: they
    # would be compiled anew for each value.
    @eqx.filter_jit
    def _evaluate(
        self,
        t0: Float[Array, ""],
        t1: Float[Array, ""],
        dtypes: tuple[jnp.dtype, ...],
        kind: QueryKind,
    ) -> diffrax.AbstractBrownianIncrement:
        t0, t1 = nondifferentiable((t0, t1), name="The times of a Brownian increment")
        source = self._source
        cells = source.cells
        tol = self._tolerance(dtypes)
        if kind == "cell":
            # It is known to be one, so rounding does not matter.
            tol = 0.25 * cells.shortest
        cell = cells.cell_from(t0, tol)

        def evaluate(drawn):
            ts = jnp.stack([t0, t1])
            is_within = self._is_within(ts, tol)
            if kind == "any":
                ts = self._error_unless(ts, is_within, ts)
            else:
                is_within = is_within | (t0 == t1)
            # XLA would move what does not depend on the loop out of it, and run it
            # always.
            ts, drawn = lax.optimization_barrier((ts, drawn))
            if drawn is not None:
                # Recomputed, so that the loop does not carry it.
                drawn = Increment(at_least_single(cells.length(cell)), drawn.components)
            inc = any_query(source, cell, drawn, ts, tol)
            if kind == "any":
                return inc
            return jtu.tree_map(lambda x: jnp.where(is_within, x, jnp.nan), inc)

        if isinstance(cells, OneCell):
            return self._to_diffrax(evaluate(None))
        is_edge0 = jnp.abs(t0 - cells.edge(cell)) <= tol
        is_edge1 = jnp.abs(t1 - cells.edge(cell + 1)) <= tol
        is_cell = is_edge0 & is_edge1 & (cell < cells.count) & (t0 < t1)
        # In a batch, these are the steps of an element that is at its end.
        is_empty = t0 == t1
        if kind == "any":
            is_empty = is_empty & self._is_within(jnp.stack([t0, t1]), tol)
        dt = jnp.where(is_empty, 0, cells.length(cell))
        if kind == "cell":
            dt = jnp.where(is_cell | is_empty, dt, jnp.nan)
            return self._to_diffrax(draw_cell(source, cell, dt))
        drawn = draw_cell(source, cell, dt)
        return self._to_diffrax(run_if(~(is_cell | is_empty), evaluate, drawn))

    def _tolerance(self, dtypes: tuple[jnp.dtype, ...]) -> Float[Array, ""]:
        """How far a time may be off, that was rounded in any of `dtypes`."""
        rounding = tolerance(*lax.stop_gradient((self.t0, self.t1)), dtypes)
        # Below the length of a cell, such that no time is two edges.
        return jnp.minimum(rounding, 0.25 * lax.stop_gradient(self._cells.shortest))

    def _is_within(
        self, ts: Float[Array, " ends=2"], tol: Float[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether a query is; in either direction."""
        start, end = lax.stop_gradient((self.t0, self.t1))
        return (start - tol <= jnp.min(ts)) & (jnp.max(ts) <= end + tol)

    def _error_unless(
        self, x: _T, is_within: Bool[Array, ""], ts: Float[Array, " ends=2"]
    ) -> _T:
        """`x`, with an error for a query that is not within the path."""
        values = (*ts, *lax.stop_gradient((self.t0, self.t1)))
        return error_with_values_if(x, ~is_within, _bad_query, *values)

    @property
    def _source(self) -> Source:
        num = num_components[self.levy_area]
        stack = lambda x: jax.ShapeDtypeStruct((num, *x.shape), x.dtype)
        like = jtu.tree_map(stack, self.shape)
        cells = lax.stop_gradient(self._cells)
        return Source(self.key, cells, self.levels, like, num, self._rows)

    def _to_diffrax(self, inc: Increment) -> diffrax.AbstractBrownianIncrement:
        if self._constant is not None:
            inc = add_constant(inc, self._constant)
        # A complex path has real lengths.
        dt = jtu.tree_map(lambda x: inc.dt.astype(jnp.finfo(x.dtype).dtype), self.shape)

        def component(i):
            return jtu.tree_map(
                lambda x, y: self._nan_unless_rows(x[i]).astype(y.dtype),
                inc.components,
                self.shape,
            )

        num = num_components[self.levy_area]
        return self.levy_area(dt, *map(component, range(num)))

    def _nan_unless_rows(self, x: Array) -> Array:
        """Where the rows of a batch are is mostly known only when a program runs, and
        an error then would be a call of the host, in what may be a loop.
        """
        if self._rows is None:
            return x
        return jnp.where(self._rows.hold(x.shape[0]), x, jnp.nan)


BrownianInterval.__init__.__doc__ = """**Arguments:**

- `t0`, `t1`: the start and end of the interval, with `t0 < t1`. Any unit of time;
    variances are in the same unit.
- `shape`: a PyTree of `jax.ShapeDtypeStruct`s, giving the shape, dtype and PyTree
    structure of the path. May also be a tuple of integers, for an array of this shape
    with the default floating-point dtype. Every floating-point dtype can be used.
- `key`: a JAX random key, typed (`jax.random.key`) or not (`jax.random.PRNGKey`), of
    JAX's default implementation.
- `dt`: divide the interval into the steps of a [`diffrax.ConstantStepSize`][] solve
    from `t0` to `t1` with `dt0=dt`. Must be at most `t1 - t0`, and at least two units
    of rounding of the times. There may be at most 2**30 steps.
- `ts`: divide the interval at these times, which are strictly increasing, start with
    `t0` and end with `t1`; for solves with [`diffrax.StepTo`][].
- `levy_area`: what `evaluate(..., use_levy=True)` returns and solvers can ask for:
    [`diffrax.BrownianIncrement`][], [`diffrax.SpaceTimeLevyArea`][] or
    [`diffrax.SpaceTimeTimeLevyArea`][]. Each draws more numbers than the one before,
    and is another path, even for the same key.
- `levels`: how often a cell is halved to find values inside it, from 0 to 29. The
    resolution of the path is the length of the cell over `2**levels`: below that the
    path is smooth, and the variances of increments are wrong, mostly too small.
    Defaults to 10 with `dt` or `ts`, and to 20 with neither.
- `rows`: a pair `(first, total)`, for a batch of which each device holds a part: the
    path is rows `first`, `first + 1`, ... of a path with the same key that has `total`
    rows, along the first axis of each array of `shape`. `first` may be traced, such as
    `jax.lax.axis_index(...) * shape[0]` in a [`jax.shard_map`][]; then the path is not
    a number if there are no such rows. Numbers in half and single precision take two to
    three times as long to draw: each comes of a hash of its own.
- `end`: what the path adds from `t0` to `t1`: arrays (or numbers) with the PyTree
    structure and the shapes of `shape`. Then this is a Brownian bridge, which has the
    law of the path given that value; by default it is any. The cells are drawn once
    more, when the path is made. Can be differentiated with respect to.
- `tol`: not an argument of this path; there for an error that tells those who come from
    [`diffrax.VirtualBrownianTree`][] what to pass instead.

With neither `dt` nor `ts` the whole interval is one cell. Paths that are divided in
different ways are different paths, even for the same key.

**Raises:**

`ValueError` for arguments outside of what is said above, or both of `dt` and `ts`. If
the offending value is traced by JAX, an error when run.
"""


@eqx.filter_jit
def _constant_for(
    end: PyTree[Inexact[Array, "..."]], length: Float[Array, ""], source: Source
) -> PyTree[Inexact[Array, "..."]]:
    """What added to the white noise of a path makes it end there. All that `W` at the
    end is correlated with is this, the mean of the noise: it alone changes, and what is
    left of the noise has the law that it has given any end.
    """
    constant = lambda x, y: (x - y) / length.astype(y.dtype)
    return jtu.tree_map(constant, end, value_at_end(source))


_bad_query = (
    "`BrownianInterval.evaluate(t0, t1)` was called from {} to {}, but the path is "
    "from {} to {}. Let `BrownianInterval(t0=..., t1=...)` hold the whole interval of "
    "the solve, with `t0 < t1` also if this goes backwards in time."
)


def _check_levy_area(levy_area: type[diffrax.AbstractBrownianIncrement]) -> None:
    """An error if `diffeqsolve` is asking on behalf of a solver that needs more."""
    expected = control_of_solver()
    # From the least to the most.
    names = [x.__name__ for x in num_components if expected and issubclass(x, expected)]
    if len(names) > 0 and levy_area.__name__ not in names:
        raise ValueError(
            f"The solver needs a Brownian path with Lévy area, an "
            f"`{expected.__name__}`, but `BrownianInterval` was made with "
            f"`levy_area=diffrax.{levy_area.__name__}`. Pass "
            f"`BrownianInterval(..., levy_area=diffrax.{names[0]})`."
        )
