"""Going back through a solve by undoing its steps."""

import dataclasses
import functools

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._autodiff.batched_vjp import where_active
from .._compat import Args, BoolScalarLike
from .._forward.steps import inputs_of_step, linearize_step
from .._forward.tape import Page, SolveState, Step
from .._misc import are_alike, in_scope
from .._solver import AbstractReversibleSolver
from .._solver.stage_loops import in_forward_mode
from .._term.known_control import with_controls
from .sweep import Sweep, SweepState, arrive_at_page


def undo(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Undoes the steps of a page, with `solver.backward_step`."""
    solver = sweep.solver
    assert isinstance(solver, AbstractReversibleSolver)

    def undo_step(
        k: Int[Array, ""], is_made: BoolScalarLike, _: None, carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        controls, pull_back_controls = sweep.controls(step)
        state0, result = _undo_step(
            solver,
            with_controls(solver, sweep.terms, step.t0, step.t1, controls),
            step,
            carry.state,
            sweep.args,
        )
        # Elements of a batch that are at their end stay at a state that they were at:
        # elsewhere, the vector field may not be defined.
        state0 = where_active(is_made, state0, carry.state, sweep.axes)
        inputs = inputs_of_step(
            solver,
            step.t0,
            step.t1,
            state0,
            controls,
            step.made_jump,
            known_y1=carry.state.y,
        )
        linearized = linearize_step(sweep.parameters, *inputs)
        ((_, dense_info, _), _), kept = linearized(*inputs)
        pull_back_step = functools.partial(linearized.pull_back, kept, inputs[1:])
        carry = sweep.pull_back(
            step,
            carry.state.y,
            dense_info,
            pull_back_step,
            pull_back_controls,
            carry,
        )
        first_result = diffrax.RESULTS.where(
            diffrax.is_okay(carry.result), result, carry.result
        )
        return dataclasses.replace(carry, state=state0, result=first_result)

    carry = sweep.backwards(page.num_steps, undo_step, carry)
    return arrive_at_page(carry, page)


@in_scope("undo_step")
def _undo_step(
    solver: AbstractReversibleSolver,
    terms: PyTree[diffrax.AbstractTerm],
    step: Step,
    state1: SolveState,
    args: Args,
) -> tuple[SolveState, diffrax.RESULTS]:
    """`solver.backward_step`, if it returns what it should."""
    out = solver.backward_step(
        terms, step.t0, step.t1, state1.y, args, state1.solver_state, step.made_jump
    )
    name = f"{type(solver).__name__}.backward_step"
    if not isinstance(out, tuple) or len(out) != 4:
        what = f"{len(out)} things" if isinstance(out, tuple) else f"a {type(out)}"
        raise ValueError(
            f"`{name}` must return a tuple of four things, `(y0, dense_info, "
            f"solver_state, result)`, but returned {what}."
        )
    y0, _, solver_state0, result = out
    state0 = SolveState(y0, solver_state0)
    if not are_alike(state0, state1):
        describe = lambda x: eqx.tree_pformat(x, width=10**6)
        raise ValueError(
            f"`{name}` must return a solution and a solver state of the same structure "
            f"as it was given, `{describe(state1.y)}` and "
            f"`{describe(state1.solver_state)}`, but returned `{describe(y0)}` and "
            f"`{describe(solver_state0)}`."
        )
    return state0, result


def inverts_last_step(sweep: Sweep, end: SweepState) -> Bool[Array, ""]:
    """Whether `solver.backward_step`, followed by `solver.step`, leads back to the end
    of the solve.
    """
    solver = sweep.solver
    assert isinstance(solver, AbstractReversibleSolver)
    page = sweep.tape.page(jnp.maximum(sweep.tape.num_pages - 1, 0))
    step = page.step(jnp.maximum(page.num_steps - 1, 0), True)
    state0, _ = _undo_step(solver, sweep.terms, step, end.state, sweep.args)
    y1, _, _, solver_state1, _ = in_forward_mode(solver).step(
        sweep.terms,
        step.t0,
        step.t1,
        state0.y,
        sweep.args,
        state0.solver_state,
        step.made_jump,
    )
    state1 = SolveState(y1, solver_state1)

    def is_close(found, known):
        size = jnp.max(jnp.abs(known), initial=0)
        # A step is well conditioned: this is beyond its rounding, and far below what it
        # changes.
        tolerance = 1e4 * float(jnp.finfo(known.dtype).eps)
        return jnp.all(jnp.abs(found - known) <= tolerance * size)

    inexact = [eqx.filter(x, eqx.is_inexact_array) for x in (state1, end.state)]
    return jtu.tree_reduce(
        jnp.logical_and, jtu.tree_map(is_close, *inexact), jnp.array(True)
    )
