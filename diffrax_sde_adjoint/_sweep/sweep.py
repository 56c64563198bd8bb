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
from jaxtyping import Array, Bool, Int, PyTree

from .._autodiff.batched_vjp import Axes, maximum, vjp, where_active
from .._compat import Args, DenseInfo, RealScalarLike, Y
from .._forward.instability import Spurious, worth_of_distance
from .._forward.return_error import Drift
from .._forward.saved import SaveInputs
from .._forward.tape import Page, SolveState, Step, Tape
from .._misc import add_where_given, zeros_like
from .._solver.stage_loops import in_forward_mode
from .._term.known_control import evaluate_controls, with_controls
from .saved_outputs import Position, Saved


class Cotangents(eqx.Module):
    """The cotangents that a sweep carries from the right to the left.

    Each has the structure of what it is a cotangent of, with `None` for every leaf that
    is not differentiated.
    """

    y: Y
    solver_state: PyTree[Array | None]
    terms: PyTree[Array | None]
    inputs: SaveInputs


class SweepState(eqx.Module):
    """What a sweep carries: the state of the solve at the left end of a step, up to
    rounding; the time at which the step after it starts; how much of what was saved
    lies further left; the cotangents; and how far, if steps are undone, the states have
    drifted from those of the solve, what the spurious solution of reversible Heun is
    worth, and whether all steps could be undone.
    """

    state: SolveState
    next_t0: RealScalarLike
    positions: list[Position]
    grads: Cotangents
    drift: Drift
    spurious: Spurious | None
    result: diffrax.RESULTS


class Sweep(eqx.Module):
    """What stays the same on the way. `diff_terms` and `diff_inputs` hold what is
    differentiated, and `nondiff_terms` and `saved.inputs` the rest. In a batch, their
    cotangents are sums over `axes`.
    """

    solver: diffrax.AbstractSolver
    tape: Tape
    init_y: Y
    saved: Saved
    diff_inputs: SaveInputs
    diff_terms: PyTree[diffrax.AbstractTerm]
    nondiff_terms: PyTree[diffrax.AbstractTerm]
    axes: Axes = eqx.field(static=True)

    @property
    def args(self) -> Args:
        return eqx.combine(self.diff_inputs, self.saved.inputs).args

    @property
    def terms(self) -> PyTree[diffrax.AbstractTerm]:
        return eqx.combine(self.diff_terms, self.nondiff_terms)

    def __call__(
        self,
        sweep_page: Callable[["Sweep", Page, SweepState], SweepState],
        carry: SweepState,
    ) -> SweepState:
        """From the end of the solve to its start, with one of the ways to go back
        through a page.
        """

        def body(i, is_active, carry):
            page = self.tape.page(i) if carry.spurious is None else self.tape.part(i)
            num_steps = where_active(is_active, page.num_steps, 0, self.axes)
            page = eqx.tree_at(lambda p: p.num_steps, page, num_steps)
            carry = sweep_page(self, page, carry)
            if carry.spurious is None:
                return carry
            worth = worth_of_distance(
                self.solver,
                self.terms,
                carry.next_t0,
                self.args,
                carry.state,
                carry.grads.solver_state,
            )
            spurious = carry.spurious.at(worth, carry.state.y, self.init_y)
            return eqx.tree_at(lambda c: c.spurious, carry, spurious)

        num = self.tape.num_pages
        if carry.spurious is not None:
            num = num * self.tape.parts_per_page
        return self.backwards(num, body, carry)

    def backwards(
        self,
        num: Int[Array, ""],
        body_fun: Callable[[Int[Array, ""], Bool[Array, ""], SweepState], SweepState],
        carry: SweepState,
    ) -> SweepState:
        """`body_fun` for `num - 1`, ..., `0`; its second argument is `True`, but in a
        batch for those elements that are at their end already.
        """

        sums = lambda c: (c.grads.terms, c.grads.inputs)

        def body(i, carry):
            # Elements that are at their end stay at a step that was made, as evaluating
            # one elsewhere may raise.
            is_active = i < num
            new_carry = body_fun(jnp.maximum(num - 1 - i, 0), is_active, carry)
            # What is added to sums over the batch is zero for these elements.
            own = lambda c: eqx.tree_at(sums, c, (None, None))
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
            (self.diff_terms, self.diff_inputs.args),
            (state, controls),
            (self.nondiff_terms, self.saved.inputs.args, solver, step),
        )
        return SolveState(y1, solver_state1), controls

    def controls(
        self, step: Step
    ) -> tuple[list[PyTree[Any]], Callable[[Any], PyTree[Array | None]]]:
        """The controls of a step, and what pulls their cotangents back to those of the
        terms.
        """
        controls, pull_back = vjp(
            _evaluate_controls,
            self.axes,
            self.diff_terms,
            None,
            (self.nondiff_terms, self.solver, step),
        )
        return controls, lambda grad_controls: pull_back(grad_controls)[0]

    def pull_back(
        self,
        step: Step,
        state0: SolveState,
        carry: SweepState,
        controls: list[PyTree[Any]],
        pull_back_controls: Callable[[Any], PyTree[Array | None]],
    ) -> SweepState:
        """Pulls the cotangents back through a step that started at `state0`."""
        (_, dense_info, _), pull_back = vjp(
            _make_step,
            self.axes,
            (self.diff_terms, self.diff_inputs.args),
            (state0, controls),
            (self.nondiff_terms, self.saved.inputs.args, self.solver, step),
        )
        grads = carry.grads
        positions, grad_y1, grad_dense_info, grad_inputs = self.add_grad_saved(
            step, dense_info, carry
        )
        grad_step = (grad_y1, grad_dense_info, grads.solver_state)
        (grad_terms, grad_args), (grad_state0, grad_controls) = pull_back(
            where_active(step.is_made, grad_step, zeros_like(grad_step), self.axes)
        )
        grads = Cotangents(
            grad_state0.y,
            grad_state0.solver_state,
            add_where_given(
                add_where_given(grads.terms, grad_terms),
                pull_back_controls(grad_controls),
            ),
            add_grad_args(grad_inputs, grad_args),
        )
        return SweepState(
            state0,
            step.t0,
            positions,
            grads,
            carry.drift,
            carry.spurious,
            carry.result,
        )

    def add_grad_saved(
        self, step: Step, dense_info: DenseInfo, carry: SweepState
    ) -> tuple[list[Position], Y, DenseInfo, SaveInputs]:
        """What was saved within a step and at its end: how much lies further left, and
        the cotangents of the step's `y1` and `dense_info`, and of what it was saved
        with.
        """
        positions, (grad_inputs, grad_y1) = self.saved.add_grad_y1(
            step,
            carry.next_t0,
            carry.state.y,
            carry.positions,
            self.diff_inputs,
            (carry.grads.inputs, carry.grads.y),
        )
        positions, grad_dense_info, grad_inputs = self.saved.add_grad_dense_info(
            step,
            step.index == self.tape.num_steps - 1,
            dense_info,
            self.solver.interpolation_cls,
            positions,
            self.diff_inputs,
            grad_inputs,
        )
        return positions, grad_y1, grad_dense_info, grad_inputs


def _make_step(shared, own, others):
    diff_terms, diff_args = shared
    state0, controls = own
    nondiff_terms, nondiff_args, solver, step = others
    terms = eqx.combine(diff_terms, nondiff_terms)
    terms = with_controls(terms, step.t0, step.t1, controls)
    y1, _, dense_info, solver_state1, _ = solver.step(
        terms,
        step.t0,
        step.t1,
        state0.y,
        eqx.combine(diff_args, nondiff_args),
        state0.solver_state,
        step.made_jump,
    )
    return y1, dense_info, solver_state1


def _evaluate_controls(diff_terms, own, others):
    del own
    nondiff_terms, solver, step = others
    terms = eqx.combine(diff_terms, nondiff_terms)
    return evaluate_controls(solver, terms, step.t0, step.t1)


def add_grad_args(grad_inputs: SaveInputs, grad_args: PyTree[Any]) -> SaveInputs:
    return eqx.tree_at(
        lambda g: g.args,
        grad_inputs,
        add_where_given(grad_inputs.args, grad_args),
        is_leaf=lambda x: x is None,
    )


def arrive(carry: SweepState, known: SolveState) -> SweepState:
    """`carry`, having noted how far it is from the state of the solve, which is known
    here.
    """
    drift = carry.drift.arrived(
        (carry.state.y, carry.state.solver_state),
        (known.y, known.solver_state),
        (carry.grads.y, carry.grads.solver_state),
    )
    return eqx.tree_at(lambda c: (c.drift, c.state), carry, (drift, known))


def arrive_at_page(carry: SweepState, page: Page) -> SweepState:
    """As `arrive`, if the state at the start of the page was kept, and the steps came
    from there.
    """
    if page.snapshot is None:
        return carry
    # Not all of `carry`: its sums over the batch must not become batched.
    new = lambda c: (c.drift, c.state)
    is_start = page.first == 0
    arrived = jtu.tree_map(
        lambda a, b: jnp.where(is_start, a, b),
        new(arrive(carry, page.snapshot)),
        new(carry),
    )
    return eqx.tree_at(new, carry, arrived)
