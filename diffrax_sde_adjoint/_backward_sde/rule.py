"""The rule for the derivative of a solve with `BackwardSDEAdjoint`.

From the final state, this goes from one time to the next at which something happens:
where a cotangent arrives, as the solution was saved there, or where the state is known,
as the forward solve has kept it. In between is a `diffrax.diffeqsolve` of the adjoint
terms (`adjoint_terms.py`).
"""

import itertools
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._autodiff.batched_vjp import Axes, vjp
from .._compat import (
    RealScalarLike,
    State,
    Y,
    integration_loop,
    nondifferentiable_backward,
)
from .._forward.records import Parameters, Start
from .._forward.return_error import ReturnError, size_of_loss
from .._forward.saved import cotangents_of_earlier, get_save_states
from .._forward.tape import SolveState, Tape, plain_while_loop
from .._misc import in_scope, zeros_like
from .._solver import has_layer
from .._term.base import is_single_term, with_weak_directions
from .adjoint_terms import AdjointTerm, ForwardTerms, make_quadrature
from .checks import Equation, check_additive, check_controls, does_not_commute, instead


_T = TypeVar("_T")

# Of the size of the loss, what the backward solve may miss a known state by. It is not
# exact: this is for solutions that have gone astray.
_tolerance = 0.5

no_numerics = (
    "`adjoint=BackwardSDEAdjoint(...)` does not differentiate with respect to the "
    "times of a solve (`t0`, `t1`, `dt0`, `ts`), or what is in its solver and step "
    f"size controller. {instead}"
)

first_derivatives_only = (
    f"`adjoint=BackwardSDEAdjoint(...)` does not support second derivatives. {instead}"
)

_could_not_return = (
    "`adjoint=BackwardSDEAdjoint(...)`: the backward solve came so far from where the "
    "forward solve had been that gradients would be wrong. Make smaller steps, or use "
    "another solver for it; keep the solve every so many steps, with "
    "`BackwardSDEAdjoint(checkpoint_every=...)`; or use `adjoint=StochasticAdjoint()`, "
    "whose gradients are exact."
)

_must_commute = (
    "`BackwardSDEAdjoint` with a Milstein solver needs commutative noise, but where "
    "the solve ends the columns of the diffusion do not commute. Pass another solver, "
    "as in `BackwardSDEAdjoint(solver=diffrax.Heun())`."
)


class Numerics(eqx.Module):
    """How a backward solve is made."""

    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController
    dt0: RealScalarLike | None
    max_steps: int | None = eqx.field(static=True)


class _NoAdjoint(diffrax.AbstractAdjoint):
    """The adjoint of a solve that is not differentiated."""

    def loop(self, *, throw, passed_solver_state, passed_controller_state, **kwargs):
        del throw, passed_solver_state, passed_controller_state
        return integration_loop(
            self,
            **kwargs,
            inner_while_loop=plain_while_loop,
            outer_while_loop=plain_while_loop,
        )


class _Carry(eqx.Module):
    """Where the backward solve has come to: the time, the solution and its cotangent,
    the cotangents of the parameters, how much of what was saved lies further left (of
    each `SubSaveAt`, of its `ts` and of its outputs), the page of the tape, and whether
    all went well.
    """

    t: Float[Array, ""]
    y: Y
    grad_y: Y
    grad_diff: PyTree[Array]
    positions: list[tuple[Int[Array, ""], Int[Array, ""]]]
    page: Int[Array, ""]
    return_error: ReturnError
    result: diffrax.RESULTS


class _BackwardSolve(eqx.Module):
    """What stays the same on the way. `t0` is where the forward solve starts, from
    `y0`, and `grad_ys` are the cotangents of what each `SubSaveAt` saved at its `ts`.
    """

    terms: PyTree[AdjointTerm]
    numerics: Numerics
    tape: Tape | None
    t0: Float[Array, ""]
    y0: Y
    all_ts: list[Array | None]
    grad_ys: list[PyTree[Array]]

    @property
    def num_pages(self) -> Int[Array, ""]:
        return jnp.array(1) if self.tape is None else jnp.asarray(self.tape.num_pages)

    @in_scope("backward_sde")
    def to_start(self, end: _Carry) -> _Carry:
        # Not a method, which JAX would want to hash.
        body = lambda carry: self._to_next_time(carry)
        return lax.while_loop(lambda carry: carry.page >= 0, body, end)

    def _to_next_time(self, carry: _Carry) -> _Carry:
        page_start, known_y = self._known(carry.page)
        times = self._times_on_the_left(carry.positions)
        stop = page_start
        for t in times:
            if t is not None:
                stop = jnp.maximum(stop, t)
        stop = jnp.minimum(stop, carry.t)
        y, grad_y, grad_diff, result = lax.cond(
            stop < carry.t,
            lambda: self._solve(carry, stop),
            lambda: (carry.y, carry.grad_y, carry.grad_diff, carry.result),
        )
        grad_y, positions, is_any_saved = self._add_saved(
            grad_y, carry.positions, times, stop
        )
        # After all that was saved there comes the start of the page.
        is_start = ~is_any_saved
        arrived = carry.return_error.arrived(y, known_y, grad_y)
        y, return_error = jtu.tree_map(
            lambda a, b: jnp.where(is_start, a, b),
            (known_y, arrived),
            (y, carry.return_error),
        )
        return _Carry(
            t=stop,
            y=y,
            grad_y=grad_y,
            grad_diff=grad_diff,
            positions=positions,
            page=carry.page - is_start.astype(carry.page.dtype),
            return_error=return_error,
            result=result,
        )

    def _known(self, page: Int[Array, ""]) -> tuple[RealScalarLike, Y]:
        """When the page starts, and the solution there."""
        if self.tape is None:
            return self.t0, self.y0
        at = self.tape.page(page)
        assert at.snapshot is not None
        return at.ends[0], at.snapshot.y

    def _times_on_the_left(
        self, positions: list[tuple[Int[Array, ""], Int[Array, ""]]]
    ) -> list[Float[Array, ""] | None]:
        """The last time on the left at which each `SubSaveAt` saved."""
        return [
            None
            if ts is None or len(ts) == 0
            else jnp.where(i > 0, ts[i - 1], -jnp.inf)
            for (i, _), ts in zip(positions, self.all_ts, strict=True)
        ]

    def _solve(
        self, carry: _Carry, stop: Float[Array, ""]
    ) -> tuple[Y, Y, PyTree[Array], diffrax.RESULTS]:
        sol = diffrax.diffeqsolve(
            self.terms,
            make_quadrature(self.numerics.solver),
            -carry.t,
            -stop,
            self.numerics.dt0,
            (carry.y, carry.grad_y),
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            stepsize_controller=self.numerics.stepsize_controller,
            adjoint=_NoAdjoint(),
            max_steps=self.numerics.max_steps,
            throw=False,
            solver_state=carry.grad_diff,
        )
        y, grad_y = jtu.tree_map(lambda x: x[-1], sol.ys)
        result = diffrax.RESULTS.where(
            diffrax.is_okay(carry.result), sol.result, carry.result
        )
        return y, grad_y, sol.solver_state, result

    def _add_saved(
        self,
        grad_y: Y,
        positions: list[tuple[Int[Array, ""], Int[Array, ""]]],
        times: list[Float[Array, ""] | None],
        stop: Float[Array, ""],
    ) -> tuple[Y, list[tuple[Int[Array, ""], Int[Array, ""]]], Bool[Array, ""]]:
        """Adds what was saved at `stop`, at most one output of each `SubSaveAt`, to the
        cotangent of the solution. Also returns whether there was any.
        """
        new_positions = []
        is_any_saved = jnp.array(False)
        for (i, j), t, grad in zip(positions, times, self.grad_ys, strict=True):
            if t is None:
                new_positions.append((i, j))
                continue
            is_saved = t >= stop
            more = jtu.tree_map(
                lambda g, j=j, is_saved=is_saved: jnp.where(is_saved, g[j - 1], 0), grad
            )
            grad_y = jtu.tree_map(jnp.add, grad_y, more)
            num = is_saved.astype(i.dtype)
            new_positions.append((i - num, j - num))
            is_any_saved = is_any_saved | is_saved
        return grad_y, new_positions, is_any_saved


class BackwardSDERule(eqx.Module):
    """The rule for the derivative of the loop of a solve, by the backward SDE."""

    equation: Equation
    throw: bool

    def __call__(
        self, perturbed, inputs, residuals, final_state, grad_final_state, axes
    ):
        parameters, start = inputs
        perturbed_parameters, perturbed_start = perturbed
        recorded, (t0, numerics) = residuals
        perturbed_times = (perturbed_start.times, perturbed_parameters.save_ts)
        if any(jtu.tree_leaves(perturbed_times)):
            raise ValueError(no_numerics)
        terms = with_weak_directions(parameters.terms)
        diff, nondiff = eqx.partition(
            (terms, parameters.args),
            (perturbed_parameters.terms, perturbed_parameters.args),
        )
        forward = ForwardTerms(nondiff, *self.equation)
        check_controls(forward, diff, final_state.tprev)
        at_end = (forward, diff, numerics.solver, final_state.tprev, final_state.y)
        check_additive(*at_end)
        is_wrong = does_not_commute(*at_end)

        backward_solve = _BackwardSolve(
            terms=self._adjoint_terms(forward, diff, terms, numerics.solver),
            numerics=numerics,
            tape=recorded.tape,
            t0=t0,
            y0=start.state.y,
            all_ts=parameters.save_ts,
            grad_ys=[x.ys for x in get_save_states(grad_final_state)],
        )
        first = backward_solve.to_start(
            _end(backward_solve, diff, final_state, grad_final_state)
        )
        saved = cotangents_of_earlier(recorded.num_saved, final_state, grad_final_state)
        grads = (
            _grad_parameters(parameters, diff, first.grad_diff, axes),
            _grad_start(start, first.grad_y, saved),
        )
        grads, is_wrong = self._checked(grads, first, is_wrong)
        grads = nondifferentiable_backward(grads, msg=first_derivatives_only)
        return *grads, is_wrong

    def _adjoint_terms(
        self,
        forward: ForwardTerms,
        diff: PyTree[Any],
        terms: PyTree[diffrax.AbstractTerm],
        solver: diffrax.AbstractSolver,
    ) -> PyTree[AdjointTerm]:
        is_ito = "noise" in self.equation.roles and has_layer(
            solver, diffrax.AbstractItoSolver
        )
        counter = itertools.count()
        return jtu.tree_map(
            lambda _: AdjointTerm(forward, diff, next(counter), is_ito),
            terms,
            is_leaf=is_single_term,
        )

    def _checked(
        self, grads: _T, first: _Carry, does_not_commute: Bool[Array, ""] | None
    ) -> tuple[_T, Bool[Array, ""]]:
        """`grads`, and whether they are wrong: which is an error, if it is to be."""
        failed = jnp.invert(diffrax.is_okay(first.result))
        did_not_return = first.return_error.is_too_large()
        is_wrong = failed | did_not_return
        if self.throw:
            grads = first.result.error_if(grads, failed)
            grads = eqx.error_if(grads, did_not_return, _could_not_return)
        if does_not_commute is not None:
            is_wrong = is_wrong | does_not_commute
            if self.throw:
                grads = eqx.error_if(grads, does_not_commute, _must_commute)
        return grads, is_wrong


def _end(
    backward_solve: _BackwardSolve,
    diff: PyTree[Any],
    final_state: State,
    grad_final_state: State,
) -> _Carry:
    """What is carried at the end of the forward solve."""
    largest_y = jtu.tree_map(
        lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)),
        backward_solve.y0,
        final_state.y,
    )
    scale = size_of_loss(
        largest_y, [grad_final_state.y, *backward_solve.grad_ys], None, None
    )
    return _Carry(
        t=jnp.asarray(final_state.tprev),
        y=final_state.y,
        grad_y=grad_final_state.y,
        grad_diff=zeros_like(diff),
        positions=[
            (jnp.asarray(x.saveat_ts_index), jnp.asarray(x.save_index))
            for x in get_save_states(final_state)
        ],
        page=backward_solve.num_pages - 1,
        return_error=ReturnError.none(scale, final_state.y, _tolerance),
        result=diffrax.RESULTS.successful,
    )


def _grad_parameters(
    parameters: Parameters, diff: PyTree[Any], grad_diff: PyTree[Array], axes: Axes
) -> Parameters:
    """The cotangents, summed over the batch where it shares what they are of."""
    _, add_up = vjp(lambda shared, *_: shared, axes, diff, None, None)
    (grad_terms, grad_args), _ = add_up(grad_diff)
    save_fns, save_ts = jtu.tree_map(
        lambda _: None, (parameters.save_fns, parameters.save_ts)
    )
    return Parameters(grad_terms, grad_args, save_fns, save_ts)


def _grad_start(start: Start, grad_y: Y, saved: Any) -> Start:
    zeros = lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None
    grad_solver_state = jtu.tree_map(zeros, start.state.solver_state)
    none = jtu.tree_map(lambda _: None, start.times)
    return Start(SolveState(grad_y, grad_solver_state), saved, none)
