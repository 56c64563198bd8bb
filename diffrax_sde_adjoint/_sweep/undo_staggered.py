"""Going back through steps of reversible Heun with one evaluation of the vector field
for each.

Undoing a step evaluates the vector field at its left end, and differentiating it does
so at its right end, which would be two evaluations at each point between two steps.
Instead, with the control `dX` over the step to the right of such a point, this carries

    u = y + vf / 2 dX

(and `u = y` at the end of a page, where `dX` counts as zero). As the method is

    yhat0 = 2 y1 - yhat1 - vf1 dX
    y0    = y1 - (vf0 + vf1) / 2 dX

`u0 = y1 - vf1 / 2 dX` is known without `vf0`, which is evaluated together with its
derivative when the sweep comes to the left of the point, and gives `y0`.

So cotangents are pulled back to a point before the solution at the next one on the left
is known, and must not depend on it, which is what `can_stagger` checks. That of the
control over a step does, by `vf0 dX`: if it is wanted, as for a series that drives a
controlled differential equation, it is complete one step later.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._autodiff.batched_vjp import where_active
from .._autodiff.dependence import depends_on
from .._brownian.path_of_solve import of_whole_steps
from .._compat import VF, BoolScalarLike, DenseInfo, RealScalarLike, Y, save_y
from .._forward.records import Cotangents, Parameters, of_controls, of_step
from .._forward.saved import Position
from .._forward.tape import Page, SolveState, Step
from .._misc import add_where_given, are_alike, in_scope, zeros_like
from .._solver import ReversibleHeun, carried, sums_leaf_by_leaf
from .sweep import Sweep, SweepState, arrive_at_page


def has_plain_steps(sweep: Sweep, end: SweepState) -> bool:
    """Whether steps are those of reversible Heun, with a vector field of arrays and its
    products with controls like `y`, and are not cut short by jumps.
    """
    if type(sweep.solver) is not ReversibleHeun or sweep.tape.starts is not None:
        return False
    _, vf = end.state.solver_state
    product = lambda: sweep.terms.prod(vf, _control_at_start(sweep))
    return sums_leaf_by_leaf(vf) and are_alike(
        eqx.filter_eval_shape(product), end.state.y
    )


def can_stagger(sweep: Sweep, end: SweepState) -> bool:
    """Whether, for steps like these, cotangents at a point do not depend on the
    solution at the next one, and are also cotangents of the product with a control.
    """
    parameters = sweep.parameters
    is_linear_in_y = all(
        ts is None or len(ts) == 0 or fn is save_y
        for fn, ts in zip(
            parameters.nondiff.save_fns, parameters.all.save_ts, strict=True
        )
    )
    _, vf = end.state.solver_state

    def product(diff):
        """The product of a vector field and a control that do not depend on `diff`."""
        terms = eqx.combine(diff, parameters.nondiff.terms)
        return terms.prod(vf, _control_at_start(sweep))

    return (
        is_linear_in_y
        and len(jtu.tree_leaves(parameters.diff.save_ts)) == 0
        and not depends_on(product, parameters.diff.terms)
    )


def _control_at_start(sweep: Sweep) -> PyTree[Any]:
    return sweep.terms.contr(*sweep.tape.ends[0, :2])


class StaggeredState(eqx.Module):
    """What a point is known by: `u` and `yhat` there, and the times and the control of
    the step to its right. If the cotangent of the control is wanted: what `vf1` has
    given of it, and that of `vf0 dX`, which gives the rest once `vf0` is known.
    """

    u: Y
    yhat: Y
    t0: RealScalarLike
    t1: RealScalarLike
    control: PyTree[Any]
    grad_control: PyTree[Array | None]
    grad_product: Y | None

    def add_grad(
        self, sweep: Sweep, vf0: VF, is_made: BoolScalarLike, grads: Parameters
    ) -> Parameters:
        """Adds what comes through the control to the cotangents of the parameters."""
        if self.grad_product is None:
            return grads
        prod = lambda control: sweep.terms.prod(vf0, control)
        (more,) = eqx.filter_vjp(prod, self.control)[1](self.grad_product)
        grad_control = add_where_given(self.grad_control, more)
        _, pull_back = sweep.parameters.vjp(
            evaluate_control, of_controls, None, self.t0, self.t1
        )
        zeros = zeros_like(grad_control)
        grad_control = where_active(is_made, grad_control, zeros, sweep.axes)
        return pull_back(grad_control, grads)[0]


def undo_staggered(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Undoes the steps of a page, of [`diffrax_sde_adjoint.ReversibleHeun`][]."""
    carry = _enter(sweep, page, carry)
    step = lambda *x: _undo_step(sweep, page, *x)
    carry = sweep.backwards(page.num_steps, step, carry)
    return arrive_at_page(_leave(sweep, carry), page)


def _enter(sweep: Sweep, page: Page, carry: SweepState) -> SweepState:
    """Gives the state at the end of a page the form in which steps are undone.

    To the right of the last step there is none, and so a control and cotangents of
    zero, and times at which a control can be evaluated. (In a batch, there are elements
    without any steps on this page.)
    """
    last = page.step(jnp.maximum(page.num_steps - 1, 0), True)
    no_control = zeros_like(eqx.filter_eval_shape(sweep.terms.contr, last.t0, last.t1))
    of_control = (None, None)
    parameters = sweep.parameters
    control_of = lambda diff: evaluate_control(
        eqx.combine(diff, parameters.nondiff), None, last.t0, last.t1
    )
    if depends_on(control_of, parameters.diff):
        grad_control = eqx.filter(no_control, eqx.is_inexact_array)
        of_control = (grad_control, zeros_like(carry.state.y))
    yhat, _ = carry.state.solver_state
    state = StaggeredState(
        carry.state.y, yhat, last.t0, last.t1, no_control, *of_control
    )
    return eqx.tree_at(lambda c: c.state, carry, state)


@in_scope("undo_step")
def _undo_step(
    sweep: Sweep,
    page: Page,
    k: Int[Array, ""],
    is_made: BoolScalarLike,
    _: None,
    carry: SweepState,
) -> SweepState:
    step = page.step(k, is_made)
    terms, state1, yhat1 = sweep.terms, carry.state, carry.state.yhat

    vf1, pull_back_vf = sweep.parameters.vjp(_evaluate_vf, of_step, yhat1, step)
    y1 = add(state1.u, -0.5, terms.prod(vf1, state1.control))

    # What is saved is linear in `y0` and `y1`, so their values do not matter.
    zeros = zeros_like(y1)
    positions, sums, grad_y0, grad_y1, (grad_yhat1, grad_vf1) = grads_of_step(
        sweep, step, dict(y0=zeros, y1=zeros), y1, carry
    )

    control = of_whole_steps(terms).contr(step.t0, step.t1)
    _, pull_back_prod = eqx.filter_vjp(terms.prod, vf1, control)
    half_grad_y1 = jtu.tree_map(lambda x: 0.5 * x, grad_y1)
    more, grad_control = pull_back_prod(half_grad_y1)
    grad_parameters, more = pull_back_vf(add_where_given(grad_vf1, more), sums)
    grad_yhat1 = add(grad_yhat1, 1.0, more)
    grad_product = add(half_grad_y1, 1.0, grad_yhat1)
    grad_vf0, _ = pull_back_prod(grad_product)
    grad_parameters = state1.add_grad(sweep, vf1, step.is_made, grad_parameters)
    depends = state1.grad_product is not None
    of_control = (grad_control, grad_product) if depends else (None, None)
    grad_y = add(add(grad_y0, 1.0, grad_y1), 2.0, grad_yhat1)
    minus_grad_yhat1 = jtu.tree_map(lambda x: -x, grad_yhat1)
    grad_state = SolveState(grad_y, (minus_grad_yhat1, grad_vf0))

    increment = terms.prod(vf1, control)
    u0 = add(y1, -0.5, increment)
    yhat0 = undo_yhat(y1, yhat1, increment)
    return dataclasses.replace(
        carry,
        state=StaggeredState(u0, yhat0, step.t0, step.t1, control, *of_control),
        next_t0=step.t0,
        positions=positions,
        grads=Cotangents(grad_state, grad_parameters),
    )


def _leave(sweep: Sweep, carry: SweepState) -> SweepState:
    """Gives the state at the start of a page its usual form."""
    state = carry.state
    vf = carried(sweep.terms.vf(carry.next_t0, state.yhat, sweep.args))
    grad_parameters = state.add_grad(sweep, vf, True, carry.grads.parameters)
    y = add(state.u, -0.5, sweep.terms.prod(vf, state.control))
    return eqx.tree_at(
        lambda c: (c.state, c.grads.parameters),
        carry,
        (SolveState(y, (state.yhat, vf)), grad_parameters),
    )


def evaluate_control(
    parameters: Parameters, _: None, t0: RealScalarLike, t1: RealScalarLike
) -> PyTree[Any]:
    return of_whole_steps(parameters.terms).contr(t0, t1)


def _evaluate_vf(parameters: Parameters, yhat: Y, step: Step) -> VF:
    return carried(parameters.terms.vf(step.t1, yhat, parameters.args))


def grads_of_step(
    sweep: Sweep, step: Step, dense_info: DenseInfo, y1: Y, carry: SweepState
) -> tuple[list[Position], Parameters, Y, Y, tuple[Y, VF]]:
    """How much of what was saved lies further left; the cotangents of the parameters;
    and those of `y0`, `y1` and the solver state at the end of the step, which are zero
    where no step was made.
    """
    positions, grads, grad_dense_info = sweep.add_grad_saved(
        step, dense_info, y1, carry
    )
    grad_y1 = add(grads.state.y, 1.0, grad_dense_info["y1"])
    grad_step = (grad_dense_info["y0"], grad_y1, grads.state.solver_state)
    grad_step = where_active(step.is_made, grad_step, zeros_like(grad_step), sweep.axes)
    return positions, grads.parameters, *grad_step


def undo_yhat(y1: Y, yhat1: Y, increment: Y) -> Y:
    """`yhat0`, from the product of `vf1` and the control."""
    return jtu.tree_map(lambda y, yh, dy: 2 * y - yh - dy, y1, yhat1, increment)


def add(x: Y, factor: float, y: Y) -> Y:
    """`x + factor * y`."""
    return jtu.tree_map(lambda a, b: a + factor * b, x, y)
