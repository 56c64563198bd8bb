"""Whether the value of a function depends on its argument, as seen from its trace."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .jaxprs import dependent, variables_of


def depends_on(fn: Callable[[Any], Any], x: PyTree[Any]) -> bool:
    """Whether any array that `fn(x)` returns is computed from an array in `x`."""
    dynamic, static = eqx.partition(x, eqx.is_array)

    def arrays(dynamic):
        return eqx.filter(fn(eqx.combine(dynamic, static)), eqx.is_array)

    jaxpr = jax.make_jaxpr(arrays)(dynamic).jaxpr
    found = dependent(jaxpr.eqns, jaxpr.invars)
    return not found.isdisjoint(variables_of(jaxpr.outvars))
