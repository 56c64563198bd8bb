"""Going back through a solve by making its steps again."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from .._autodiff.batched_vjp import maximum
from .._compat import while_loop
from .._forward.tape import Page, Step
from .._misc import zeros_like
from .sweep import Sweep, SweepState


_T = TypeVar("_T")


def replay(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Makes the steps of a page again from its snapshot, and keeps the states that they
    start at, and their controls, to go back through them.
    """
    num_steps = maximum(page.num_steps, sweep.axes)

    def once(fn: Callable[[Step, _T], _T], step: Step, x: _T) -> _T:
        """`fn(step, x)`, apart from the arrays of all states, which are large: see
        `docs/how_it_works/small_loops.md`.
        """
        times, others = eqx.partition(step, eqx.is_array)

        # It is not known to XLA that this is a loop of one iteration. It would take out
        # of it what does not change, which is why the times do.
        def body(_, val):
            times, x = val
            return zeros_like(times), fn(eqx.combine(times, others), x)

        _, x = lax.fori_loop(0, jnp.minimum(num_steps, 1), body, (times, x))
        return x

    length = sweep.tape.steps_per_page
    assert page.snapshot is not None
    _, controls_struct = eqx.filter_eval_shape(
        sweep.step, page.step(jnp.array(0), True), page.snapshot
    )
    no_controls = zeros_like(controls_struct)

    def make_step(val):
        k, state0, kept = val
        # In a batch, elements with fewer steps stay at their last one, as in the sweep.
        last = jnp.maximum(page.num_steps - 1, 0)
        state1, controls = once(
            lambda step, val: sweep.step(step, val[0]),
            page.step(jnp.minimum(k, last), True),
            (state0, no_controls),
        )
        # The new tree goes first, as buffers are trees themselves.
        kept = jtu.tree_map(lambda x, xs: xs.at[k].set(x), (state0, controls), kept)
        return k + 1, state1, kept

    kept = jtu.tree_map(
        lambda x: jnp.broadcast_to(x, (length, *x.shape)), (page.snapshot, no_controls)
    )
    # The number of the step, the state that it starts at, and all that is kept.
    with jax.named_scope("replay"):
        _, _, kept = while_loop(
            lambda val: val[0] < num_steps,
            make_step,
            (jnp.array(0), page.snapshot, kept),
            buffers=lambda val: val[2],
            kind="lax",
        )

    def undo_step(
        k: Int[Array, ""], is_made: Bool[Array, ""], carry: SweepState
    ) -> SweepState:
        def undo(step, val):
            carry, state0, controls = val
            _, pull_back_controls = sweep.controls(step)
            carry = sweep.pull_back(step, state0, carry, controls, pull_back_controls)
            return carry, state0, controls

        state0, controls = jtu.tree_map(lambda x: x[k], kept)
        carry, *_ = once(undo, page.step(k, is_made), (carry, state0, controls))
        return carry

    return sweep.backwards(page.num_steps, undo_step, carry)
