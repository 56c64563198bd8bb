"""What a forward solve records for the backward sweep.

That is when its accepted steps were made, one number a step (or two, where the step
size controller may leave gaps between steps); and, if wanted, snapshots of the solve.
Everything else about it can be found again from these and its end.

The tape is cut into pages, with a snapshot at the start of each, and both the forward
loop and the sweep are two nested loops: over pages, and over the steps of a page. Where
there are no snapshots this is for speed only, of small solves on a CPU: see
`docs/how_it_works/small_loops.md`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, PyTree

from .._compat import BoolScalarLike, RealScalarLike, State, Y, while_loop
from .._misc import in_scope, zeros_like


_T = TypeVar("_T")

# Of the pages that are cut in two. Each part costs two more evaluations of the vector
# field, so none is short.
shortest_in_two_parts = 16


class SolveState(eqx.Module):
    """The state of a solve between two steps."""

    y: Y
    solver_state: PyTree[Any]


class Tape(eqx.Module):
    """The times of a solve's accepted steps, and snapshots of it.

    Step `k` of page `i` ended at `ends[i, k + 1]`, after one that ended at `ends[i, k]`
    (for the first step, this is where the solve starts). It started there or, where
    there may be gaps between steps, at `starts[i, k]`. In the latter case the two ends
    of a step are swapped if it was made after a jump; but never `ends[i, 0]`. All pages
    are filled to the end but the last one, which holds what is left of `num_steps`.
    `snapshots` are at the start of each page, and `made` is what was kept of each step.
    `largest_y` has the largest absolute value of each entry of the solution, at any
    time, and `largest_change` that of its difference from the initial one, at the ends
    of pages. If it is known when a solve is traced how many steps it makes, loops over
    them have a known length: on an accelerator, others ask the host in each step
    whether to go on.
    """

    ends: Float[Array, "pages steps_per_page_plus_1"]
    starts: Float[Array, "pages steps_per_page"] | None
    snapshots: SolveState | None
    largest_y: PyTree[Float[Array, "..."]]
    largest_change: PyTree[Float[Array, "..."]]
    num_steps: Int[Array, ""]
    made: PyTree[Array] | None = None
    known_num_steps: int | None = eqx.field(static=True, default=None)

    @property
    def steps_per_page(self) -> int:
        return self.ends.shape[-1] - 1

    @property
    def num_pages(self) -> Int[Array, ""] | int:
        known = self.known_num_steps
        return -(-(self.num_steps if known is None else known) // self.steps_per_page)

    def page(self, i: Int[Array, ""]) -> "Page":
        ends, starts, snapshot, made = jtu.tree_map(
            lambda x: x[i], (self.ends, self.starts, self.snapshots, self.made)
        )
        num_before = i * self.steps_per_page
        num_steps = self.steps_per_page
        if not are_full(self.known_num_steps, num_steps):
            num_steps = jnp.minimum(self.num_steps - num_before, num_steps)
        first = jnp.zeros_like(self.num_steps)
        return Page(ends, starts, snapshot, num_before, first, num_steps, made)

    @property
    def parts_per_page(self) -> int:
        return 1 if self.steps_per_page < shortest_in_two_parts else 2

    def part(self, i: Int[Array, ""]) -> "Page":
        """A page, or a half of it: then there is a point between two parts in every
        solve of at least two steps.
        """
        page = self.page(i // self.parts_per_page)
        if self.parts_per_page == 1:
            return page
        half = page.num_steps // 2
        is_second = i % 2 == 1
        first = jnp.where(is_second, half, 0)
        num_steps = half
        if not isinstance(half, int) or 2 * half != page.num_steps:
            num_steps = jnp.where(is_second, page.num_steps - half, half)
        return eqx.tree_at(lambda p: (p.first, p.num_steps), page, (first, num_steps))


class Step(eqx.Module):
    """The accepted step number `index`, counted from zero, after one that ended at
    `prev_t1`. In a batch, it may be that only other elements made so many steps.
    """

    prev_t1: Float[Array, ""]
    t0: Float[Array, ""]
    t1: Float[Array, ""]
    made_jump: BoolScalarLike
    index: Int[Array, ""]
    is_made: BoolScalarLike


class Page(eqx.Module):
    """The `num_steps` steps of a page of a tape from its step `first` on. Before the
    page, there are `num_before` others.
    """

    ends: Float[Array, " steps_per_page_plus_1"]
    starts: Float[Array, " steps_per_page"] | None
    snapshot: SolveState | None
    num_before: Int[Array, ""]
    first: Int[Array, ""]
    num_steps: Int[Array, ""] | int
    made: PyTree[Array] | None

    def step(self, k: Int[Array, ""], is_made: BoolScalarLike) -> Step:
        k = self.first + k
        index = self.num_before + k
        end = self.ends[k + 1]
        if self.starts is None:
            start = self.ends[k]
            return Step(start, start, end, False, index, is_made)
        start = self.starts[k]
        is_swapped_before = (k > 0) & (self.starts[k - 1] > self.ends[k])
        prev_t1 = jnp.where(is_swapped_before, self.starts[k - 1], self.ends[k])
        t0, t1 = jnp.minimum(start, end), jnp.maximum(start, end)
        return Step(prev_t1, t0, t1, start > end, index, is_made)


def are_full(num_steps: int | None, steps_per_page: int) -> bool:
    """Whether it is known that pages are filled to the end, the last one too."""
    return num_steps is not None and num_steps % steps_per_page == 0


@in_scope("forward_solve")
def loop_and_record(
    cond_fun: Callable[[State], Bool[Array, ""]],
    body_fun: Callable[[State], State],
    init_state: State,
    *,
    max_steps: int,
    buffers: Callable[[State], Any],
    steps_per_page: int,
    may_have_gaps: bool,
    take_snapshots: bool,
    first_step: Callable[[State], Any] | None = None,
    num_steps: int | None = None,
) -> tuple[State, Tape]:
    """Runs the loop of a solve, with the arguments that diffrax calls its
    `outer_while_loop` with, and records it. It makes `num_steps`, if that is known.

    If steps are kept, what is kept of each is in the solver's state after it. It is not
    carried there, as it is large. What would be kept of a `first_step` is the first to
    be written, as this is looked at for elements of a batch that made none.
    """
    num_pages = max(1, math.ceil((num_steps or max_steps) / steps_per_page))
    first = no_step = None
    if first_step is not None:
        no_step = zeros_like(eqx.filter_eval_shape(first_step, init_state))
        first = first_step(init_state) if num_steps is None else no_step

    def make_step(state):
        if first_step is None:
            return body_fun(state), None
        # It does not look at the step before.
        new_state = body_fun(_with_solver_state(state, (state.solver_state, no_step)))
        solver_state, made = new_state.solver_state
        return _with_solver_state(new_state, solver_state), made

    init_pages = _empty_pages(
        init_state, num_pages, steps_per_page, may_have_gaps, first
    )

    def get_snapshot(state):
        return SolveState(state.y, state.solver_state) if take_snapshots else None

    init_snapshots = jtu.tree_map(
        lambda x: jnp.broadcast_to(x, (num_pages, *jnp.shape(x))),
        get_snapshot(init_state),
    )

    is_full = are_full(num_steps, steps_per_page)

    def is_running(state):
        return cond_fun(state) & (state.num_steps < max_steps)

    def fill_page(val):
        state, prev_t1, (largest_y, largest_change), pages, all_snapshots = val
        i = state.num_accepted_steps // steps_per_page
        snapshot = get_snapshot(state)
        *init_times, init_made = init_pages
        page = (
            *jtu.tree_map(lambda x: jnp.full(x.shape[1:], prev_t1), init_times),
            jtu.tree_map(lambda x: jnp.zeros(x.shape[1:], x.dtype), init_made),
        )
        # The same, but for what is written when the page is full.
        val = (state, prev_t1, largest_y, page)
        val = _take_steps(is_running, make_step, buffers, steps_per_page, is_full, val)
        state, prev_t1, largest_y, page = val
        # The new trees go first, as buffers are trees themselves.
        write = lambda new, old: old.at[i].set(new)
        pages = jtu.tree_map(write, page, pages)
        all_snapshots = jtu.tree_map(write, snapshot, all_snapshots)
        change = jtu.tree_map(jnp.subtract, state.y, init_state.y)
        largest_change = jtu.tree_map(_larger, largest_change, change)
        return state, prev_t1, (largest_y, largest_change), pages, all_snapshots

    # The loop over pages carries the state of the solve, the end of the last accepted
    # step, the largest size of each entry of the solution and of its change, the pages
    # and the snapshots.
    init_largest_y = jtu.tree_map(jnp.abs, init_state.y)
    init_largest = (init_largest_y, jtu.tree_map(jnp.zeros_like, init_largest_y))
    final_state, _, largest, (starts, ends, made), snapshots = _loop(
        lambda val: is_running(val[0]),
        fill_page,
        (init_state, init_state.tprev, init_largest, init_pages, init_snapshots),
        buffers=lambda val: (*buffers(val[0]), *val[3:]),
        length=None if num_steps is None else num_pages,
    )
    num_made = jnp.asarray(final_state.num_accepted_steps)
    tape = Tape(ends, starts, snapshots, *largest, num_made, made, num_steps)
    return final_state, tape


def _empty_pages(
    init_state: State,
    num_pages: int,
    steps_per_page: int,
    may_have_gaps: bool,
    first: PyTree[Array] | None,
) -> tuple[Array | None, Array, PyTree[Array] | None]:
    """The starts and the ends of steps, and what is kept of each."""
    # Not zeros: in a batch, a step is made from here for elements that made none.
    full = lambda *shape: jnp.full(shape, init_state.tprev)
    starts = full(num_pages, steps_per_page) if may_have_gaps else None
    ends = full(num_pages, steps_per_page + 1)
    zeros = lambda x: jnp.zeros((num_pages, steps_per_page, *x.shape), x.dtype)
    return starts, ends, jtu.tree_map(lambda x: zeros(x).at[0, 0].set(x), first)


def _take_steps(
    is_running: Callable[[State], Bool[Array, ""]],
    make_step: Callable[[State], tuple[State, Any]],
    buffers: Callable[[State], Any],
    steps_per_page: int,
    is_full: bool,
    init_val: tuple[State, RealScalarLike, Y, Any],
) -> tuple[State, RealScalarLike, Y, Any]:
    """Takes steps until a page is full. What is carried is the state of the solve, the
    end of the last accepted step, the largest size of each entry of the solution, and
    the page.
    """
    num_before = init_val[0].num_accepted_steps

    def has_room(val):
        state, *_ = val
        num_on_page = state.num_accepted_steps - num_before
        return is_running(state) & (num_on_page < steps_per_page)

    step = lambda val: _step_and_write(make_step, num_before, *val)
    if steps_per_page == 1:
        return step(init_val)
    return _loop(
        has_room,
        step,
        init_val,
        buffers=lambda val: (*buffers(val[0]), val[3][2]),
        length=steps_per_page if is_full else None,
    )


@in_scope("forward_step")
def _step_and_write(
    make_step: Callable[[State], tuple[State, Any]],
    num_before: Int[ArrayLike, ""],
    state: State,
    prev_t1: Float[Array, ""],
    largest_y: PyTree[Float[Array, "..."]],
    page: tuple[Array | None, Array, PyTree[Array]],
) -> tuple[State, Array, PyTree[Array], tuple[Array | None, Array, PyTree[Array]]]:
    """Makes a step, and writes when it was to the `starts` and `ends` of a page, before
    which there are `num_before` steps; and what is kept of it to `made`.
    """
    starts, ends, made = page
    # On a page of one step, what is written is the page.
    is_page = ends.shape[-1] == 2
    k = 0 if is_page else state.num_accepted_steps - num_before
    # A rejected step is overwritten by the next one.
    start, end = state.tprev, state.tnext
    num_accepted = state.num_accepted_steps
    if starts is not None:
        swap = jnp.asarray(state.made_jump)
        start, end = jnp.where(swap, end, start), jnp.where(swap, start, end)
        starts = starts.at[k].set(start)
    new_state, new = make_step(state)
    # The new tree goes first, as buffers are trees themselves.
    made = jtu.tree_map(lambda x, xs: xs.at[k].set(x), new, made)
    is_accepted = new_state.num_accepted_steps > num_accepted
    prev_t1 = jnp.where(is_accepted, state.tnext, prev_t1)
    largest_y = jtu.tree_map(_larger, largest_y, new_state.y)
    ends = ends.at[k + 1].set(end)
    return new_state, prev_t1, largest_y, (starts, ends, made)


def _with_solver_state(state: State, solver_state: PyTree[Any]) -> State:
    return dataclasses.replace(state, solver_state=solver_state)


def _loop(
    cond_fun: Callable[[_T], Bool[Array, ""]],
    body_fun: Callable[[_T], _T],
    init_val: _T,
    *,
    buffers: Callable[[_T], Any],
    length: int | None,
) -> _T:
    """A loop: of some length if this is known, and otherwise while `cond_fun` holds."""
    if length is None:
        return while_loop(cond_fun, body_fun, init_val, buffers=buffers, kind="lax")
    _, val = while_loop(
        lambda val: val[0] < length,
        lambda val: (val[0] + 1, body_fun(val[1])),
        (jnp.array(0), init_val),
        buffers=lambda val: buffers(val[1]),
        kind="lax",
    )
    return val


def _larger(
    largest: Float[Array, "*shape"], y: Inexact[Array, "*shape"]
) -> Float[Array, "*shape"]:
    # By entry, as XLA is slow to reduce arrays on a CPU, and would do so in every step.
    return jnp.maximum(largest, jnp.abs(y))


def plain_while_loop(*args: Any, checkpoints: int | None = None, **kwargs: Any) -> Any:
    """The loop to give to diffrax where nothing is recorded or differentiated."""
    del checkpoints
    return while_loop(*args, kind="lax", **kwargs)
