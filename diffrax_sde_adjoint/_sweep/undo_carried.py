"""Going back through steps of reversible Heun with one evaluation of the vector field
for each, where cotangents depend on the solution at both ends of a step.

Undoing a step evaluates the vector field at its left end, and differentiating it does
so at its right end, where undoing the step after it has evaluated it before. So what
the derivative of that evaluation needs is carried from one step to the next, which
`undo_staggered.py` does without.
"""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Int

from .._autodiff.batched_vjp import where_active
from .._compat import VF, BoolScalarLike, RealScalarLike, Y
from .._forward.records import Cotangents, Parameters, of_controls, of_step
from .._forward.tape import Page, SolveState
from .._misc import add_where_given, in_scope
from .._solver import carried
from .sweep import Sweep, SweepState, arrive_at_page
from .undo_staggered import add, evaluate_control, grads_of_step, undo_yhat


class CarriedState(eqx.Module):
    """The state of the solve at a point, and what is kept of the vector field there."""

    state: SolveState
    kept: list[Array]


def undo_carried(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Undoes the steps of a page, of [`diffrax_sde_adjoint.ReversibleHeun`][]."""
    yhat, _ = carry.state.solver_state
    evaluate = sweep.parameters.linearized(_evaluate_vf, of_step, yhat, carry.next_t0)
    _, kept = evaluate(yhat, carry.next_t0)
    carry = eqx.tree_at(lambda c: c.state, carry, CarriedState(carry.state, kept))
    step = functools.partial(_undo_step, sweep, page, evaluate)
    carry = sweep.backwards(page.num_steps, step, carry)
    carry = eqx.tree_at(lambda c: c.state, carry, carry.state.state)
    return arrive_at_page(carry, page)


@in_scope("undo_step")
def _undo_step(
    sweep: Sweep,
    page: Page,
    evaluate: Any,
    k: Int[Array, ""],
    is_made: BoolScalarLike,
    _: None,
    carry: SweepState,
) -> SweepState:
    step = page.step(k, is_made)
    y1, (yhat1, vf1) = carry.state.state.y, carry.state.state.solver_state
    control, pull_back_control = sweep.parameters.vjp(
        evaluate_control, of_controls, None, step.t0, step.t1
    )

    # To the left end.
    increment = sweep.terms.prod(vf1, control)
    yhat0 = undo_yhat(y1, yhat1, increment)
    vf0, kept0 = evaluate(yhat0, step.t0)
    y0 = add(add(y1, -0.5, increment), -0.5, sweep.terms.prod(vf0, control))
    # Elements of a batch that are at their end stay at a state that they were at:
    # elsewhere, the vector field may not be defined.
    state0 = SolveState(y0, (yhat0, vf0))
    state0 = where_active(is_made, state0, carry.state.state, sweep.axes)
    y0, (_, vf0) = state0.y, state0.solver_state

    positions, sums, grad_y0, grad_y1, (grad_yhat1, grad_vf1) = grads_of_step(
        sweep, step, dict(y0=y0, y1=y1), y1, carry
    )

    # y1 = y0 + (vf0 + vf1) / 2 dX, yhat1 = 2 y0 - yhat0 + vf0 dX, vf1 = vf(t1, yhat1)
    product = lambda parameters, own: parameters.terms.prod(*own)
    half = jtu.tree_map(lambda x: 0.5 * x, grad_y1)
    _, of_vf1 = sweep.parameters.vjp(product, of_controls, (vf1, control))
    sums, (more_vf1, more_control1) = of_vf1(half, sums)
    sums, more = evaluate.pull_back(
        carry.state.kept, (step.t1,), add_where_given(grad_vf1, more_vf1), sums
    )
    grad_yhat1 = add(grad_yhat1, 1.0, more)
    _, of_vf0 = sweep.parameters.vjp(product, of_controls, (vf0, control))
    sums, (grad_vf0, more_control0) = of_vf0(add(half, 1.0, grad_yhat1), sums)
    grad_control = add_where_given(more_control0, more_control1)
    sums, _ = pull_back_control(grad_control, sums)
    grad_y = add(add(grad_y0, 1.0, grad_y1), 2.0, grad_yhat1)
    grad_yhat0 = jtu.tree_map(lambda x: -x, grad_yhat1)
    return dataclasses.replace(
        carry,
        state=CarriedState(state0, kept0),
        next_t0=step.t0,
        positions=positions,
        grads=Cotangents(SolveState(grad_y, (grad_yhat0, grad_vf0)), sums),
    )


def _evaluate_vf(parameters: Parameters, yhat: Y, t: RealScalarLike) -> VF:
    return carried(parameters.terms.vf(t, yhat, parameters.args))
