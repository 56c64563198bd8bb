"""Checks of values, made as early as the value is known."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.core
import numpy as np
from jaxtyping import ArrayLike, Bool, PyTree


_T = TypeVar("_T", bound=PyTree)


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
