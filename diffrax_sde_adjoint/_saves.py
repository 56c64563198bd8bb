"""The gradient that reaches a step from the outputs that were saved in it.

The outputs of `SaveAt(t0, ts, t1)` lie in one buffer, in this order: the state at `t0`;
the states at those `ts` that were reached, each interpolated from the step it lies in;
and the final state. The backward sweep meets them from the last to the first.
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ._compat import DenseInfo, RealScalarLike, Y


class SavedCotangents(eqx.Module):
    """The cotangents of a solve's saved outputs.

    `grad_ys` has a leading axis over the buffer of outputs. `num_ts` is how many of
    `ts` were reached (all of them, unless the solve failed).
    """

    t0: bool = eqx.field(static=True)
    t1: bool = eqx.field(static=True)
    ts: Float[Array, " times"] | None
    grad_ys: PyTree[Array]
    num_ts: Int[Array, ""]

    def _grad(self, index: Int[Array, ""] | int) -> Y:
        return jtu.tree_map(lambda x: x[index], self.grad_ys)

    def grad_final_y(self, zero: Y) -> Y:
        """The cotangent of the state at the end of the solve."""
        return self._grad(self.num_ts + int(self.t0)) if self.t1 else zero

    def grad_dense_info(
        self,
        interpolation_cls: Callable[..., diffrax.AbstractLocalInterpolation],
        t0: RealScalarLike,
        t1: RealScalarLike,
        dense_info: DenseInfo,
        num_left: Int[Array, ""],
    ) -> tuple[DenseInfo, Int[Array, ""]]:
        """The cotangent of the `dense_info` of a step.

        `num_left` is the number of `ts` not met by the sweep before this step; the same
        after this step is returned as well.
        """
        inexact_info = eqx.filter(dense_info, eqx.is_inexact_array)
        grads = jtu.tree_map(jnp.zeros_like, inexact_info)
        if self.ts is None:
            return grads, num_left
        ts = self.ts

        def is_in_step(val):
            _, num_left = val
            return (num_left > 0) & (ts[num_left - 1] > t0)

        def add_grad(val):
            grads, num_left = val
            t = ts[num_left - 1]
            _, pull_back = eqx.filter_vjp(
                lambda info: interpolation_cls(t0=t0, t1=t1, **info).evaluate(t),
                dense_info,
            )
            (grad,) = pull_back(self._grad(num_left - 1 + int(self.t0)))
            grads = jtu.tree_map(lambda a, b: a + b, grads, grad)
            return grads, num_left - 1

        return lax.while_loop(is_in_step, add_grad, (grads, num_left))

    def add_grad_initial_y(self, grad_y0: Y, num_left: Int[Array, ""]) -> Y:
        """Adds the cotangents of the outputs that were saved before the first step, or
        at its very start: `num_left` of them, beside that of `SaveAt(t0=True)`.
        """
        num_initial = num_left + int(self.t0)

        def total(x, grad):
            is_initial = jnp.arange(len(grad)) < num_initial
            is_initial = is_initial.reshape((-1,) + (1,) * (grad.ndim - 1))
            return x + jnp.sum(jnp.where(is_initial, grad, 0), axis=0)

        return jtu.tree_map(total, grad_y0, self.grad_ys)
