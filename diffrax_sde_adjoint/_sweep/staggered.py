"""Going back through steps of reversible Heun with one evaluation of the vector field
for each.

Undoing a step evaluates the vector field at its left end, and differentiating it does
so at its right end. So if each step is undone and then differentiated, this makes two
evaluations at each point between two steps. Here it is one. What is carried is, with
the control `dX` over the step to the right of such a point,

    u = y + vf / 2 dX

(and `u = y` at the end of a page, where `dX` counts as zero). As the method is

    yhat0 = 2 y1 - yhat1 - vf1 dX
    y0    = y1 - (vf0 + vf1) / 2 dX

`u0 = y1 - vf1 / 2 dX` is known without `vf0`. So it is not before the sweep comes to
the left of the point that the vector field is evaluated there, together with its
derivative, and gives `y`.

Then cotangents are pulled back to a point, and through the vector field at it, before
the solution at the next point on the left is known. So they must not depend on it,
which is what `can_stagger` checks.
"""

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from .._batching import vjp, where_active
from .._compat import VF, Y, save_y
from .._dependence import depends_on
from .._solver import ReversibleHeun, sums_leaf_by_leaf
from .._tape import Page, SolveState
from .._trees import add_where_given, zeros_like
from .sweep import Cotangents, Sweep, SweepState, add_grad_args, arrive


def can_stagger(sweep: Sweep, end: SweepState) -> bool:
    """Whether cotangents at a point do not depend on the solution at the next one."""
    if type(sweep.solver) is not ReversibleHeun or sweep.tape.starts is not None:
        return False
    diff_ts = sweep.diff_inputs.ts
    all_ts = eqx.combine(diff_ts, sweep.saved.inputs.ts)
    is_linear_in_y = all(
        ts is None or len(ts) == 0 or fn is save_y
        for fn, ts in zip(sweep.saved.inputs.fns, all_ts, strict=True)
    )
    _, vf = end.state.solver_state
    return (
        is_linear_in_y
        and len(jtu.tree_leaves(diff_ts)) == 0
        and sums_leaf_by_leaf(vf)
        and not _has_differentiable_control(sweep, vf)
    )


def _has_differentiable_control(sweep: Sweep, vf: VF) -> bool:
    """Whether a control, or its product with a vector field, is a function of something
    that is differentiated.
    """

    def product(diff_terms):
        terms = eqx.combine(diff_terms, sweep.nondiff_terms)
        control = terms.contr(sweep.tape.ends[0, 0], sweep.tape.ends[0, 1])
        return control, terms.prod(vf, control)

    return depends_on(product, sweep.diff_terms)


def staggered(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Undoes the steps of a page, of [`diffrax_sde_adjoint.ReversibleHeun`][]."""
    terms = sweep.terms

    # The solution is `u`, and the solver state `yhat` and the control on the right.
    def undo_step(
        k: Int[Array, ""], is_made: Bool[Array, ""], carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        yhat1, right_control = carry.state.solver_state
        grad_yhat1, grad_vf1 = carry.grads.solver_state

        vf1, pull_back_vf = vjp(
            _evaluate_vf,
            sweep.axes,
            (sweep.diff_terms, sweep.diff_inputs.args),
            yhat1,
            (sweep.nondiff_terms, sweep.saved.inputs.args, step),
        )
        y1 = _add(carry.state.y, -0.5, terms.prod(vf1, right_control))
        carry = eqx.tree_at(lambda c: c.state.y, carry, y1)

        # What is saved is linear in `y0` and `y1`, so their values do not matter.
        zeros = zeros_like(y1)
        positions, grad_y1, grad_dense_info, grad_inputs = sweep.add_grad_saved(
            step, dict(y0=zeros, y1=zeros), carry
        )
        grad_y1 = _add(grad_y1, 1.0, grad_dense_info["y1"])
        grads = (grad_dense_info["y0"], grad_y1, grad_yhat1, grad_vf1)
        grad_y0, grad_y1, grad_yhat1, grad_vf1 = where_active(
            step.is_made, grads, zeros_like(grads), sweep.axes
        )

        control = terms.contr(step.t0, step.t1)
        _, pull_back_prod = eqx.filter_vjp(lambda vf: terms.prod(vf, control), vf1)
        half_grad_y1 = jtu.tree_map(lambda x: 0.5 * x, grad_y1)
        (more,) = pull_back_prod(half_grad_y1)
        (grad_terms, grad_args), more = pull_back_vf(add_where_given(grad_vf1, more))
        grad_yhat1 = _add(grad_yhat1, 1.0, more)
        (grad_vf0,) = pull_back_prod(_add(half_grad_y1, 1.0, grad_yhat1))
        grads = Cotangents(
            _add(_add(grad_y0, 1.0, grad_y1), 2.0, grad_yhat1),
            (jtu.tree_map(lambda x: -x, grad_yhat1), grad_vf0),
            add_where_given(carry.grads.terms, grad_terms),
            add_grad_args(grad_inputs, grad_args),
        )

        increment = terms.prod(vf1, control)
        u0 = _add(y1, -0.5, increment)
        yhat0 = jtu.tree_map(lambda y, yh, dy: 2 * y - yh - dy, y1, yhat1, increment)
        return SweepState(
            SolveState(u0, (yhat0, control)),
            step.t0,
            positions,
            grads,
            carry.drift,
            carry.result,
        )

    yhat, _ = carry.state.solver_state
    no_control = zeros_like(
        eqx.filter_eval_shape(terms.contr, carry.next_t0, carry.next_t0)
    )
    get_solver_state = lambda c: c.state.solver_state
    carry = eqx.tree_at(get_solver_state, carry, (yhat, no_control))
    carry = sweep.backwards(page.num_steps, undo_step, carry)
    yhat, right_control = carry.state.solver_state
    vf = terms.vf(carry.next_t0, yhat, sweep.args)
    y = _add(carry.state.y, -0.5, terms.prod(vf, right_control))
    carry = eqx.tree_at(lambda c: c.state, carry, SolveState(y, (yhat, vf)))
    return carry if page.snapshot is None else arrive(carry, page.snapshot)


def _evaluate_vf(shared, yhat, others):
    diff_terms, diff_args = shared
    nondiff_terms, nondiff_args, step = others
    terms = eqx.combine(diff_terms, nondiff_terms)
    return terms.vf(step.t1, yhat, eqx.combine(diff_args, nondiff_args))


def _add(x: Y, factor: float, y: Y) -> Y:
    """`x + factor * y`."""
    return jtu.tree_map(lambda a, b: a + factor * b, x, y)
