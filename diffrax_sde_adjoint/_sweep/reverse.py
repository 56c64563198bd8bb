"""Going back through a solve by undoing its steps."""

import diffrax
import equinox as eqx
from jaxtyping import Array, Bool, Int

from .._batching import vjp, where_active
from .._controls import evaluate_controls, with_controls
from .._solver import AbstractReversibleSolver
from .._tape import Page, SolveState
from .._trees import add_where_given
from .sweep import Sweep, SweepState, arrive


def reverse(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Undoes the steps of a page, with `solver.backward_step`."""
    solver = sweep.solver
    assert isinstance(solver, AbstractReversibleSolver)

    def undo_step(
        k: Int[Array, ""], is_made: Bool[Array, ""], carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        controls, pull_back_controls = vjp(
            _evaluate_controls,
            sweep.axes,
            sweep.diff_terms,
            None,
            (sweep.nondiff_terms, step),
        )
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
        carry, grad_controls = sweep.pull_back(step, state0, carry, controls)
        grad_terms, _ = pull_back_controls(grad_controls)
        return eqx.tree_at(
            lambda c: (c.grads.terms, c.result),
            carry,
            (
                add_where_given(carry.grads.terms, grad_terms),
                diffrax.RESULTS.where(
                    diffrax.is_okay(carry.result), result, carry.result
                ),
            ),
            is_leaf=lambda x: x is None,
        )

    carry = sweep.backwards(page.num_steps, undo_step, carry)
    return carry if page.snapshot is None else arrive(carry, page.snapshot)


def _evaluate_controls(diff_terms, own, others):
    del own
    nondiff_terms, step = others
    terms = eqx.combine(diff_terms, nondiff_terms)
    return evaluate_controls(terms, step.t0, step.t1)
