"""Going back through a solve by undoing its steps."""

import diffrax
import equinox as eqx
from jaxtyping import Array, Bool, Int

from .._batching import where_active
from .._controls import with_controls
from .._solver import AbstractReversibleSolver
from .._tape import Page, SolveState
from .sweep import Sweep, SweepState, arrive


def reverse(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Undoes the steps of a page, with `solver.backward_step`."""
    solver = sweep.solver
    assert isinstance(solver, AbstractReversibleSolver)

    def undo_step(
        k: Int[Array, ""], is_made: Bool[Array, ""], carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        controls, pull_back_controls = sweep.controls(step)
        y0, _, solver_state0, result = solver.backward_step(
            with_controls(sweep.terms, step.t0, step.t1, controls),
            step.t0,
            step.t1,
            carry.state.y,
            sweep.args,
            carry.state.solver_state,
            step.made_jump,
        )
        # Elements of a batch that are at their end stay at a state that they were at:
        # elsewhere, the vector field may not be defined.
        state0 = where_active(
            is_made, SolveState(y0, solver_state0), carry.state, sweep.axes
        )
        carry = sweep.pull_back(step, state0, carry, controls, pull_back_controls)
        first_result = diffrax.RESULTS.where(
            diffrax.is_okay(carry.result), result, carry.result
        )
        return eqx.tree_at(lambda c: c.result, carry, first_result)

    carry = sweep.backwards(page.num_steps, undo_step, carry)
    return carry if page.snapshot is None else arrive(carry, page.snapshot)
