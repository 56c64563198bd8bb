"""What all ways back through a solve have in common.

A sweep goes from the last page of the tape to the first, and on each page from the last
step to the first:

1. find the state at the start of the step;
2. add what was saved within the step to the cotangent of its outputs
   (`saved_outputs.py`);
3. pull the cotangent of its outputs back to its inputs: the state at its start, for the
   step before, and `args` and `terms`, whose cotangents add up.

The state at a step's start is that of the forward solve, up to rounding, so what this
returns is the gradient of the numerical solution. The ways differ in the first point:

- `undo.py`: `solver.backward_step` undoes the step;
- `undo_staggered.py`: the same for `ReversibleHeun`, with 1 and 3 in one;
- `replay.py`: the steps of a page are made again, and their states kept while the
  sweep is on the page.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._autodiff.batched_vjp import Axes, maximum, where_active
from .._compat import Args, DenseInfo, RealScalarLike, Y
from .._forward.instability import Spurious
from .._forward.records import (
    Cotangents,
    Differentiated,
    Parameters,
    of_controls,
    of_step,
)
from .._forward.return_error import ReturnError
from .._forward.saved import Position
from .._forward.tape import Page, SolveState, Step, Tape
from .._misc import add_where_given, in_scope, zeros_like
from .._solver.stage_loops import in_forward_mode
from .._term.known_control import evaluate_controls, with_controls
from .saved_outputs import SavedOutputs


class SweepState(eqx.Module):
    """What a sweep carries: the state of the solve at the left end of a step, up to
    rounding (on a page, `undo_staggered.py` has it in another form); the time at which
    the step after it starts; how much of what was saved lies further left; the
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

        def body(i, is_active, carry):
            page = self.tape.page(i) if carry.spurious is None else self.tape.part(i)
            num_steps = where_active(is_active, page.num_steps, 0, self.axes)
            page = eqx.tree_at(lambda p: p.num_steps, page, num_steps)
            carry = sweep_page(self, page, carry)
            if carry.spurious is None:
                return carry
            worth = self._worth_of_distance(carry)
            spurious = carry.spurious.at(worth, carry.state.y, self.init_y)
            return eqx.tree_at(lambda c: c.spurious, carry, spurious)

        num = self.tape.num_pages
        if carry.spurious is not None:
            num = num * self.tape.parts_per_page
        return self.backwards(num, body, carry)

    def _worth_of_distance(self, carry: SweepState) -> Float[Array, ""]:
        """To first order, by how much the loss would change if from here on the solver
        were to start anew, with `yhat` at `y`: see `instability.py`.
        """

        def product(grad, x, x_anew):
            if grad is None:
                return None
            return jnp.sum(jnp.real(grad * (x - x_anew))).astype(jnp.result_type(float))

        t, y = carry.next_t0, carry.state.y
        products = jtu.tree_map(
            product,
            carry.grads.state.solver_state,
            carry.state.solver_state,
            self.solver.init(self.terms, t, t, y, self.args),
            is_leaf=lambda x: x is None,
        )
        return sum(jtu.tree_leaves(products), start=jnp.zeros(()))

    def backwards(
        self,
        num: Int[Array, ""],
        body_fun: Callable[[Int[Array, ""], Bool[Array, ""], SweepState], SweepState],
        carry: SweepState,
    ) -> SweepState:
        """`body_fun` for `num - 1`, ..., `0`; its second argument is `True`, but in a
        batch for those elements that are at their end already.
        """

        sums = lambda c: c.grads.parameters

        def body(i, carry):
            # Elements that are at their end stay at a step that was made, as evaluating
            # one elsewhere may raise.
            is_active = i < num
            new_carry = body_fun(jnp.maximum(num - 1 - i, 0), is_active, carry)
            # What is added to sums over the batch is zero for these elements.
            own = lambda c: eqx.tree_at(sums, c, None)
            return eqx.tree_at(
                sums,
                where_active(is_active, own(new_carry), own(carry), self.axes),
                sums(new_carry),
                is_leaf=lambda x: x is None,
            )

        return lax.fori_loop(0, maximum(num, self.axes), body, carry)

    def step(
        self, step: Step, state: SolveState
    ) -> tuple[SolveState, list[PyTree[Any]]]:
        """Makes a step. Also returns its controls."""
        solver = in_forward_mode(self.solver)
        controls = evaluate_controls(solver, self.terms, step.t0, step.t1)
        y1, _, solver_state1 = _make_step(
            self.parameters.all, (state, controls), solver, step
        )
        return SolveState(y1, solver_state1), controls

    def controls(
        self, step: Step
    ) -> tuple[list[PyTree[Any]], Callable[[Any], tuple[Parameters, None]]]:
        """The controls of a step, and what pulls their cotangents back to those of the
        parameters.
        """
        parameters = self.parameters.only(of_controls)
        return parameters.vjp(_evaluate_controls, None, self.solver, step)

    @in_scope("pull_back_step")
    def pull_back(
        self,
        step: Step,
        state0: SolveState,
        carry: SweepState,
        controls: list[PyTree[Any]],
        pull_back_controls: Callable[[Any], tuple[Parameters, None]],
    ) -> SweepState:
        """Pulls the cotangents back through a step that started at `state0`."""
        (_, dense_info, _), pull_back = self.parameters.only(of_step).vjp(
            _make_step, (state0, controls), self.solver, step
        )
        positions, grads, grad_dense_info = self.add_grad_saved(
            step, dense_info, carry.state.y, carry
        )
        grad_step = (grads.state.y, grad_dense_info, grads.state.solver_state)
        grad_parameters, (grad_state0, grad_controls) = pull_back(
            where_active(step.is_made, grad_step, zeros_like(grad_step), self.axes)
        )
        grad_parameters = add_where_given(grads.parameters, grad_parameters)
        more, _ = pull_back_controls(grad_controls)
        grad_parameters = add_where_given(grad_parameters, more)
        return eqx.tree_at(
            lambda c: (c.state, c.next_t0, c.positions, c.grads),
            carry,
            (state0, step.t0, positions, Cotangents(grad_state0, grad_parameters)),
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


def _make_step(
    parameters: Parameters,
    own: tuple[SolveState, list[PyTree[Any]]],
    solver: diffrax.AbstractSolver,
    step: Step,
) -> tuple[Y, DenseInfo, PyTree[Any]]:
    """Makes a step from a state at its start and the controls over it."""
    state0, controls = own
    t0, t1, args = step.t0, step.t1, parameters.args
    terms = with_controls(parameters.terms, t0, t1, controls)
    y1, _, dense_info, solver_state1, _ = solver.step(
        terms, t0, t1, state0.y, args, state0.solver_state, step.made_jump
    )
    return y1, dense_info, solver_state1


def _evaluate_controls(
    parameters: Parameters, _: None, solver: diffrax.AbstractSolver, step: Step
) -> list[PyTree[Any]]:
    return evaluate_controls(solver, parameters.terms, step.t0, step.t1)


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
