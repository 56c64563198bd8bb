"""Whether a sweep has come back to where the solve started.

Undoing steps amplifies rounding errors if the dynamics are contracting, and gradients
are evaluated at the states so found. The first of these states is known.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree


did_not_return = (
    "`adjoint=StochasticAdjoint()` could not undo the steps of the solve: going back "
    "from its end, it did not arrive at its start, up to the square root of the unit "
    "of rounding. So the gradient would have been wrong. The dynamics contract too "
    "much over this time for the solver, whose forward solution is likely to be "
    "inaccurate as well (compare with `diffrax.Heun`). Solve in shorter pieces, or use "
    "float64, or another solver and `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)


def has_drifted(
    found: PyTree[Any], start: PyTree[Any], end: PyTree[Any]
) -> Bool[Array, ""]:
    """Whether `found` is not `start`, relative to the size of `start` and `end`.

    Each is a PyTree of the same structure, and is compared leaf by leaf, up to the
    square root of the unit of rounding of the leaf's dtype. NaNs are let pass: they
    speak for themselves.
    """

    def has_drifted_leaf(found: Array, start: Array, end: Array) -> Bool[Array, ""]:
        size = lambda x: jnp.max(jnp.abs(x), initial=0)
        tol = float(jnp.finfo(found.dtype).eps) ** 0.5
        return size(found - start) > tol * jnp.maximum(size(start), size(end))

    trees = (eqx.filter(x, eqx.is_inexact_array) for x in (found, start, end))
    drifted = jtu.tree_leaves(jtu.tree_map(has_drifted_leaf, *trees))
    return jnp.any(jnp.stack([jnp.array(False), *drifted]))
