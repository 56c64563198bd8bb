r"""Whether reversible Heun is stable on a solve, as seen by the gradient.

Beside the solution `y` it has a second one, `yhat`. Their distance grows where dynamics
contract, for $y' = -\lambda y$ like $e^{\lambda t}$, and where the vector field is
steep. Over a range of systems, no measure of it told good solutions from bad ones.

The way back knows what a change of the solver's state is worth to the loss: its product
with the cotangents. So at some points of the solve this is evaluated for the change
that would make the distance zero, from `(yhat, vf(yhat))` to `(y, vf(y))`. It is by how
much the loss is wrong, to first order, and it is compared with the size that the loss
has by how far the solution goes from its start. See "Limits" in
`docs/how_it_works/stochastic_adjoint.md`.
"""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._autodiff.batched_vjp import Axes
from .._compat import Y
from .._misc import any_entry
from .return_error import are_finite
from .tape import Tape


# Of OU processes, double wells, Heston, CIR and neural SDEs, those above had losses
# that were off by a tenth and more, or gradients off by more than their size. Those far
# below were about as accurate as with Heun's method. The second number is for single
# paths of solves whose mean is fine, where noise is strong and steps are coarse.
_tolerance = 0.03
_tolerance_of_one = 0.1

is_unstable = (
    "`adjoint=StochasticAdjoint()`: `ReversibleHeun` is not stable on this solve, so "
    "that the solution and its gradient are wrong. This happens where dynamics "
    "contract for long (a rate times the length of the solve above 4), and near roots, "
    "such as that of the variance in the Heston model. For an Itô SDE, use "
    "`diffrax.Euler()` on its terms without conversion; else `diffrax.Heun()` on the "
    "same terms, path and adjoint. Smaller steps seldom help, and `checkpoint_every` "
    "does not."
)
is_not_finite = (
    "`adjoint=StochasticAdjoint()`: the solution that `ReversibleHeun` arrives at is "
    "not finite. Use `diffrax.Heun()` on the same terms, path and adjoint, which is "
    "stable where dynamics contract. If its solution is not finite either, then steps "
    "are too long, or a vector field is not a number, such as a root or logarithm of "
    "a negative one."
)


class Spurious(eqx.Module):
    """What the distance is `worth` to the loss, at most; and the largest absolute value
    of each entry of the `change` of the solution from its start, as far as steps were
    undone right. Both are of the points seen so far, for one element of a batch.
    """

    worth: Float[Array, ""]
    change: PyTree[Float[Array, "..."]]

    @staticmethod
    def none(y: Y, y0: Y) -> "Spurious":
        """What is known at the end of the solve."""
        return Spurious(jnp.zeros((), jnp.result_type(float)), _change(y, y0))

    def at(self, worth: Float[Array, ""], y: Y, y0: Y) -> "Spurious":
        """The worth and the change with one more point of the solve."""
        worth = jnp.maximum(self.worth, jnp.abs(worth))
        change = jtu.tree_map(jnp.maximum, self.change, _change(y, y0))
        return Spurious(worth, change)

    def size_of_change(self, tape: Tape, y0: Y) -> PyTree[Float[Array, "..."]]:
        """The largest size of each entry of the change that is known in the end."""
        is_short = tape.num_pages <= 1

        def size(change_at_pages, largest_y, change, y0):
            y0 = jnp.abs(y0)
            known = jnp.maximum(change_at_pages, largest_y - y0)
            # A short solve has no more than one page. There may be any rounding error
            # in the states that were found again.
            found = jnp.where(is_short, jnp.minimum(change, largest_y + y0), 0)
            # If the solution does not move, the distance is rounding.
            rounding = float(jnp.finfo(largest_y.dtype).eps) ** 0.5 * largest_y
            return jnp.maximum(known, found) + rounding

        return jtu.tree_map(size, tape.largest_change, tape.largest_y, self.change, y0)

    def is_too_large(
        self, scale: Float[Array, ""], axes: Axes
    ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether the solution is wrong, over the batch; and whether it is this element
        that is. An element that is not finite does not speak for others.
        `scale` is the size of the loss by that of the change.
        """
        worth, scale = lax.stop_gradient((self.worth, scale))
        is_finite = jnp.isfinite(worth) & jnp.isfinite(scale)
        numbers = [jnp.where(is_finite, x, 0) for x in (worth, scale, 1.0)]
        if axes:
            numbers = lax.psum(numbers, axes)
        total_worth, total_scale, num = numbers
        tolerance = _tolerance + _tolerance_of_one / jnp.sqrt(jnp.maximum(num, 1))
        is_any = total_worth > tolerance * total_scale
        return is_any, is_any & (worth > tolerance * scale)


def has_overflowed(
    y: Y, y0: Y, parameters: PyTree[Any], grads: PyTree[Any]
) -> Bool[Array, ""]:
    """Whether a solve from `y0` ends with a `y` that is not finite, and there is no NaN
    in its parameters. Not so if the loss does not depend on it, which `grads`, the
    cotangents of what the solve returns, tell.
    """
    has_nan = any_entry(jnp.isnan, parameters)
    is_used = any_entry(lambda x: x != 0, grads)
    return ~are_finite(y) & are_finite(y0) & ~has_nan & is_used


def _change(y: Y, y0: Y) -> PyTree[Float[Array, "..."]]:
    return jtu.tree_map(lambda x, x0: jnp.abs(x - x0), y, y0)
