"""What a function refers to by closure, made a part of it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.extend as jex
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


class Hoisted(eqx.Module):
    """A function that refers to arrays by closure, as one that has them as a part. It
    is to be called with arrays where it was with arrays before; whatever else is among
    its arguments is taken to be the same.
    """

    closure: list[Array | np.ndarray]
    jaxpr: Any = eqx.field(static=True)
    out_struct: PyTree = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        arrays = jtu.tree_leaves(eqx.filter(args, eqx.is_array))
        closed_jaxpr = jex.core.ClosedJaxpr(self.jaxpr, self.closure)
        out = jex.core.jaxpr_as_fun(closed_jaxpr)(*arrays)
        dynamic, static = self.out_struct
        return eqx.combine(jtu.tree_unflatten(jtu.tree_structure(dynamic), out), static)


def hoist(fn: Callable, *args: Any) -> Hoisted:
    closed_jaxpr, *out_struct = eqx.filter_make_jaxpr(fn)(*args)
    return Hoisted(closed_jaxpr.consts, closed_jaxpr.jaxpr, tuple(out_struct))
