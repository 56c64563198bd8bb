"""Going back through a solve by making its steps again."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from .._batching import maximum
from .._compat import while_loop
from .._tape import Page, Step
from .._trees import zeros_like
from .sweep import Sweep, SweepState


_T = TypeVar("_T")


def replay(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Makes the steps of a page again from its snapshot, and keeps their states to go
    back through them.
    """
    num_steps = maximum(page.num_steps, sweep.axes)

    def once(fn: Callable[[Step, _T], _T], step: Step, x: _T) -> _T:
        """`fn(step, x)`, apart from the array of all states, which is large: see
        `_tape.py`.
        """
        times, others = eqx.partition(step, eqx.is_array)

        # It is not known to XLA that this is a loop of one iteration. It would take out
        # of it what does not change, which is why the times do.
        def body(_, val):
            times, x = val
            return zeros_like(times), fn(eqx.combine(times, others), x)

        _, x = lax.fori_loop(0, jnp.minimum(num_steps, 1), body, (times, x))
        return x

    def make_step(val):
        k, state, kept = val
        # In a batch, elements with fewer steps stay at their last one, as in the sweep.
        last = jnp.maximum(page.num_steps - 1, 0)
        step = page.step(jnp.minimum(k, last), True)
        state = once(sweep.step, step, state)
        # The new tree goes first, as buffers are trees themselves.
        kept = jtu.tree_map(lambda x, xs: xs.at[k + 1].set(x), state, kept)
        return k + 1, state, kept

    length = sweep.tape.steps_per_page
    start = page.snapshot
    kept = jtu.tree_map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), start)
    _, _, kept = while_loop(
        lambda val: val[0] < num_steps - 1,
        make_step,
        (jnp.array(0), start, kept),
        buffers=lambda val: val[2],
        kind="lax",
    )

    def undo_step(
        k: Int[Array, ""], is_made: Bool[Array, ""], carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        state0 = jtu.tree_map(lambda x: x[k], kept)
        _, carry = once(
            lambda step, val: (val[0], sweep.pull_back(step, *val, None)[0]),
            step,
            (state0, carry),
        )
        return carry

    return sweep.backwards(page.num_steps, undo_step, carry)
