"""Going back through a solve by making its steps again."""

import functools
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int

from .._autodiff.batched_vjp import maximum
from .._compat import BoolScalarLike
from .._forward.rows import loop_over_rows, repeated
from .._forward.steps import MadeStep, inputs_of_step, linearize_step
from .._forward.tape import Page, SolveState, Step
from .._misc import num_bytes, zeros_like
from .sweep import Sweep, SweepState


_T = TypeVar("_T")

# In bytes, of what XLA runs the fast way.
_small = 512


def replay(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Makes the steps of a page again from its snapshot, and keeps what is needed to go
    back through them.
    """
    num_steps = maximum(page.num_steps, sweep.axes)
    are_any = maximum(jnp.minimum(sweep.tape.num_steps, 1), sweep.axes)
    length = sweep.tape.steps_per_page
    assert page.snapshot is not None
    first = page.step(jnp.array(0), True)

    def inputs(step, state0, controls):
        return inputs_of_step(
            sweep.solver, step.t0, step.t1, state0, controls, step.made_jump
        )

    first_controls, _ = sweep.controls(first)
    linearized = linearize_step(
        sweep.parameters, *inputs(first, page.snapshot, first_controls)
    )

    def make(step, state0):
        controls, _ = sweep.controls(step)
        out, kept = linearized(*inputs(step, state0, controls))
        (y1, dense_info, solver_state1), _ = out
        return SolveState(y1, solver_state1), MadeStep(kept, y1, dense_info)

    def pull_back(step, made, carry):
        _, *fixed = inputs(step, None, None)
        back = functools.partial(linearized.pull_back, made.kept, tuple(fixed))
        return sweep.pull_back_made(step, made, back, carry)

    if length == 1:
        step = page.step(jnp.array(0), page.num_steps > 0)
        _, made = make(step, page.snapshot)
        return pull_back(step, made, carry)

    nothing = zeros_like(eqx.filter_eval_shape(make, first, page.snapshot)[1])

    def make_step(val):
        k, state0 = val
        # In a batch, elements with fewer steps stay at their last one, as in the sweep.
        last = jnp.maximum(page.num_steps - 1, 0)
        state1, made = _once(
            are_any,
            lambda step, val: make(step, val[0]),
            page.step(jnp.minimum(k, last), True),
            (state0, nothing),
        )
        return (k + 1, state1), made

    # What is carried is the number of the step, and the state that it starts at.
    with jax.named_scope("replay"):
        _, all_made = loop_over_rows(
            lambda val: val[0] < num_steps,
            make_step,
            (jnp.array(0), page.snapshot),
            lambda: repeated(nothing, length),
            index=lambda val: val[0],
            length=num_steps if isinstance(num_steps, int) else None,
        )

    def undo_step(
        k: Int[Array, ""], is_made: BoolScalarLike, made: MadeStep, carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        carry, _ = _once(
            are_any,
            lambda step, val: (pull_back(step, val[1], val[0]), val[1]),
            step,
            (carry, made),
        )
        return carry

    return sweep.backwards(page.num_steps, undo_step, carry, all_made)


def _once(
    are_any: Int[Array, ""], fn: Callable[[Step, _T], _T], step: Step, x: _T
) -> _T:
    """`fn(step, x)`, if there `are_any` steps: apart from the arrays of all, which are
    large, if what is carried is small. See `docs/how_it_works/small_loops.md`.
    """
    if max(map(num_bytes, jtu.tree_leaves(x)), default=0) > _small:
        return fn(step, x)
    times, others = eqx.partition(step, eqx.is_array)

    # It is not known to XLA that this is a loop of one iteration. It would take out of
    # it what does not change, which is why the times do.
    def body(_, val):
        times, x = val
        return zeros_like(times), fn(eqx.combine(times, others), x)

    _, x = lax.fori_loop(0, are_any, body, (times, x))
    return x
