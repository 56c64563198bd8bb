"""What `BrownianInterval` accepts: its arguments, checked and made arrays."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import (
    Array,
    ArrayLike,
    Float,
    Inexact,
    Int,
    Key,
    PRNGKeyArray,
    PyTree,
    Real,
)

from .._compat import RealScalarLike
from .._misc import error_if
from .draws import Rows, at_least_single


# A time within this many units of rounding of an edge, or of a point that halving a
# cell makes, is that edge or point: steps are computed in a few roundings, from either
# end of the interval.
_ULPS = 2

# The parts of a cell are counted in 32 bits.
_max_levels = 29
num_components = {
    diffrax.BrownianIncrement: 1,
    diffrax.SpaceTimeLevyArea: 2,
    diffrax.SpaceTimeTimeLevyArea: 3,
}


class KnownTimes:
    """`t0`, `t1` and `dt` of a path, or `None` if they are not known when it is made:
    for a warning. It is equal to any other, as programs are not to be compiled anew.
    """

    def __init__(self, t0: Array, t1: Array, dt: Array | None):
        self.numbers: Any = None
        if not any(isinstance(x, jax.core.Tracer) for x in (t0, t1, dt)):
            self.numbers = (float(t0), float(t1), None if dt is None else float(dt))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KnownTimes)

    def __hash__(self) -> int:
        return hash(KnownTimes)


def constants(t0: Array, t1: Array, dt: Array | None) -> tuple[float, ...] | None:
    """The numbers, if they are constants of a program that is being traced, so that
    they are no others when it is run.
    """
    # Any operation is traced then, also one of constants.
    is_traced = isinstance(jnp.add(0, 0), jax.core.Tracer)
    if (
        not is_traced
        or dt is None
        or any(isinstance(x, jax.core.Tracer) for x in (t0, t1, dt))
    ):
        return None
    return float(t0), float(t1), float(dt)


def check_options(levy_area: Any, levels: Any, tol: Any, has_cells: bool) -> int:
    """How often a cell is halved."""
    if tol is not None:
        raise ValueError(
            "`BrownianInterval` has no `tol`. Its resolution is set by the size of its "
            "cells and by `levels`: a cell over `2**levels`. For constant steps, pass "
            "`dt=dt0` of the solve; for adaptive steps, `dt` of about the longer ones."
        )
    if levy_area not in num_components:
        raise ValueError(
            "`BrownianInterval(levy_area=...)` must be one of "
            "`diffrax.BrownianIncrement`, `diffrax.SpaceTimeLevyArea` and "
            f"`diffrax.SpaceTimeTimeLevyArea`, but is {levy_area}."
        )
    if levels is None:
        levels = 10 if has_cells else 20
    if not hasattr(levels, "__index__") or not 0 <= levels <= _max_levels:
        raise ValueError(
            "`BrownianInterval(levels=...)` must be an integer from 0 to "
            f"{_max_levels}, but is {levels}."
        )
    return operator.index(levels)


def check_times(
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt: RealScalarLike | None,
    ts: ArrayLike | Sequence[RealScalarLike] | None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """`t0`, `t1`, `dt` and `ts`, as arrays of one dtype."""
    if dt is not None and ts is not None:
        raise ValueError("`BrownianInterval` takes either `dt` or `ts`, not both.")
    for name, x in (("t0", t0), ("t1", t1), ("dt", dt)):
        if x is not None and jnp.ndim(x) != 0:
            raise ValueError(f"`BrownianInterval({name}=...)` must be a scalar.")
    # What is known now stays known, so that `error_if` can check it right here.
    with jax.ensure_compile_time_eval():
        times = (t0, t1, dt, None if ts is None else jnp.asarray(ts))
        dtype = time_dtype(*jtu.tree_leaves(times))
        to_dtype = lambda x: jnp.asarray(x, dtype)
        start, end, step, edges = jtu.tree_map(to_dtype, times)
    end = error_if(
        end,
        lambda: ~((start < end) & jnp.isfinite(start) & jnp.isfinite(end)),
        "`BrownianInterval(t0=..., t1=...)` must be finite, with `t0 < t1`. (Also for "
        "solves that go backwards in time.)",
    )
    edges = None if edges is None else _check_ts(start, end, edges)
    step = None if step is None else _check_dt(start, end, step)
    return start, end, step, edges


def check_shape(shape: Any) -> PyTree[jax.ShapeDtypeStruct]:
    if isinstance(shape, tuple) and all(isinstance(n, int) for n in shape):
        return jax.ShapeDtypeStruct(shape, jnp.result_type(float))
    leaves = jtu.tree_leaves(shape)
    if len(leaves) == 0:
        raise ValueError("`BrownianInterval(shape=...)` has no leaves.")
    for x in leaves:
        if not isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                "`BrownianInterval(shape=...)` must be a tuple of integers or a PyTree "
                f"of `jax.ShapeDtypeStruct`s, but has a leaf {x}."
            )
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                "`BrownianInterval(shape=...)` must have floating-point dtypes, but "
                f"has a leaf of dtype {x.dtype}."
            )
        # JAX would make the numbers narrower, and those have another law.
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise ValueError(
                f"`BrownianInterval(shape=...)` has a leaf of dtype {x.dtype}, which "
                "JAX has only with `jax.config.update('jax_enable_x64', True)`."
            )
    return shape


def check_end(
    end: PyTree[ArrayLike], shape: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[Inexact[Array, "..."]]:
    """`end` of a path with arrays of `shape`, in single precision at least."""
    if jtu.tree_structure(end) != jtu.tree_structure(shape):
        raise ValueError(
            "`BrownianInterval(end=...)` must be a PyTree of arrays with the structure "
            f"of `shape`, {jtu.tree_structure(shape)}, but has the structure "
            f"{jtu.tree_structure(end)}. For one array, pass `jnp.array(...)`; all of "
            "its entries are given."
        )

    def check(x, like):
        is_kind = jnp.iscomplexobj(like) or not jnp.iscomplexobj(x)
        if jnp.shape(x) != like.shape or not is_kind:
            raise ValueError(
                "`BrownianInterval(end=...)` must have arrays with the shapes of "
                "`shape`, that are real where these are, but has one of shape "
                f"{jnp.shape(x)} and dtype {jnp.result_type(x)}, instead of "
                f"{like.shape} and {like.dtype}."
            )
        return at_least_single(jnp.asarray(x, like.dtype))

    return jtu.tree_map(check, end, shape)


def check_rows(
    rows: tuple[int | Int[Array, ""], int],
    leaves: list[jax.ShapeDtypeStruct],
    num_components: int,
) -> Rows:
    """`rows` of arrays with the shapes of `leaves`."""
    first, total = rows
    if not hasattr(total, "__index__") or isinstance(total, jax.core.Tracer):
        raise ValueError(
            "`BrownianInterval(rows=(first, total))` must have an integer `total` that "
            f"is not traced, but has {total}."
        )
    total = operator.index(total)
    if not jnp.issubdtype(jnp.result_type(first), jnp.integer) or jnp.ndim(first) != 0:
        raise ValueError(
            "`BrownianInterval(rows=(first, total))` must have an integer `first`, but "
            f"has {first}."
        )
    if len({x.shape[:1] for x in leaves}) > 1 or leaves[0].shape == ():
        raise ValueError(
            "`BrownianInterval(rows=...)` needs a `shape` whose arrays all have the "
            "same number of rows, along the first axis."
        )
    sizes = [num_components * total * math.prod(x.shape[1:]) for x in leaves]
    if max(total, *sizes) >= 2**31:
        raise ValueError(
            "`BrownianInterval(rows=(first, total))` must be of a batch with less than "
            "2**31 numbers in an increment, of all `total` rows."
        )
    # pyright does not know of JAX's options.
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore
        raise ValueError(
            "`BrownianInterval(rows=...)` needs JAX's option "
            "`jax_threefry_partitionable`, which is on by default."
        )
    is_known = not isinstance(first, jax.core.Tracer)
    if is_known and not 0 <= operator.index(first) <= total - leaves[0].shape[0]:
        raise ValueError(
            f"`BrownianInterval(rows=({first}, {total}))`: `first` and the rows after "
            "it, as many as `shape` has, are not among those of the batch."
        )
    return Rows(jnp.asarray(first, jnp.int32), total)


def check_key(key: PRNGKeyArray) -> Key[Array, ""]:
    if not eqx.is_array(key):
        raise ValueError(
            "`BrownianInterval(key=...)` must be a JAX random key, such as "
            f"`jax.random.key(0)`, but is {key}."
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jr.wrap_key_data(key)
    if key.ndim != 0:
        raise ValueError(
            "`BrownianInterval(key=...)` must be a single key, not an array of keys. "
            "Use `jax.vmap` for several paths."
        )
    threefry = jax.eval_shape(lambda: jr.key(0, impl="threefry2x32"))
    if key.dtype != threefry.dtype:
        raise ValueError(
            "`BrownianInterval(key=...)` must be a key of JAX's default kind, "
            "`jax.random.key(seed, impl='threefry2x32')`. Others, such as `rbg`, give "
            "other numbers in a batch than one by one, so a path could not be drawn "
            "again."
        )
    return key


def _check_dt(
    t0: Float[Array, ""], t1: Float[Array, ""], dt: Float[Array, ""]
) -> Float[Array, ""]:
    dt = error_if(dt, lambda: ~(dt > 0), "`BrownianInterval(dt=...)` must be positive.")
    dt = error_if(
        dt,
        lambda: dt < tolerance(t0, t1, (t0.dtype,)),
        "`BrownianInterval(dt=...)` must be at least two units of rounding of the "
        "times `t0` and `t1`. Let the path start closer to zero, or use float64.",
    )
    dt = error_if(
        dt,
        lambda: (t1 - t0) / dt >= 2**30,
        "`BrownianInterval(dt=...)` must be such that there are at most 2**30 cells.",
    )
    # A step that was computed as the length of the interval may be rounded upwards.
    return error_if(
        dt,
        lambda: dt > t1 - t0 + tolerance(t0, t1, (t0.dtype,)),
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


def time_dtype(*times: Real[Array, "..."] | RealScalarLike) -> jnp.dtype:
    # As in `diffrax.diffeqsolve`: times may be given as a mix of integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*times)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def tolerance(
    t0: Float[Array, ""], t1: Float[Array, ""], dtypes: tuple[jnp.dtype, ...]
) -> Float[Array, ""]:
    """How far a time may be off, if it was rounded in any of `dtypes`."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return _ULPS * eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
