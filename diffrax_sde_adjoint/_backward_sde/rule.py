"""The rule for the derivative of the loop of a solve with `BackwardSDE`.

From the final state, this goes from one time to the next at which something happens:
where a cotangent arrives, as the solution was saved there, or where the state is known,
as the forward solve has kept it. In between is a `diffrax.diffeqsolve` of the lifted
terms (`adjoint_terms.py`).
"""

import itertools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._autodiff.batched_vjp import vjp
from .._autodiff.dependence import depends_on
from .._compat import RealScalarLike, Y, nondifferentiable_backward
from .._forward.return_error import Drift, size_of_loss
from .._forward.saved import cotangents_of_earlier, get_save_states
from .._forward.tape import SolveState, plain_while_loop
from .._misc import zeros_like
from .._solver import is_kind
from .._solver.unrolled_srk import is_for_additive_noise
from .._term.base import is_single_term, with_weak_directions
from .adjoint_terms import LiftedTerm, System, make_quadrature
from .options import Kind, first_derivatives_only, instead, no_numerics


# Of the size of the loss, what the backward solve may miss a known state by. It is not
# exact: this is for solutions that have gone astray.
_tolerance = 0.5

_did_not_return = (
    "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))`: the backward solve came "
    "so far from where the forward solve had been that gradients would be wrong. Make "
    "smaller steps, or use another solver for it; keep the solve every so many steps, "
    "with `StochasticAdjoint(checkpoint_every=..., backward=...)`; or use "
    "`adjoint=StochasticAdjoint()`, whose gradients are exact."
)

_must_commute = (
    "`BackwardSDE` with a Milstein solver needs commutative noise, but where the solve "
    "ends the columns of the diffusion do not commute. Pass another solver, as in "
    "`BackwardSDE(solver=diffrax.Heun())`."
)


class _NoAdjoint(diffrax.AbstractAdjoint):
    """For a solve that is not differentiated."""

    def loop(self, *, throw, passed_solver_state, passed_controller_state, **kwargs):
        del throw, passed_solver_state, passed_controller_state
        return self._loop(
            **kwargs,
            inner_while_loop=plain_while_loop,
            outer_while_loop=plain_while_loop,
        )


class _Carry(eqx.Module):
    """Where the backward solve has come to: the time, the solution and its cotangent,
    the cotangents of the parameters, how much of what was saved lies further left, the
    page of the tape, and whether all went well.
    """

    t: Float[Array, ""]
    y: Y
    grad_y: Y
    grad_diff: PyTree[Array]
    positions: list[tuple[Int[Array, ""], Int[Array, ""]]]
    page: Int[Array, ""]
    drift: Drift
    result: diffrax.RESULTS


def _check_controls(system: System, diff: PyTree[Any], t: RealScalarLike) -> None:
    def controls(diff):
        terms, _ = system.terms(diff)
        return [term.contr(t, t) for term in terms]

    if depends_on(controls, diff):
        raise ValueError(
            "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not "
            "differentiate with respect to what is in a control or a Brownian path. "
            f"{instead}"
        )


def _noises(
    system: System, diff: PyTree[Any], t: RealScalarLike
) -> list[tuple[int, PyTree[Array]]]:
    """The terms that are noise, each with a zero for its increment."""
    terms, _ = system.terms(diff)
    return [
        (i, zeros_like(eqx.filter_eval_shape(term.contr, t, t)))
        for i, (term, role) in enumerate(zip(terms, system.roles, strict=True))
        if role == "noise"
    ]


def _check_additive(
    system: System, diff: PyTree[Any], solver: diffrax.AbstractSolver, t: Any, y: Y
) -> None:
    """An error for a solver that is for additive noise only, if noise is not."""
    if not is_for_additive_noise(solver):
        return
    for i, zero in _noises(system, diff, t):
        fn = lambda y, i=i, zero=zero: system.increment(i, diff, t, y, zero)
        if depends_on(fn, y):
            raise ValueError(
                "The solver of `BackwardSDE` is for additive noise, but the diffusion "
                "depends on the state, so that the backward SDE would be wrong. Pass a "
                "solver for any noise, as in `BackwardSDE(solver=diffrax.Heun())`."
            )


def _does_not_commute(
    system: System, diff: PyTree[Any], solver: diffrax.AbstractSolver, t: Any, y: Y
) -> Bool[Array, ""] | None:
    """Whether, for a Milstein solver, the columns of the diffusion have Lie brackets;
    `None` if they have none for sure.
    """
    milstein = (diffrax.StratonovichMilstein, diffrax.ItoMilstein)
    noises = _noises(system, diff, t)
    if not is_kind(solver, milstein) or len(noises) == 0:
        return None
    flat, unravel = jfu.ravel_pytree([zero for _, zero in noises])
    if flat.size == 1:
        return None

    def column(y, unit):
        parts = [
            system.increment(i, diff, t, y, control)
            for (i, _), control in zip(noises, unravel(unit), strict=True)
        ]
        return jtu.tree_map(lambda *x: sum(x[1:], x[0]), *parts)

    def derivative(unit0, unit1):
        fn = lambda y: column(y, unit0)
        _, out = jax.jvp(fn, (y,), (column(y, unit1),))
        return out

    units = jnp.eye(flat.size, dtype=flat.dtype)
    all_pairs = jax.vmap(jax.vmap(derivative, (None, 0)), (0, None))(units, units)
    bracket = jtu.tree_map(lambda x: x - jnp.swapaxes(x, 0, 1), all_pairs)
    largest = lambda tree: jnp.max(
        jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jtu.tree_leaves(tree)])
    )
    eps = float(jnp.finfo(flat.dtype).eps)
    return largest(bracket) > eps**0.5 * largest(all_pairs)


class SolveBackwards(eqx.Module):
    """The rule for the derivative of the loop of a solve, as `_backward.Backward`."""

    kind: Kind
    throw: bool

    def __call__(
        self, perturbed, inputs, residuals, final_state, grad_final_state, axes
    ):
        (terms, save_inputs), (init_state, _, times) = inputs
        (perturbed_terms, perturbed_save_inputs), (*_, perturbed_times) = perturbed
        tape, num_saved, (t0, numerics) = residuals
        if any(jtu.tree_leaves((perturbed_times, perturbed_save_inputs.ts))):
            raise ValueError(no_numerics)
        terms = with_weak_directions(terms)
        diff_terms, nondiff_terms = eqx.partition(terms, perturbed_terms)
        diff_args, nondiff_args = eqx.partition(
            save_inputs.args, perturbed_save_inputs.args
        )
        diff = (diff_terms, diff_args)
        system = System((nondiff_terms, nondiff_args), *self.kind)
        _check_controls(system, diff, final_state.tprev)
        at_end = (system, diff, numerics.solver, final_state.tprev, final_state.y)
        _check_additive(*at_end)
        does_not_commute = _does_not_commute(*at_end)
        is_ito = "noise" in self.kind.roles and is_kind(
            numerics.solver, diffrax.AbstractItoSolver
        )
        counter = itertools.count()
        lifted_terms = jtu.tree_map(
            lambda _: LiftedTerm(system, diff, next(counter), is_ito),
            terms,
            is_leaf=is_single_term,
        )

        save_states = get_save_states(final_state)
        grad_ys = [x.ys for x in get_save_states(grad_final_state)]
        all_ts = save_inputs.ts
        known_start = SolveState(init_state.y, None)

        no_ts = lambda ts: ts is None or len(ts) == 0

        def next_ts(positions):
            return [
                None if no_ts(ts) else jnp.where(i > 0, ts[i - 1], -jnp.inf)
                for (i, _), ts in zip(positions, all_ts, strict=True)
            ]

        def known(page):
            """When the page starts, and the solution there."""
            if tape is None or tape.snapshots is None:
                return t0, known_start.y
            at = tape.page(page)
            return at.ends[0], at.snapshot.y

        def solve(carry, stop):
            sol = diffrax.diffeqsolve(
                lifted_terms,
                make_quadrature(numerics.solver),
                -carry.t,
                -stop,
                numerics.dt0,
                (carry.y, carry.grad_y),
                saveat=diffrax.SaveAt(t1=True, solver_state=True),
                stepsize_controller=numerics.stepsize_controller,
                adjoint=_NoAdjoint(),
                max_steps=numerics.max_steps,
                throw=False,
                solver_state=carry.grad_diff,
            )
            y, grad_y = jtu.tree_map(lambda x: x[-1], sol.ys)
            result = diffrax.RESULTS.where(
                diffrax.is_okay(carry.result), sol.result, carry.result
            )
            return y, grad_y, sol.solver_state, result

        def body(carry):
            page_start, known_y = known(carry.page)
            candidates = next_ts(carry.positions)
            stop = page_start
            for t in candidates:
                if t is not None:
                    stop = jnp.maximum(stop, t)
            stop = jnp.minimum(stop, carry.t)
            y, grad_y, grad_diff, result = lax.cond(
                stop < carry.t,
                lambda: solve(carry, stop),
                lambda: (carry.y, carry.grad_y, carry.grad_diff, carry.result),
            )

            # At most one output of each `SubSaveAt`, and then the start of the page.
            positions = []
            is_any_saved = jnp.array(False)
            for (i, j), t, grad in zip(
                carry.positions, candidates, grad_ys, strict=True
            ):
                if t is None:
                    positions.append((i, j))
                    continue
                is_saved = t >= stop
                more = jtu.tree_map(
                    lambda g, j=j, is_saved=is_saved: jnp.where(is_saved, g[j - 1], 0),
                    grad,
                )
                grad_y = jtu.tree_map(jnp.add, grad_y, more)
                num = is_saved.astype(i.dtype)
                positions.append((i - num, j - num))
                is_any_saved = is_any_saved | is_saved
            is_start = ~is_any_saved
            arrived = carry.drift.arrived(y, known_y, grad_y)
            y, drift = jtu.tree_map(
                lambda a, b: jnp.where(is_start, a, b),
                (known_y, arrived),
                (y, carry.drift),
            )
            page = carry.page - is_start.astype(carry.page.dtype)
            return _Carry(stop, y, grad_y, grad_diff, positions, page, drift, result)

        num_pages = jnp.array(1)
        if tape is not None and tape.snapshots is not None:
            num_pages = tape.num_pages
        largest_y = jtu.tree_map(
            lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)),
            init_state.y,
            final_state.y,
        )
        scale = size_of_loss(largest_y, [grad_final_state.y, *grad_ys], None, None)
        drift = Drift.none(scale, final_state.y, _tolerance)
        end = _Carry(
            final_state.tprev,
            final_state.y,
            grad_final_state.y,
            zeros_like(diff),
            [
                (jnp.asarray(x.saveat_ts_index), jnp.asarray(x.save_index))
                for x in save_states
            ],
            jnp.asarray(num_pages - 1),
            drift,
            diffrax.RESULTS.successful,
        )
        start = lax.while_loop(lambda carry: carry.page >= 0, body, end)

        # The sum over the batch, of what elements share.
        _, add_up = vjp(lambda shared, *_: shared, axes, diff, None, None)
        (grad_terms, grad_args), _ = add_up(start.grad_diff)
        none = jtu.tree_map(lambda _: None, save_inputs)
        grad_inputs = eqx.tree_at(
            lambda x: x.args, none, grad_args, is_leaf=lambda x: x is None
        )
        grads = (
            (grad_terms, grad_inputs),
            (
                SolveState(
                    start.grad_y,
                    jtu.tree_map(
                        lambda x: (
                            jnp.zeros_like(x) if eqx.is_inexact_array(x) else None
                        ),
                        init_state.solver_state,
                    ),
                ),
                cotangents_of_earlier(num_saved, final_state, grad_final_state),
                jtu.tree_map(lambda _: None, times),
            ),
        )
        failed = jnp.invert(diffrax.is_okay(start.result))
        drifted = start.drift.is_too_large()
        is_wrong = failed | drifted
        if self.throw:
            grads = start.result.error_if(grads, failed)
            grads = eqx.error_if(grads, drifted, _did_not_return)
            if does_not_commute is not None:
                grads = eqx.error_if(grads, does_not_commute, _must_commute)
        if does_not_commute is not None:
            is_wrong = is_wrong | does_not_commute
        grads = nondifferentiable_backward(grads, msg=first_derivatives_only)
        return *grads, is_wrong
