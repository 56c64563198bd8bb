"""Whether the value of a function depends on its argument, as seen from its trace."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
from jaxtyping import PyTree


def depends_on(fn: Callable[[Any], Any], x: PyTree[Any]) -> bool:
    """Whether any array that `fn(x)` returns is computed from an array in `x`."""
    dynamic, static = eqx.partition(x, eqx.is_array)

    def arrays(dynamic):
        return eqx.filter(fn(eqx.combine(dynamic, static)), eqx.is_array)

    jaxpr = jax.make_jaxpr(arrays)(dynamic).jaxpr
    dependent = set(jaxpr.invars)
    is_dependent = lambda x: isinstance(x, jex.core.Var) and x in dependent
    for equation in jaxpr.eqns:
        if any(map(is_dependent, equation.invars)):
            dependent.update(equation.outvars)
    return any(map(is_dependent, jaxpr.outvars))
