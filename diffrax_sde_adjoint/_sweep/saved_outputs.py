"""The gradient that reaches a step from the outputs that were saved in it.

While a solve goes from step to step, diffrax writes to a buffer for each `SubSaveAt`:
first those of its `ts` that lie in the step, interpolated, and then, for `steps=n`, the
end of each `n`-th step. Beside these there are the `dense_info` of all steps for
`SaveAt(dense=True)`, and that of the last step for events. The backward sweep meets all
of this from the last to the first. What is saved before the first step and after the
last one does not pass through here: JAX differentiates it.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._autodiff.batched_vjp import any_of, where_active
from .._compat import DenseInfo, RealScalarLike, Y, save_y
from .._forward.records import Cotangents, Differentiated, Parameters
from .._forward.saved import Position
from .._forward.tape import Step
from .._misc import add_where_given, zeros_like


class SavedOutputs(eqx.Module):
    """The cotangents of all that is saved in the steps of a solve.

    Those of the outputs of each `SubSaveAt`, and of the `dense_info`s, have a leading
    axis over steps or what was saved in them. Of each, `steps` is `SubSaveAt.steps`.
    """

    steps: list[int] = eqx.field(static=True)
    interpolation_cls: Callable[..., diffrax.AbstractLocalInterpolation]
    parameters: Differentiated
    grad_ys: list[PyTree[Array | None]]
    grad_ts: list[Array]
    grad_dense_infos: PyTree[Array | None]
    grad_event_dense_info: PyTree[Array | None]

    def add_grad_y1(
        self,
        step: Step,
        next_t0: RealScalarLike,
        y1: Y,
        positions: list[Position],
        grads: Cotangents,
    ) -> tuple[list[Position], Cotangents]:
        """Adds what `SaveAt(steps=...)` saved at the end of a step to the cotangents of
        the parameters and of `y1`.
        """
        axes = self.parameters.axes
        positions = list(positions)
        for i, num in enumerate(self.steps):
            if num == 0:
                continue
            is_saved = (step.index + 1) % num == 0
            if axes:
                is_saved = is_saved & step.is_made
            num_left = positions[i].save_index - jnp.where(is_saved, 1, 0)
            positions[i] = Position(positions[i].ts_index, num_left)

            def add(grads, i=i, num_left=num_left, is_saved=is_saved):
                grad = self._grad_output(i, num_left)
                _, pull_back = self.parameters.vjp(
                    _evaluate, self._of_output(i), y1, next_t0, i
                )
                parameters, more = pull_back(
                    where_active(is_saved, grad, zeros_like(grad), axes),
                    grads.parameters,
                )
                y = add_where_given(grads.state.y, more)
                get = lambda grads: (grads.parameters, grads.state.y)
                return eqx.tree_at(get, grads, (parameters, y))

            if num == 1:
                grads = add(grads)
            else:
                grads = lax.cond(any_of(is_saved, axes), add, lambda x: x, grads)
        return positions, grads

    def add_grad_dense_info(
        self,
        step: Step,
        is_last: Bool[Array, ""],
        dense_info: DenseInfo,
        positions: list[Position],
        grads: Cotangents,
    ) -> tuple[list[Position], Cotangents, DenseInfo]:
        """The cotangent of the `dense_info` of a step, from what was saved within it;
        and those of the parameters, with what comes from the same.
        """
        grad_info = zeros_like(eqx.filter(dense_info, eqx.is_inexact_array))
        if self.grad_dense_infos is not None:
            at_step = jtu.tree_map(lambda x: x[step.index], self.grad_dense_infos)
            grad_info = add_where_given(grad_info, at_step)
        if self.grad_event_dense_info is not None:
            at_end = jtu.tree_map(
                lambda x: jnp.where(is_last, x, 0), self.grad_event_dense_info
            )
            grad_info = add_where_given(grad_info, at_end)

        positions = list(positions)
        grad_parameters = grads.parameters
        for i, ts in enumerate(self.parameters.all.save_ts):
            if ts is None or len(ts) == 0:
                continue
            # The others are not carried through the loop.
            relevant = eqx.filter(grad_parameters, self._of_output(i))
            positions[i], relevant, grad_info = self._add_grad_ts(
                i, step, dense_info, (positions[i], relevant, grad_info)
            )
            grad_parameters = eqx.combine(relevant, grad_parameters)
        grads = eqx.tree_at(lambda g: g.parameters, grads, grad_parameters)
        return positions, grads, grad_info

    def _add_grad_ts(
        self,
        i: int,
        step: Step,
        dense_info: DenseInfo,
        carry: tuple[Position, Parameters, DenseInfo],
    ) -> tuple[Position, Parameters, DenseInfo]:
        """Adds what `SubSaveAt` number `i` saved at those of its `ts` that are within a
        step to the cotangents of the parameters and of `dense_info`.
        """
        parameters, axes = self.parameters, self.parameters.axes
        ts = parameters.all.save_ts[i]

        def is_in_step(position):
            # What is saved at the start of the solve is saved in the first step.
            t = ts[position.ts_index - 1]
            is_in_step = (t > step.prev_t1) | (step.index == 0)
            is_in_step = (position.ts_index > 0) & is_in_step
            return is_in_step & step.is_made if axes else is_in_step

        def is_any_left(carry):
            return any_of(is_in_step(carry[0]), axes)

        def evaluate(parameters, dense_info, step, index, is_saved):
            # Far from the step, interpolation and function may overflow.
            t = where_active(is_saved, parameters.save_ts[i][index], step.t1, axes)
            interpolation = self.interpolation_cls(t0=step.t0, t1=step.t1, **dense_info)
            return _evaluate(parameters, interpolation.evaluate(t), t, i), t

        def add_grad(carry):
            position, grad_parameters, grad_info = carry
            new_position = Position(position.ts_index - 1, position.save_index - 1)
            num_left = new_position.save_index
            grad = (self._grad_output(i, num_left), self.grad_ts[i][num_left])
            is_saved = is_in_step(position)
            _, pull_back = parameters.vjp(
                evaluate,
                self._of_output(i),
                dense_info,
                step,
                new_position.ts_index,
                is_saved,
            )
            grad_parameters, more = pull_back(
                where_active(is_saved, grad, zeros_like(grad), axes), grad_parameters
            )
            position = where_active(is_saved, new_position, position, axes)
            return position, grad_parameters, add_where_given(grad_info, more)

        return lax.while_loop(is_any_left, add_grad, carry)

    def _of_output(self, i: int) -> Parameters:
        """Which parameters `SubSaveAt` number `i` depends on."""
        is_one = [i == j for j in range(len(self.steps))]
        # Without a function, what is saved is the solution.
        has_fn = self.parameters.nondiff.save_fns[i] is not save_y
        return Parameters(False, has_fn, is_one, is_one)

    def _grad_output(self, i: int, index: Int[Array, ""]) -> Any:
        return jtu.tree_map(lambda x: x[index], self.grad_ys[i])


def _evaluate(parameters: Parameters, y: Y, t: RealScalarLike, i: int) -> Any:
    """What `SubSaveAt` number `i` saves."""
    out = parameters.save_fns[i](t, y, parameters.args)
    return eqx.filter(out, eqx.is_inexact_array)
