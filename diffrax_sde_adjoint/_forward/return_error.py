"""Whether a sweep has come back close enough to where the solve had been.

Undoing steps amplifies rounding errors if the dynamics contract, and gradients are
evaluated at the states so found. The first of these states is known, and so are those
that the forward solve has kept. That they are missed does no harm in itself: for a
stable solve of contracting dynamics, the loss depends on early states as little as
these are found inaccurately. So what is looked at is what the differences are worth to
the loss, which is, to first order, their product with the cotangents of these states.
"""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._compat import Y
from .._misc import any_entry


# In solves of OU processes over various horizons, gradients are more accurate than the
# cube root of the unit of rounding wherever it is met, and lose their last digits soon
# after it is not. What a near-exact solver is held to is that of single precision.
_root = 1 / 3
near_exact_tolerance = float(jnp.finfo(jnp.float32).eps) ** _root

could_not_return = (
    "`adjoint=StochasticAdjoint()` could not undo the steps of the solve: going back "
    "from its end, it arrived too far from its start for the gradient to be right. The "
    "dynamics contract too much for the solver. Use `diffrax.Heun()` (Stratonovich) or "
    "`diffrax.Euler()` (Itô) with the same path and adjoint; or keep the solve every "
    "so many steps, with `StochasticAdjoint(checkpoint_every=...)`; or use float64."
)


def is_not_inverse(solver: diffrax.AbstractSolver) -> str:
    name = type(solver).__name__
    return (
        f"`adjoint=StochasticAdjoint()`: `{name}.backward_step` is not the inverse of "
        f"`{name}.step`. At the last step of the solve, the one followed by the other "
        "does not lead back to the solution and the solver state. Gradients would be "
        "wrong. (If it is the inverse up to a small error, say so with "
        "`is_near_exact = True`.)"
    )


class ReturnError(eqx.Module):
    """By how much the way back misses the states of the solve.

    `weighted_error` is what the differences between states that were found and those
    known are worth to the loss, added up. `scale` is what it is compared with: the size
    of the outputs times that of their cotangents. `tolerance` is how much of it is let
    pass. If the solution `was_finite` in the end, and a state that is known is, but not
    as it was found, then it `is_lost`.
    """

    weighted_error: Float[Array, ""]
    scale: Float[Array, ""]
    was_finite: Bool[Array, ""]
    is_lost: Bool[Array, ""]
    tolerance: float = eqx.field(static=True)

    @staticmethod
    def none(scale: Float[Array, ""], y: Y, least_tolerance: float) -> "ReturnError":
        """What it is at the end of the solve: none."""
        eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(y)]
        tolerance = max([least_tolerance, *(x**_root for x in eps)])
        zero = jnp.zeros((), jnp.result_type(float))
        return ReturnError(zero, scale, are_finite(y), jnp.array(False), tolerance)

    def arrived(
        self, found: PyTree[Any], known: PyTree[Any], grad: PyTree[Array | None]
    ) -> "ReturnError":
        """The error with that of one more state, which is `known`, was `found` again,
        and has cotangent `grad`.
        """

        def weighted(grad, x, x0):
            return None if grad is None else jnp.sum(jnp.abs(grad * (x - x0)))

        more = jtu.tree_map(weighted, grad, found, known, is_leaf=lambda x: x is None)
        total = self.weighted_error + _total(more)
        is_lost = self.was_finite & are_finite(known) & ~are_finite(found)
        where = lambda x: (x.weighted_error, x.is_lost)
        return eqx.tree_at(where, self, (total, self.is_lost | is_lost))

    def is_too_large(self) -> Bool[Array, ""]:
        """Whether gradients are wrong, by more than what is tolerated. NaNs of the
        solution, of its cotangents and of derivatives are let pass: they speak for
        themselves. Not so those that undoing steps has made.
        """
        return self.is_lost | (self.weighted_error > self.tolerance * self.scale)


def are_finite(tree: PyTree[Any]) -> Bool[Array, ""]:
    """Whether all entries of all inexact arrays are."""
    return ~any_entry(lambda x: ~jnp.isfinite(x), tree)


def size_of_loss(
    largest_y: PyTree[Float[Array, "..."]],
    grad_ys: list[PyTree[Array]],
    outputs: PyTree[Array],
    grad_outputs: PyTree[Array | None],
    by_entry: bool = False,
) -> Float[Array, ""]:
    """The size of the outputs times that of their cotangents: `grad_ys` where it is the
    solution that is an output, and `grad_outputs`. The size of the solution is that at
    any time of the forward solve, as it may just pass through zero. `largest_y` has it
    for each entry; it is that of the largest entry of a leaf, or taken `by_entry`.
    """

    def product(grad, x, by_entry=False):
        if grad is None:
            return None
        # What has not been saved to is infinite.
        size = jnp.abs(jnp.where(jnp.isfinite(x), x, 0))
        return jnp.sum(jnp.abs(grad) * (size if by_entry else jnp.max(size, initial=0)))

    of_y = ft.partial(product, by_entry=by_entry)
    products = [jtu.tree_map(of_y, grad_y, largest_y) for grad_y in grad_ys]
    of_outputs = jtu.tree_map(
        product, grad_outputs, outputs, is_leaf=lambda x: x is None
    )
    return _total((products, of_outputs))


def _total(tree: PyTree[Array]) -> Float[Array, ""]:
    leaves = [x.astype(jnp.result_type(float)) for x in jtu.tree_leaves(tree)]
    return jnp.sum(jnp.stack([jnp.zeros(()), *leaves]))
