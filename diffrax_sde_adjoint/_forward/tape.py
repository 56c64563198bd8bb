"""What a forward solve records for the backward sweep.

That is when its accepted steps were made, one number a step (or two, where the step
size controller may leave gaps between steps); and, if wanted, snapshots of the solve.
Everything else about it can be found again from these and its end.

The tape is cut into pages, and both the forward loop and the sweep are two nested
loops: over pages, and over the steps of a page. Snapshots are at the start of pages.
Where there are none this is for speed only, of small solves on a CPU: see
`docs/how_it_works/small_loops.md`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from .._compat import BoolScalarLike, RealScalarLike, State, Y, while_loop
from .._misc import in_scope, zeros_like
from .rows import loop_over_rows, repeated, set_row


# What is carried from step to step: the state of the solve, the end of the last
# accepted step, and the largest size of each entry of the solution.
_Carry = tuple[State, RealScalarLike, PyTree[Float[Array, "..."]]]
# What is written of each: when it started, if this is not where the one before ended;
# when it ended; and what is kept of it.
_Rows = tuple[Any, Any, PyTree[Array]]

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
    `snapshots` are at the start of each page, or of every `snapshot_every`th one, and
    `made` is what was kept of each step.
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
    snapshot_every: int = eqx.field(static=True, default=1)

    @property
    def steps_per_page(self) -> int:
        return self.ends.shape[-1] - 1

    @property
    def num_pages(self) -> Int[Array, ""] | int:
        known = self.known_num_steps
        return -(-(self.num_steps if known is None else known) // self.steps_per_page)

    @property
    def rows(self) -> tuple[Any, ...]:
        """What has a row for each page."""
        snapshots = self.snapshots if self.snapshot_every == 1 else None
        return self.ends, self.starts, snapshots, self.made

    def page(self, i: Int[Array, ""], row: tuple[Any, ...] | None = None) -> "Page":
        """A page, whose row of all `rows` may be known."""
        ends, starts, snapshot, made = (
            jtu.tree_map(lambda x: x[i], self.rows) if row is None else row
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


class _Layout(NamedTuple):
    """Of the pages of a tape. `no_step` is what is kept of one step, as zeros."""

    num_pages: int
    steps_per_page: int
    snapshot_every: int | None
    may_have_gaps: bool
    no_step: PyTree[Array] | None

    def empty(self, t: RealScalarLike, *shape: int) -> _Rows:
        """Places for steps. All are at `t`, as in a batch a step is made there for
        elements that made none.
        """
        times = jnp.full(shape, t)
        zeros = lambda x: jnp.zeros((*shape, *x.shape), x.dtype)
        made = jtu.tree_map(zeros, self.no_step)
        return times if self.may_have_gaps else None, times, made

    def empty_page(self, t: RealScalarLike) -> _Rows:
        return self.empty(t, self.steps_per_page)

    def empty_pages(
        self, init_state: State, first_step: Callable[[State], Any] | None
    ) -> tuple[Any, ...]:
        t0, num = init_state.tprev, self.num_pages
        starts, ends, made = self.empty(t0, num, self.steps_per_page)
        ends = jnp.pad(ends, ((0, 0), (1, 0)), mode="edge")
        if first_step is not None:
            first = first_step(init_state)
            made = jtu.tree_map(lambda x, xs: xs.at[0, 0].set(x), first, made)
        return starts, ends, made, repeated(self.snapshot(init_state), num)

    def snapshot(self, state: State) -> SolveState | None:
        """What is written of the start of each page."""
        if self.snapshot_every is None or self.is_sparse:
            return None
        return SolveState(state.y, state.solver_state)

    @property
    def is_sparse(self) -> bool:
        """Whether snapshots are not of all pages. Then the loop over pages carries
        them, and a place for one more.
        """
        return self.every > 1

    @property
    def every(self) -> int:
        return self.snapshot_every or 1

    def sparse_snapshots(self, init_state: State) -> SolveState | None:
        if not self.is_sparse:
            return None
        init = SolveState(init_state.y, init_state.solver_state)
        return repeated(init, 1 + math.ceil(self.num_pages / self.every))

    def set_sparse(
        self, snapshots: SolveState | None, state: State
    ) -> SolveState | None:
        """With the state at the start of a page. What is written to one place last, and
        so stays, is that of a page of which there is to be a snapshot.
        """
        if not self.is_sparse:
            return None
        page = state.num_accepted_steps // self.steps_per_page
        snapshot = SolveState(state.y, state.solver_state)
        return set_row(snapshots, -(-page // self.every), snapshot)


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
    snapshot_every: int | None,
    first_step: Callable[[State], Any] | None = None,
    num_steps: int | None = None,
) -> tuple[State, Tape]:
    """Runs the loop of a solve, with the arguments that diffrax calls its
    `outer_while_loop` with, and records it. It makes `num_steps`, if that is known; and
    only then may `snapshot_every` be more than one page.

    If steps are kept, what is kept of each is in the solver's state after it. It is not
    carried there, as it is large. What would be kept of a `first_step` is the first to
    be written, as this is looked at for elements of a batch that made none.
    """
    no_step = None
    if first_step is not None:
        no_step = zeros_like(eqx.filter_eval_shape(first_step, init_state))
    num_pages = max(1, math.ceil((num_steps or max_steps) / steps_per_page))
    layout = _Layout(num_pages, steps_per_page, snapshot_every, may_have_gaps, no_step)
    assert num_steps is not None or not layout.is_sparse
    is_running = lambda state: cond_fun(state) & (state.num_steps < max_steps)
    make_step = _making_steps(body_fun, no_step)

    def fill_page(val):
        state, prev_t1, (largest_y, largest_change), sparse = val
        page_start, snapshot = prev_t1, layout.snapshot(state)
        sparse = layout.set_sparse(sparse, state)
        (state, prev_t1, largest_y), (starts, ends, made) = _take_steps(
            is_running,
            make_step,
            (state, prev_t1, largest_y),
            layout,
            buffers=buffers,
            is_full=are_full(num_steps, steps_per_page),
        )
        ends = jnp.concatenate([page_start[None], ends])
        change = jtu.tree_map(jnp.subtract, state.y, init_state.y)
        largest_change = jtu.tree_map(_larger, largest_change, change)
        val = (state, prev_t1, (largest_y, largest_change), sparse)
        return val, (starts, ends, made, snapshot)

    # The loop over pages carries the state of the solve, the end of the last accepted
    # step, the largest size of each entry of the solution and of its change; and
    # snapshots, if these are sparse.
    init_largest_y = jtu.tree_map(jnp.abs, init_state.y)
    init_largest = (init_largest_y, jtu.tree_map(jnp.zeros_like, init_largest_y))
    sparse = layout.sparse_snapshots(init_state)
    val, (starts, ends, made, snapshots) = loop_over_rows(
        lambda val: is_running(val[0]),
        fill_page,
        (init_state, init_state.tprev, init_largest, sparse),
        lambda: layout.empty_pages(init_state, first_step),
        index=lambda val: val[0].num_accepted_steps // steps_per_page,
        buffers=lambda val: buffers(val[0]),
        length=None if num_steps is None else num_pages,
    )
    final_state, _, largest, sparse = val
    if layout.is_sparse:
        snapshots = jtu.tree_map(lambda x: x[:-1], sparse)
    num_made = jnp.asarray(final_state.num_accepted_steps)
    tape = Tape(
        ends, starts, snapshots, *largest, num_made, made, num_steps, layout.every
    )
    return final_state, tape


def _making_steps(
    body_fun: Callable[[State], State], no_step: PyTree[Array] | None
) -> Callable[[State], tuple[State, PyTree[Array] | None]]:
    """`body_fun`, which also returns what is kept of the step that it makes."""

    def make_step(state):
        if no_step is None:
            return body_fun(state), None
        # It does not look at the step before.
        new_state = body_fun(_with_solver_state(state, (state.solver_state, no_step)))
        solver_state, made = new_state.solver_state
        return _with_solver_state(new_state, solver_state), made

    return make_step


def _take_steps(
    is_running: Callable[[State], Bool[Array, ""]],
    make_step: Callable[[State], tuple[State, Any]],
    init_val: _Carry,
    layout: _Layout,
    *,
    buffers: Callable[[State], Any],
    is_full: bool,
) -> tuple[_Carry, _Rows]:
    """Takes steps until a page is full."""
    state, prev_t1, _ = init_val
    num_before, steps_per_page = state.num_accepted_steps, layout.steps_per_page
    step = lambda val: _step_and_row(make_step, layout.may_have_gaps, *val)
    if steps_per_page == 1:
        # What is written is the page.
        val, row = step(init_val)
        return val, jtu.tree_map(lambda x: x[None], row)
    num_on_page = lambda val: val[0].num_accepted_steps - num_before
    return loop_over_rows(
        lambda val: is_running(val[0]) & (num_on_page(val) < steps_per_page),
        step,
        init_val,
        lambda: layout.empty_page(prev_t1),
        index=num_on_page,
        buffers=lambda val: buffers(val[0]),
        length=steps_per_page if is_full else None,
    )


@in_scope("forward_step")
def _step_and_row(
    make_step: Callable[[State], tuple[State, Any]],
    may_have_gaps: bool,
    state: State,
    prev_t1: Float[Array, ""],
    largest_y: PyTree[Float[Array, "..."]],
) -> tuple[_Carry, _Rows]:
    """Makes a step. If it is rejected, the next one is written over it."""
    start, end = state.tprev, state.tnext
    num_accepted = state.num_accepted_steps
    if may_have_gaps:
        swap = jnp.asarray(state.made_jump)
        start, end = jnp.where(swap, end, start), jnp.where(swap, start, end)
    new_state, made = make_step(state)
    is_accepted = new_state.num_accepted_steps > num_accepted
    prev_t1 = jnp.where(is_accepted, state.tnext, prev_t1)
    largest_y = jtu.tree_map(_larger, largest_y, new_state.y)
    row = (start if may_have_gaps else None, end, made)
    return (new_state, prev_t1, largest_y), row


def _with_solver_state(state: State, solver_state: PyTree[Any]) -> State:
    return dataclasses.replace(state, solver_state=solver_state)


def _larger(
    largest: Float[Array, "*shape"], y: Inexact[Array, "*shape"]
) -> Float[Array, "*shape"]:
    # By entry, as XLA is slow to reduce arrays on a CPU, and would do so in every step.
    return jnp.maximum(largest, jnp.abs(y))


def plain_while_loop(*args: Any, checkpoints: int | None = None, **kwargs: Any) -> Any:
    """The loop to give to diffrax where nothing is recorded or differentiated."""
    del checkpoints
    return while_loop(*args, kind="lax", **kwargs)
