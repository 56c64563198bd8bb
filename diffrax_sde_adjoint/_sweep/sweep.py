"""What all ways back through a solve have in common.

A sweep goes from the last page of the tape to the first, and on each page from the last
step to the first:

1. find what the derivative of the step needs;
2. add what was saved within the step to the cotangent of its outputs
   (`saved_outputs.py`);
3. pull the cotangent of its outputs back to its inputs: the state at its start, for the
   step before, and `args` and `terms`, whose cotangents add up.

The steps are those of the forward solve, up to rounding, so what this returns is the
gradient of the numerical solution. The ways differ in the first point:

- `undo.py`: `solver.backward_step` undoes the step;
- `undo_staggered.py`: the same for `ReversibleHeun`, with 1 and 3 in one;
- `undo_carried.py`: the same, where that cannot be, with 1 taken from the step before;
- `replay.py`: the steps of a page are made again, and what is needed of them kept while
  the sweep is on the page;
- `kept.py`: the forward solve has kept it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._autodiff.batched_vjp import Axes, maximum, where_active
from .._compat import Args, DenseInfo, RealScalarLike, Y
from .._forward.instability import Spurious
from .._forward.records import (
    Cotangents,
    Differentiated,
    Parameters,
    of_controls,
)
from .._forward.return_error import ReturnError
from .._forward.rows import repeated, set_row
from .._forward.saved import Position
from .._forward.steps import MadeStep
from .._forward.tape import Page, SolveState, Step, Tape
from .._misc import in_scope, zeros_like
from .._term.known_control import evaluate_controls
from .saved_outputs import SavedOutputs


# At what the spurious solution of reversible Heun is worth, at least: a page may be one
# step.
_steps_between_looks = 10


# From cotangents and sums to the sums with more added, and other cotangents.
PullBack = Callable[[Any, Parameters], tuple[Parameters, Any]]


class SweepState(eqx.Module):
    """What a sweep carries: the state of the solve at the left end of a step, up to
    rounding (on a page, the ways for reversible Heun have it in other forms; if steps
    were kept, it is that of the last snapshot, or of the end of the solve); the time
    at which the step after it starts; how much of what was saved lies further left; the
    cotangents; and, if steps are undone, the error so far, what the spurious solution
    of reversible Heun is worth, and whether all steps could be undone.
    """

    state: PyTree[Any]
    next_t0: RealScalarLike
    positions: list[Position]
    grads: Cotangents
    return_error: ReturnError
    spurious: Spurious | None
    result: diffrax.RESULTS


class Sweep(eqx.Module):
    """What stays the same on the way."""

    solver: diffrax.AbstractSolver
    tape: Tape
    init_y: Y
    outputs: SavedOutputs
    parameters: Differentiated

    @property
    def axes(self) -> Axes:
        return self.parameters.axes

    @property
    def args(self) -> Args:
        return self.parameters.all.args

    @property
    def terms(self) -> PyTree[diffrax.AbstractTerm]:
        return self.parameters.all.terms

    @in_scope("sweep")
    def __call__(
        self,
        sweep_page: Callable[["Sweep", Page, SweepState], SweepState],
        carry: SweepState,
    ) -> SweepState:
        """Goes from the end of the solve to its start, by `sweep_page` on each page."""

        def body(i, is_active, row, carry):
            page = self.tape.part(i) if row is None else self.tape.page(i, row)
            if is_active is not True:
                num_steps = where_active(is_active, page.num_steps, 0, self.axes)
                page = eqx.tree_at(lambda p: p.num_steps, page, num_steps)
            return sweep_page(self, page, carry)

        num, rows = self.tape.num_pages, self.tape.rows
        if carry.spurious is None:
            return self.backwards(num, body, carry, rows)
        if self.tape.snapshot_every > 1:
            return self._look_afterwards(body, carry)
        # To look costs an evaluation of the vector field. In a short solve, half-way.
        every = max(1, _steps_between_looks // self.tape.steps_per_page)

        def body_and_look(i, is_active, row, carry):
            carry = body(i, is_active, row, carry)
            known = carry.spurious
            assert known is not None
            look = lambda: self._look(known, *_note_of(carry), carry.state)
            if every == 1:
                spurious = look()
            else:
                is_here = (i % every == 0) | (i == num // 2)
                spurious = lax.cond(is_here, look, lambda: known)
            return dataclasses.replace(carry, spurious=spurious)

        if self.tape.parts_per_page > 1:
            # What was kept is of whole pages.
            assert self.tape.made is None
            num, rows = num * self.tape.parts_per_page, None
        return self.backwards(num, body_and_look, carry, rows)

    def _look_afterwards(
        self, body: Callable[..., SweepState], carry: SweepState
    ) -> SweepState:
        """Goes from the end of the solve to its start, and then looks at where there
        are snapshots. A branch on each page would take more time.
        """
        every, num = self.tape.snapshot_every, self.tape.num_pages
        assert isinstance(num, int)

        def body_and_note(i, is_active, row, val):
            carry, notes = val
            carry = body(i, is_active, row, carry)
            # Of all that are written to a row, the last one stays.
            return carry, set_row(notes, i // every, _note_of(carry))

        val = (carry, repeated(_note_of(carry), -(-num // every)))
        carry, notes = self.backwards(num, body_and_note, val, self.tape.rows)
        look = lambda known, point: (self._look(known, *point), None)
        points = (*notes, self.tape.snapshots)
        spurious, _ = lax.scan(look, carry.spurious, points)
        return dataclasses.replace(carry, spurious=spurious)

    def _look(
        self,
        known: Spurious,
        t: RealScalarLike,
        grad_solver_state: PyTree[Any],
        state: SolveState,
    ) -> Spurious:
        """With one more point of the solve. To first order, what is spurious is worth
        by how much the loss would change if from here on the solver were to start anew,
        with `yhat` at `y`: see `instability.py`.
        """

        def product(grad, x, x_anew):
            if grad is None:
                return None
            return jnp.sum(jnp.real(grad * (x - x_anew))).astype(jnp.result_type(float))

        products = jtu.tree_map(
            product,
            grad_solver_state,
            state.solver_state,
            self.solver.init(self.terms, t, t, state.y, self.args),
            is_leaf=lambda x: x is None,
        )
        worth = sum(jtu.tree_leaves(products), start=jnp.zeros(()))
        return known.at(worth, state.y, self.init_y)

    def backwards(
        self,
        num: Int[Array, ""] | int,
        body_fun: Callable[..., Any],
        carry: Any,
        rows: PyTree[Array | None] = None,
    ) -> Any:
        """`body_fun(i, is_active, row, carry)` for `i` of `num - 1`, ..., `0`. It is
        given row `i` of `rows`; and `is_active` is `True`, but in a batch for those
        elements that are at their end already. If `num` is not a number, a
        [`SweepState`][] is what is carried.
        """
        if isinstance(num, int):
            # The same for all elements, whose rows stay together: see `loop_over_rows`.
            def of_known(carry, x):
                i, row = x
                return body_fun(i, True, row, carry), None

            xs = (jnp.arange(num), rows)
            carry, _ = lax.scan(of_known, carry, xs, reverse=True)
            return carry

        sums = lambda c: c.grads.parameters

        def body(i, carry):
            # Elements that are at their end stay at a step that was made, as evaluating
            # one elsewhere may raise.
            is_active = i < num
            i = jnp.maximum(num - 1 - i, 0)
            row = jtu.tree_map(lambda x: x[i], rows)
            new_carry = body_fun(i, is_active, row, carry)
            # What is added to sums over the batch is zero for these elements.
            own = lambda c: eqx.tree_at(sums, c, None)
            return eqx.tree_at(
                sums,
                where_active(is_active, own(new_carry), own(carry), self.axes),
                sums(new_carry),
                is_leaf=lambda x: x is None,
            )

        return lax.fori_loop(0, maximum(num, self.axes), body, carry)

    def controls(self, step: Step) -> tuple[list[PyTree[Any]], PullBack]:
        """The controls of a step, and what pulls their cotangents back to those of the
        parameters.
        """
        return self.parameters.vjp(
            _evaluate_controls, of_controls, None, self.solver, step
        )

    @in_scope("pull_back_step")
    def pull_back(
        self,
        step: Step,
        y1: Y,
        dense_info: DenseInfo,
        pull_back_step: PullBack,
        pull_back_controls: PullBack,
        carry: SweepState,
    ) -> SweepState:
        """Pulls the cotangents back through a step, which ended at `y1`."""
        positions, grads, grad_dense_info = self.add_grad_saved(
            step, dense_info, y1, carry
        )
        grad_step = (grads.state.y, grad_dense_info, grads.state.solver_state)
        grad_step = where_active(
            step.is_made, grad_step, zeros_like(grad_step), self.axes
        )
        grad_parameters, (grad_state0, grad_controls) = pull_back_step(
            grad_step, grads.parameters
        )
        grad_parameters, _ = pull_back_controls(grad_controls, grad_parameters)
        return eqx.tree_at(
            lambda c: (c.next_t0, c.positions, c.grads),
            carry,
            (step.t0, positions, Cotangents(grad_state0, grad_parameters)),
        )

    def pull_back_made(
        self, step: Step, made: MadeStep, pull_back_step: PullBack, carry: SweepState
    ) -> SweepState:
        """As `pull_back`, through a step of which what is needed was kept."""
        _, pull_back_controls = self.controls(step)
        return self.pull_back(
            step, made.y1, made.dense_info, pull_back_step, pull_back_controls, carry
        )

    @in_scope("saved_outputs")
    def add_grad_saved(
        self, step: Step, dense_info: DenseInfo, y1: Y, carry: SweepState
    ) -> tuple[list[Position], Cotangents, DenseInfo]:
        """What was saved within a step and at its end: how much lies further left, and
        the cotangents with what comes from it, of the state at the end of the step; and
        that of `dense_info`.
        """
        positions, grads = self.outputs.add_grad_y1(
            step, carry.next_t0, y1, carry.positions, carry.grads
        )
        is_last = step.index == self.tape.num_steps - 1
        return self.outputs.add_grad_dense_info(
            step, is_last, dense_info, positions, grads
        )


def _evaluate_controls(
    parameters: Parameters, _: None, solver: diffrax.AbstractSolver, step: Step
) -> list[PyTree[Any]]:
    return evaluate_controls(solver, parameters.terms, step.t0, step.t1)


def _note_of(carry: SweepState) -> tuple[RealScalarLike, PyTree[Any]]:
    """What a look needs of the sweep."""
    return carry.next_t0, carry.grads.state.solver_state


def steps_between_looks(num_steps: int | None) -> int:
    """From one look at what the spurious solution is worth to the next, where pages are
    single steps. There is one half-way in a short solve. All steps are looked at, or
    asked whether to, if it is not known how many there are.
    """
    return 1 if num_steps is None else max(1, min(_steps_between_looks, num_steps // 2))


def arrive(carry: SweepState, known: SolveState) -> SweepState:
    """`carry`, having noted how far it is from the state of the solve, which is known
    here.
    """
    return_error = carry.return_error.arrived(carry.state, known, carry.grads.state)
    return eqx.tree_at(
        lambda c: (c.return_error, c.state), carry, (return_error, known)
    )


def arrive_at_page(carry: SweepState, page: Page) -> SweepState:
    """Does as `arrive`, if the state at the start of the page was kept, and the steps
    came from there.
    """
    if page.snapshot is None:
        return carry
    # Not all of `carry`: its sums over the batch must not become batched.
    new = lambda c: (c.return_error, c.state)
    is_start = page.first == 0
    arrived = jtu.tree_map(
        lambda a, b: jnp.where(is_start, a, b),
        new(arrive(carry, page.snapshot)),
        new(carry),
    )
    return eqx.tree_at(new, carry, arrived)
