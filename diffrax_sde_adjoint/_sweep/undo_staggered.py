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
which is what `can_stagger` checks. That of the control over a step does, by `vf0 dX`:
if it is wanted, as for a series that drives a controlled differential equation, then
it is complete when the sweep comes to the left of the step.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._autodiff.batched_vjp import vjp, where_active
from .._autodiff.dependence import depends_on
from .._compat import VF, BoolScalarLike, RealScalarLike, Y, save_y
from .._forward.tape import Page, SolveState
from .._misc import add_where_given, are_alike, zeros_like
from .._solver import ReversibleHeun, sums_leaf_by_leaf
from .sweep import Cotangents, Sweep, SweepState, add_grad_args, arrive_at_page


def can_stagger(sweep: Sweep, end: SweepState) -> bool:
    """Whether cotangents at a point do not depend on the solution at the next one, and
    are also cotangents of the product with a control.
    """
    if type(sweep.solver) is not ReversibleHeun or sweep.tape.starts is not None:
        return False
    diff_ts = sweep.diff_inputs.ts
    all_ts = eqx.combine(diff_ts, sweep.saved.inputs.ts)
    is_linear_in_y = all(
        ts is None or len(ts) == 0 or fn is save_y
        for fn, ts in zip(sweep.saved.inputs.fns, all_ts, strict=True)
    )
    _, vf = end.state.solver_state

    def product(diff_terms):
        """Of a vector field and a control that are not functions of `diff_terms`."""
        control = sweep.terms.contr(*sweep.tape.ends[0, :2])
        return eqx.combine(diff_terms, sweep.nondiff_terms).prod(vf, control)

    return (
        is_linear_in_y
        and len(jtu.tree_leaves(diff_ts)) == 0
        and sums_leaf_by_leaf(vf)
        and are_alike(eqx.filter_eval_shape(product, sweep.diff_terms), end.state.y)
        and not depends_on(product, sweep.diff_terms)
    )


class _Right(eqx.Module):
    """The step to the right of a point: its times and its control. If the cotangent of
    the control is wanted: what `vf1` has given of it, and the cotangent of `vf0 dX`,
    which gives the rest once `vf0` is known.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    control: PyTree[Any]
    grad_control: PyTree[Array | None]
    grad_product: Y | None

    def grad_terms(
        self, sweep: Sweep, vf0: VF, is_made: BoolScalarLike
    ) -> PyTree[Array | None]:
        """The cotangent of the terms, through the control."""
        prod = lambda control: sweep.terms.prod(vf0, control)
        (more,) = eqx.filter_vjp(prod, self.control)[1](self.grad_product)
        grad_control = add_where_given(self.grad_control, more)
        _, pull_back = vjp(
            _evaluate_control,
            sweep.axes,
            sweep.diff_terms,
            None,
            (sweep.nondiff_terms, self.t0, self.t1),
        )
        zeros = zeros_like(grad_control)
        return pull_back(where_active(is_made, grad_control, zeros, sweep.axes))[0]


def staggered(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Undoes the steps of a page, of [`diffrax_sde_adjoint.ReversibleHeun`][]."""
    terms = sweep.terms
    control_is_wanted = depends_on(
        lambda diff_terms: _evaluate_control(
            diff_terms, None, (sweep.nondiff_terms, page.ends[0], page.ends[1])
        ),
        sweep.diff_terms,
    )

    # The solution is `u`, and the solver state `yhat` and what is on the right.
    def undo_step(
        k: Int[Array, ""], is_made: Bool[Array, ""], carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        yhat1, right = carry.state.solver_state
        grad_yhat1, grad_vf1 = carry.grads.solver_state

        vf1, pull_back_vf = vjp(
            _evaluate_vf,
            sweep.axes,
            (sweep.diff_terms, sweep.diff_inputs.args),
            yhat1,
            (sweep.nondiff_terms, sweep.saved.inputs.args, step),
        )
        y1 = _add(carry.state.y, -0.5, terms.prod(vf1, right.control))
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
        _, pull_back_prod = eqx.filter_vjp(terms.prod, vf1, control)
        half_grad_y1 = jtu.tree_map(lambda x: 0.5 * x, grad_y1)
        more, grad_control = pull_back_prod(half_grad_y1)
        (grad_terms, grad_args), more = pull_back_vf(add_where_given(grad_vf1, more))
        grad_yhat1 = _add(grad_yhat1, 1.0, more)
        grad_product = _add(half_grad_y1, 1.0, grad_yhat1)
        grad_vf0, _ = pull_back_prod(grad_product)
        grad_terms = add_where_given(carry.grads.terms, grad_terms)
        wanted = (None, None)
        if control_is_wanted:
            more = right.grad_terms(sweep, vf1, step.is_made)
            grad_terms = add_where_given(grad_terms, more)
            wanted = (grad_control, grad_product)
        grads = Cotangents(
            _add(_add(grad_y0, 1.0, grad_y1), 2.0, grad_yhat1),
            (jtu.tree_map(lambda x: -x, grad_yhat1), grad_vf0),
            grad_terms,
            add_grad_args(grad_inputs, grad_args),
        )

        increment = terms.prod(vf1, control)
        u0 = _add(y1, -0.5, increment)
        yhat0 = jtu.tree_map(lambda y, yh, dy: 2 * y - yh - dy, y1, yhat1, increment)
        return SweepState(
            SolveState(u0, (yhat0, _Right(step.t0, step.t1, control, *wanted))),
            step.t0,
            positions,
            grads,
            carry.drift,
            carry.spurious,
            carry.result,
        )

    # There is nothing on the right of the last step: a control and cotangents of zero,
    # and times at which a control can be evaluated. (In a batch, there are elements
    # without any steps on this page.)
    last = page.step(jnp.maximum(page.num_steps - 1, 0), True)
    no_control = zeros_like(eqx.filter_eval_shape(terms.contr, last.t0, last.t1))
    wanted = (None, None)
    if control_is_wanted:
        grad_control = eqx.filter(no_control, eqx.is_inexact_array)
        wanted = (grad_control, zeros_like(carry.state.y))
    right = _Right(last.t0, last.t1, no_control, *wanted)
    yhat, _ = carry.state.solver_state
    get_solver_state = lambda c: c.state.solver_state
    carry = eqx.tree_at(get_solver_state, carry, (yhat, right))
    carry = sweep.backwards(page.num_steps, undo_step, carry)
    yhat, right = carry.state.solver_state
    vf = terms.vf(carry.next_t0, yhat, sweep.args)
    if control_is_wanted:
        more = right.grad_terms(sweep, vf, True)
        grad_terms = add_where_given(carry.grads.terms, more)
        carry = eqx.tree_at(lambda c: c.grads.terms, carry, grad_terms)
    y = _add(carry.state.y, -0.5, terms.prod(vf, right.control))
    carry = eqx.tree_at(lambda c: c.state, carry, SolveState(y, (yhat, vf)))
    return arrive_at_page(carry, page)


def _evaluate_control(diff_terms, own, others):
    del own
    nondiff_terms, t0, t1 = others
    return eqx.combine(diff_terms, nondiff_terms).contr(t0, t1)


def _evaluate_vf(shared, yhat, others):
    diff_terms, diff_args = shared
    nondiff_terms, nondiff_args, step = others
    terms = eqx.combine(diff_terms, nondiff_terms)
    return terms.vf(step.t1, yhat, eqx.combine(diff_args, nondiff_args))


def _add(x: Y, factor: float, y: Y) -> Y:
    """`x + factor * y`."""
    return jtu.tree_map(lambda a, b: a + factor * b, x, y)
