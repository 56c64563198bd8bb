"""Whether a sweep has come back close enough to where the solve started.

Undoing steps amplifies rounding errors if the dynamics contract, and gradients are
evaluated at the states so found. The first of these states is known. That it is missed
does no harm in itself: for a stable solve of contracting dynamics, the loss depends on
early states as little as these are found inaccurately. So what is looked at is what the
difference is worth to the loss, which is, to first order, its product with the
cotangent of the first state.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree


# In solves of OU processes over various horizons, gradients are more accurate than this
# tolerance wherever it is met, and lose their last digits soon after it is not.
_root = 1 / 3

did_not_return = (
    "`adjoint=StochasticAdjoint()` could not undo the steps of the solve: going back "
    "from its end, it arrived so far from its start that gradients would be wrong. The "
    "dynamics contract too much over this time for the solver, whose forward solution "
    "is likely to be inaccurate as well (compare with `diffrax.Heun`). Solve in "
    "shorter pieces, with smaller steps or in float64; or use another solver and "
    "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)


def has_drifted(
    found: PyTree[Any],
    start: PyTree[Any],
    grad_start: PyTree[Any],
    end: PyTree[Any],
    grad_end: PyTree[Any],
) -> Bool[Array, ""]:
    """Whether the difference of `found` and `start` matters to the loss.

    It does so if its product with `grad_start` is more than the cube root of the unit
    of rounding, relative to the product of the outputs with their cotangents,
    `grad_end`. For the outputs, the size of `start` and `end` stands in. All are
    PyTrees of the same structure, but for leading axes of `grad_end`. NaNs are let
    pass: they speak for themselves.
    """
    trees = (found, start, grad_start, end, grad_end)
    leaves = [jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in trees]
    worth, scale, tol = jnp.zeros(()), jnp.zeros(()), 0.0
    for x, x0, grad_x0, x1, grad_x1 in zip(*leaves, strict=True):
        size = jnp.maximum(_largest(x0), _largest(x1))
        worth = worth + jnp.sum(jnp.abs(grad_x0 * (x - x0))).astype(worth.dtype)
        scale = scale + (jnp.sum(jnp.abs(grad_x1)) * size).astype(scale.dtype)
        tol = max(tol, float(jnp.finfo(x.dtype).eps) ** _root)
    return worth > tol * scale


def _largest(x: Array) -> Float[Array, ""]:
    return jnp.max(jnp.abs(x), initial=0)
