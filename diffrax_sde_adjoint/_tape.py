"""What a forward solve records for the backward sweep: when its steps were made.

Only the times of accepted steps are recorded, one number a step. It is all that has to
be known of the forward solve, beside its end, to go back through its very steps.

The tape is cut into pages, and both the forward loop and the sweep are two nested
loops: over pages, and over the steps of a page. An inner loop handles one page alone.
This is for speed only. XLA runs the operations of a loop's body on the CPU one after
the other if none of them touches a large array (512 bytes), and otherwise through a
scheduler, which takes several times longer than a step of a small solve.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._compat import State, while_loop


_steps_per_page = 63


class Tape(eqx.Module):
    """The times of a solve's steps.

    Step `k` of page `i` was made from `pages[i, k]` to `pages[i, k + 1]`. All pages are
    filled to the end but the last one, which holds what is left of `num_steps`.
    """

    pages: Float[Array, "pages steps_per_page_plus_1"]
    num_steps: Int[Array, ""]

    @property
    def num_pages(self) -> Int[Array, ""]:
        return -(-self.num_steps // _steps_per_page)

    def num_steps_on_page(self, i: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.minimum(self.num_steps - i * _steps_per_page, _steps_per_page)


def loop_and_record(
    loop: Callable[..., tuple[State, Any]],
    *,
    init_state: State,
    max_steps: int,
    **kwargs: Any,
) -> tuple[State, Any, Tape]:
    """Calls diffrax's integration loop, and returns a tape beside what that returns.

    The loop itself is diffrax's; only the `while_loop` that it is built from is ours.
    This supports step size controllers that never leave a gap between steps.
    """
    recorded = []

    def outer_while_loop(cond_fun, body_fun, init_val, *, max_steps, buffers):
        num_pages = math.ceil(max_steps / _steps_per_page)
        dtype = init_val.tprev.dtype
        # Not zeros: in a batch, times are read here for elements that made no steps.
        init_pages = jnp.full((num_pages, _steps_per_page + 1), init_val.tprev, dtype)

        def is_running(state):
            return cond_fun(state) & (state.num_steps < max_steps)

        def fill_page(val):
            state, pages = val
            num_before = state.num_accepted_steps

            def has_room(val):
                state, _ = val
                num_on_page = state.num_accepted_steps - num_before
                return is_running(state) & (num_on_page < _steps_per_page)

            def step(val):
                state, page = val
                num_on_page = state.num_accepted_steps - num_before
                page = page.at[num_on_page + 1].set(state.tnext)
                return body_fun(state), page

            init_page = jnp.full(_steps_per_page + 1, state.tprev, dtype)
            state, page = while_loop(
                has_room,
                step,
                (state, init_page),
                buffers=lambda val: buffers(val[0]),
                kind="lax",
            )
            return state, pages.at[num_before // _steps_per_page].set(page)

        final_state, pages = while_loop(
            lambda val: is_running(val[0]),
            fill_page,
            (init_val, init_pages),
            buffers=lambda val: (*buffers(val[0]), val[1]),
            kind="lax",
        )
        recorded.append(Tape(pages, final_state.num_accepted_steps))
        return final_state

    final_state, aux_stats = loop(
        init_state=init_state,
        max_steps=max_steps,
        inner_while_loop=plain_while_loop,
        outer_while_loop=outer_while_loop,
        **kwargs,
    )
    [tape] = recorded
    return final_state, aux_stats, tape


def plain_while_loop(*args: Any, checkpoints: int | None = None, **kwargs: Any) -> Any:
    """The loop to give to diffrax where nothing is recorded or differentiated."""
    del checkpoints
    return while_loop(*args, kind="lax", **kwargs)
