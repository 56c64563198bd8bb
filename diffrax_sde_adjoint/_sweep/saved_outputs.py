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

from .._autodiff.batched_vjp import Axes, any_of, vjp, where_active
from .._compat import DenseInfo, RealScalarLike, Y, save_y
from .._forward.saved import SaveInputs
from .._forward.tape import Step
from .._misc import add_where_given, zeros_like


class Position(eqx.Module):
    """How far a `SubSaveAt` had come: the number of its `ts`, and that of all of its
    outputs, which were saved before the end of a step.
    """

    ts_index: Int[Array, ""]
    save_index: Int[Array, ""]


class Saved(eqx.Module):
    """The cotangents of all that is saved in the steps of a solve.

    Those of the outputs of each `SubSaveAt`, and of the `dense_info`s, have a leading
    axis over steps or what was saved in them.
    """

    steps: list[int] = eqx.field(static=True)
    axes: Axes = eqx.field(static=True)
    inputs: SaveInputs  # that are not differentiated; the others are `None`
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
        diff_inputs: SaveInputs,
        grads: tuple[SaveInputs, Y],
    ) -> tuple[list[Position], tuple[SaveInputs, Y]]:
        """Adds what `SaveAt(steps=...)` saved at the end of a step to the cotangents
        `grads` of the inputs and of `y1`.
        """
        positions = list(positions)
        for i, num in enumerate(self.steps):
            if num == 0:
                continue
            is_saved = (step.index + 1) % num == 0
            if self.axes:
                is_saved = is_saved & step.is_made
            num_left = positions[i].save_index - jnp.where(is_saved, 1, 0)
            positions[i] = Position(positions[i].ts_index, num_left)

            def evaluate(inputs, y, others, i=i):
                t, nondiff_inputs = others
                return _evaluate(i, t, y, eqx.combine(inputs, nondiff_inputs))

            def more(i=i, num_left=num_left, is_saved=is_saved, evaluate=evaluate):
                grad = self._grad_output(i, num_left)
                _, pull_back = vjp(
                    evaluate,
                    self.axes,
                    self._relevant(i, diff_inputs),
                    y1,
                    (next_t0, self.inputs),
                )
                return pull_back(
                    where_active(is_saved, grad, zeros_like(grad), self.axes)
                )

            if num == 1:
                grads = add_where_given(grads, more())
            else:
                zeros = zeros_like(eqx.filter_eval_shape(more))
                is_needed = any_of(is_saved, self.axes)
                nothing = lambda zeros=zeros: zeros
                grads = add_where_given(grads, lax.cond(is_needed, more, nothing))
        return positions, grads

    def add_grad_dense_info(
        self,
        step: Step,
        is_last: Bool[Array, ""],
        dense_info: DenseInfo,
        interpolation_cls: Callable[..., diffrax.AbstractLocalInterpolation],
        positions: list[Position],
        diff_inputs: SaveInputs,
        grad_inputs: SaveInputs,
    ) -> tuple[list[Position], DenseInfo, SaveInputs]:
        """The cotangent of the `dense_info` of a step, from what was saved within it;
        and the cotangents `grad_inputs` of the inputs, with what comes from the same.
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
        for i, ts in enumerate(eqx.combine(diff_inputs, self.inputs).ts):
            if ts is None or len(ts) == 0:
                continue

            def is_in_step(position, ts=ts):
                # What is saved at the start of the solve is saved in the first step.
                t = ts[position.ts_index - 1]
                is_in_step = (t > step.prev_t1) | (step.index == 0)
                is_in_step = (position.ts_index > 0) & is_in_step
                return is_in_step & step.is_made if self.axes else is_in_step

            def is_any_left(val):
                position, *_ = val
                return any_of(is_in_step(position), self.axes)

            def evaluate(inputs, dense_info, others, i=i):
                step, index, nondiff_inputs = others
                inputs = eqx.combine(inputs, nondiff_inputs)
                t = inputs.ts[i][index]
                interpolation = interpolation_cls(t0=step.t0, t1=step.t1, **dense_info)
                return _evaluate(i, t, interpolation.evaluate(t), inputs), t

            def add_grad(val, i=i, evaluate=evaluate):
                position, *grads = val
                new_position = Position(position.ts_index - 1, position.save_index - 1)
                num_left = new_position.save_index
                grad = (self._grad_output(i, num_left), self.grad_ts[i][num_left])
                is_saved = is_in_step(position)
                _, pull_back = vjp(
                    evaluate,
                    self.axes,
                    self._relevant(i, diff_inputs),
                    dense_info,
                    (step, new_position.ts_index, self.inputs),
                )
                more = pull_back(
                    where_active(is_saved, grad, zeros_like(grad), self.axes)
                )
                position = where_active(is_saved, new_position, position, self.axes)
                return position, *add_where_given(grads, list(more))

            positions[i], grad_relevant, grad_info = lax.while_loop(
                is_any_left,
                add_grad,
                (positions[i], self._relevant(i, grad_inputs), grad_info),
            )
            grad_inputs = eqx.combine(grad_relevant, grad_inputs)
        return positions, grad_info, grad_inputs

    def _grad_output(self, i: int, index: Int[Array, ""]) -> Any:
        return jtu.tree_map(lambda x: x[index], self.grad_ys[i])

    def _relevant(self, i: int, inputs: SaveInputs) -> SaveInputs:
        """Those of the inputs that `SubSaveAt` number `i` depends on."""
        keep_if = lambda pred, tree: jtu.tree_map(lambda x: x if pred else None, tree)
        return SaveInputs(
            keep_if(self.inputs.fns[i] is not save_y, inputs.args),
            [keep_if(i == j, fn) for j, fn in enumerate(inputs.fns)],
            [keep_if(i == j, ts) for j, ts in enumerate(inputs.ts)],
        )


def _evaluate(i: int, t: RealScalarLike, y: Y, inputs: SaveInputs) -> Any:
    """What `SubSaveAt` number `i` saves."""
    return eqx.filter(inputs.fns[i](t, y, inputs.args), eqx.is_inexact_array)
