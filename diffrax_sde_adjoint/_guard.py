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
    grad_start: PyTree[Array | None],
    grad_out: PyTree[Array | None],
    largest_out: PyTree[Float[Array, ""] | None],
) -> Bool[Array, ""]:
    """Whether the difference of `found` and `start` matters to the loss.

    It does so if its product with the cotangent `grad_start` is more than the cube root
    of the unit of rounding, relative to the product of the outputs with their
    cotangents `grad_out`. For the size of the outputs, that of the largest state on
    the way stands in. NaNs are let pass: they speak for themselves.
    """

    def worth_of(grad, x, x0):
        return None if grad is None else jnp.sum(jnp.abs(grad * (x - x0)))

    def scale_of(grad, largest):
        return None if grad is None else jnp.sum(jnp.abs(grad)) * largest

    is_none = lambda x: x is None
    worth = jtu.tree_map(worth_of, grad_start, found, start, is_leaf=is_none)
    scale = jtu.tree_map(scale_of, grad_out, largest_out, is_leaf=is_none)
    eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(scale)]
    tol = max(eps, default=0.0) ** _root
    return _total(worth) > tol * _total(scale)


def largest(tree: PyTree[Any]) -> PyTree[Float[Array, ""] | None]:
    """The largest absolute value of each array, which may be empty; `None` for leaves
    that are not floating-point arrays.
    """
    arrays = eqx.filter(tree, eqx.is_inexact_array)
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0), arrays)


def _total(tree: PyTree[Array]) -> Float[Array, ""]:
    leaves = [x.astype(jnp.result_type(float)) for x in jtu.tree_leaves(tree)]
    return jnp.sum(jnp.stack([jnp.zeros(()), *leaves]))
