"""Zeros, sums and comparisons of PyTrees of arrays; and checks of values, made as early
as the value is known.
"""

import contextlib
import functools as ft
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, PyTree

from ._compat import _EquinoxRuntimeError, callback_log, unvmap_any


_T = TypeVar("_T", bound=PyTree)
# As equinox does, when it is imported.
_on_error = os.environ.get("EQX_ON_ERROR", "raise")


@contextlib.contextmanager
def in_scope(name: str) -> Iterator[None]:
    """A decorator: gives what a function traces a name in profiles. The function may
    call itself, unlike with `jax.named_scope`, which in JAX 0.6 has one state for all
    calls.
    """
    with jax.named_scope(name):
        yield


def error_if(x: _T, pred: Callable[[], Bool[ArrayLike, "..."]], msg: str) -> _T:
    """`x`, unless `pred()` is true anywhere: then a `ValueError` now if that is known
    now, even within `jax.jit`, and otherwise an error when the compiled program runs,
    as [`equinox.error_if`][] raises it.
    """
    with jax.ensure_compile_time_eval():
        is_error = pred()
    if isinstance(is_error, jax.core.Tracer):
        return eqx.error_if(x, is_error, msg)
    if np.asarray(is_error).any():
        raise ValueError(msg)
    return x


class _Message:
    """All messages of [`equinox.branched_error_if`][]: one, with numbers that are known
    when the program runs.
    """

    def __init__(self, template: str, num_values: int):
        self._template = template
        self._text = template.format(*num_values * ["?"])

    def __getitem__(self, index: int) -> str:
        del index
        return self._text

    def note(self, pred: ArrayLike, *values: ArrayLike) -> ArrayLike:
        """Takes the numbers of the first element of a batch that is in error."""
        first = np.argmax(np.ravel(pred))
        self._text = self._template.format(
            *(f"{np.ravel(x)[first]:.6g}" for x in values)
        )
        return pred


def error_with_values_if(
    x: _T, pred: Bool[Array, ""], template: str, *values: Array
) -> _T:
    """As [`equinox.error_if`][], with a message that has scalar `values` filled in as
    `str.format` does.
    """
    if _on_error in ("off", "nan"):
        # There is no message, and no callback either.
        return eqx.error_if(x, pred, template)
    message = _Message(template, len(values))
    pred, values = lax.stop_gradient((pred, values))
    # In a batch too, numbers are looked at only if there is an error.
    pred = lax.cond(
        unvmap_any(pred),
        lambda: jax.pure_callback(
            message.note,
            jax.ShapeDtypeStruct((), bool),
            pred,
            *values,
            vmap_method="broadcast_all",
        ),
        lambda: pred,
    )
    return eqx.branched_error_if(x, pred, 0, cast(Any, message))


def _is_new(record: logging.LogRecord) -> bool:
    """Whether this tells of more than an error of ours that is about to be raised."""
    error = record.exc_info[1] if record.exc_info else None
    # As the names of the adjoints and of `BrownianInterval` begin.
    is_ours = str(error).startswith(("`adjoint=", "`Backward", "`Brownian"))
    return not (isinstance(error, _EquinoxRuntimeError) and is_ours)


# JAX logs an error in a callback, with its traceback, and then raises it with the same
# traceback. `equinox.filter_jit` keeps the first of the two out as well, of all errors.
callback_log.addFilter(_is_new)


def zeros_like(tree: PyTree[Any]) -> PyTree[Array]:
    """Zeros of the shapes and dtypes of the leaves, which may be structs."""
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def any_entry(
    predicate: Callable[[Array], Bool[Array, "..."]], tree: PyTree[Any]
) -> Bool[Array, ""]:
    """Whether it is true of an entry of the inexact arrays."""
    leaves = filter(eqx.is_inexact_array, jtu.tree_leaves(tree))
    each = (jnp.any(predicate(x)) for x in leaves)
    return ft.reduce(jnp.logical_or, each, jnp.array(False))


def num_bytes(tree: PyTree[Any]) -> int:
    """Of all arrays, which may be structs."""
    is_array = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    arrays = jtu.tree_leaves(eqx.filter(tree, is_array))
    return sum(x.size * x.dtype.itemsize for x in arrays)


def add(*trees: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x, *others: sum(others, start=x), *trees)


def add_where_given(
    x: PyTree[Array | None], y: PyTree[Array | None]
) -> PyTree[Array | None]:
    """`x + y`, where `None` is zero. Where `x` is `None`, so is the sum."""
    add = lambda a, b: a if a is None or b is None else a + b
    return jtu.tree_map(add, x, y, is_leaf=lambda a: a is None)


def are_alike(x: PyTree[Any], y: PyTree[Any]) -> bool:
    """Whether they have the same structure, shapes and dtypes."""
    describe = lambda tree: jtu.tree_map(
        lambda z: f"{jnp.result_type(z)}{getattr(z, 'shape', ())}", tree
    )
    return eqx.tree_equal(describe(x), describe(y)) is True
