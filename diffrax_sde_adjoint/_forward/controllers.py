"""What is assumed of step size controllers: known of diffrax's, and looked up in those
that users wrote.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._autodiff.closures import Hoisted, hoist
from .._compat import Args, RealScalarLike, State, known_value, num_constant_steps
from .._misc import zeros_like


_known = (
    diffrax.ConstantStepSize,
    diffrax.StepTo,
    diffrax.PIDController,
    diffrax.ClipStepSizeController,
)


def _parts(
    controller: diffrax.AbstractStepSizeController,
) -> list[diffrax.AbstractStepSizeController]:
    """`controller`, and those that it is wrapped around."""
    if type(controller) is diffrax.ClipStepSizeController:
        return [controller, *_parts(controller.controller)]
    return [controller]


def _is_known(controller: diffrax.AbstractStepSizeController) -> bool:
    return all(type(x) in _known for x in _parts(controller))


def may_jump(controller: diffrax.AbstractStepSizeController) -> bool:
    """Whether a step may start elsewhere than where the one before it ended, or after a
    jump.
    """
    return not _is_known(controller) or any(
        isinstance(x, diffrax.ClipStepSizeController) and x.jump_ts is not None
        for x in _parts(controller)
    )


def known_num_steps(
    controller: diffrax.AbstractStepSizeController,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
) -> int | None:
    """How many steps a solve makes that begins with a new controller, unless it ends
    early; `None` if this is not known when it is traced.
    """
    if type(controller) is diffrax.StepTo:
        return len(controller.ts) - 1
    if type(controller) is not diffrax.ConstantStepSize or dt0 is None:
        return None
    start, end, step = map(known_value, (t0, t1, dt0))
    if start is None or end is None or step is None:
        return None
    num = num_constant_steps(controller, start, end, step)
    return num if num > 0 and _are_all_made(num, start, end, step) else None


def _are_all_made(num: int, t0: np.ndarray, t1: np.ndarray, dt0: np.ndarray) -> bool:
    """Whether it is sure that there are as many constant steps as planned. The first
    one is as long as `dt0`, by which it may miss the end; and diffrax makes one step of
    those that end within 100 units of rounding of it.
    """
    first = t0 + dt0
    if num == 1:
        return bool(first >= t1)
    last = max(float(first), float(t0) + (float(t1) - float(t0)) * (num - 1) / num)
    rounding = float(np.finfo(t1.dtype).eps) * max(abs(float(t0)), abs(float(t1)))
    return last < float(t1) - 200 * rounding


class _HoistedController(diffrax.AbstractStepSizeController):
    """`controller`, whose method `adapt_step_size` is `decide`: a function of the
    controller too, and of all that this refers to by closure.
    """

    controller: diffrax.AbstractStepSizeController
    decide: Hoisted

    def wrap(self, direction):
        return type(self)(self.controller.wrap(direction), self.decide)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        times = (t0, t1, error_order, _as_arrays(controller_state))
        return self.decide(self.controller, times, (y0, y1_candidate, args, y_error))


def close_over_controller(
    controller: diffrax.AbstractStepSizeController,
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    state: State,
    args: Args,
) -> tuple[diffrax.AbstractStepSizeController, bool]:
    """`controller`, which refers to no array by closure, and whether what it decides
    has a derivative with respect to the solution or `args`.
    """
    if _is_known(controller):
        return controller, False
    t0, t1, y = state.tprev, state.tnext, state.y
    _, y_error_struct, *_ = eqx.filter_eval_shape(
        solver.step, terms, t0, t1, y, args, state.solver_state, state.made_jump
    )
    times = (t0, t1, solver.error_order(terms), _as_arrays(state.controller_state))
    seen = (y, y, args, zeros_like(y_error_struct))

    def decide(controller, times, seen):
        t0, t1, error_order, controller_state = times
        return controller.adapt_step_size(t0, t1, *seen, error_order, controller_state)

    hoisted = hoist(decide, controller, times, seen)
    return _HoistedController(controller, hoisted), _is_differentiable(
        lambda seen: hoisted(controller, times, seen), seen
    )


def _as_arrays(controller_state: PyTree[Any]) -> PyTree[Any]:
    # diffrax's loop makes arrays of some of the numbers that it starts with.
    return jtu.tree_map(
        lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, controller_state
    )


def _is_differentiable(fn: Callable[[Any], Any], x: PyTree[Any]) -> bool:
    """Whether an output of `fn` has a derivative, as far as JAX can tell without
    numbers.
    """
    has_derivative = []

    @eqx.filter_custom_jvp
    def watch(out):
        return out

    @watch.def_jvp
    def _(primals, tangents):
        has_derivative.append(len(jtu.tree_leaves(tangents)) > 0)
        (out,) = primals
        (tangent_out,) = tangents
        return out, tangent_out

    def derivative():
        dynamic, static = eqx.partition(x, eqx.is_inexact_array)
        inner = lambda x: eqx.filter(watch(fn(eqx.combine(x, static))), eqx.is_array)
        eqx.filter_jvp(inner, (dynamic,), (zeros_like(dynamic),))

    eqx.filter_eval_shape(derivative)
    return any(has_derivative)
