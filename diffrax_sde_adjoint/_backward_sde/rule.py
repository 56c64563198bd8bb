"""The rule for the derivative of a solve with `BackwardSDEAdjoint`.

From the final state, this goes from one time to the next at which something happens:
where a cotangent arrives, as the solution was saved there, or where the state is known,
as the forward solve has kept it. In between is a `diffrax.diffeqsolve` of the adjoint
terms (`adjoint_terms.py`).
"""

import functools as ft
import itertools
from typing import TypeVar

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._compat import RealScalarLike, State, Y, integration_loop
from .._forward.records import Parameters, Start
from .._forward.return_error import ReturnError, size_of_loss
from .._forward.saved import (
    Position,
    cotangents_of_earlier,
    get_positions,
    get_save_states,
)
from .._forward.tape import SolveState, Tape, plain_while_loop
from .._misc import in_scope, zeros_like
from .._solver import has_layer
from .._term.base import is_single_term
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
    the cotangents of the parameters, how much of what was saved lies further left, the
    page of the tape, and whether all went well.
    """

    t: Float[Array, ""]
    y: Y
    grad_y: Y
    grad_diff: Parameters
    positions: list[Position]
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

    @in_scope("backward_sde")
    def to_start(self, end: _Carry) -> _Carry:
        # Not a method, which JAX would want to hash.
        body = lambda carry: self._to_next_time(carry)
        return lax.while_loop(lambda carry: carry.page >= 0, body, end)

    def _to_next_time(self, carry: _Carry) -> _Carry:
        # The start of the page, and the solution there.
        stop, known_y = self.t0, self.y0
        if self.tape is not None:
            page = self.tape.page(carry.page)
            assert page.snapshot is not None
            stop, known_y = page.ends[0], page.snapshot.y
        # The last time on the left at which each `SubSaveAt` saved, by its number.
        times = {
            i: jnp.where(x.ts_index > 0, ts[x.ts_index - 1], -jnp.inf)
            for i, (x, ts) in enumerate(zip(carry.positions, self.all_ts, strict=True))
            if ts is not None and len(ts) > 0
        }
        stop = ft.reduce(jnp.maximum, times.values(), stop)
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
        positions: list[Position],
        times: dict[int, Float[Array, ""]],
        stop: Float[Array, ""],
    ) -> tuple[Y, list[Position], Bool[Array, ""]]:
        """Adds what was saved at `stop`, at most one output of each `SubSaveAt`, to the
        cotangent of the solution. Also returns whether there was any.
        """
        positions = list(positions)
        is_any_saved = jnp.array(False)
        for i, t in times.items():
            is_saved = t >= stop
            index = positions[i].save_index - 1
            more = jtu.tree_map(
                lambda g, k=index, is_saved=is_saved: jnp.where(is_saved, g[k], 0),
                self.grad_ys[i],
            )
            grad_y = jtu.tree_map(jnp.add, grad_y, more)
            num = is_saved.astype(index.dtype)
            positions[i] = jtu.tree_map(lambda x, num=num: x - num, positions[i])
            is_any_saved = is_any_saved | is_saved
        return grad_y, positions, is_any_saved


class BackwardSDERule(eqx.Module):
    """The rule for the derivative of the loop of a solve, by the backward SDE."""

    equation: Equation
    t0: Float[Array, ""]
    numerics: Numerics
    throw: bool

    def __call__(
        self, parameters, start, perturbed, recorded, final_state, grad_final_state
    ):
        diff = parameters.diff
        if len(jtu.tree_leaves(diff.save_ts)) > 0 or any(
            jtu.tree_leaves(perturbed.times)
        ):
            raise ValueError(no_numerics)
        solver = self.numerics.solver
        forward = ForwardTerms(parameters.nondiff, *self.equation)
        check_controls(forward, diff, final_state.tprev)
        at_end = (forward, diff, solver, final_state.tprev, final_state.y)
        check_additive(*at_end)
        not_commutative = does_not_commute(*at_end)

        is_ito = "noise" in self.equation.roles and has_layer(
            solver, diffrax.AbstractItoSolver
        )
        counter = itertools.count()
        backward_solve = _BackwardSolve(
            terms=jtu.tree_map(
                lambda _: AdjointTerm(forward, diff, next(counter), is_ito),
                parameters.all.terms,
                is_leaf=is_single_term,
            ),
            numerics=self.numerics,
            tape=recorded.tape,
            t0=self.t0,
            y0=start.state.y,
            all_ts=parameters.all.save_ts,
            grad_ys=[x.ys for x in get_save_states(grad_final_state)],
        )
        first = backward_solve.to_start(
            _end(backward_solve, diff, final_state, grad_final_state)
        )
        saved = cotangents_of_earlier(recorded.num_saved, final_state, grad_final_state)
        # The cotangents of what the batch shares are sums over it.
        grad_parameters = parameters.summed(first.grad_diff)
        grad_solver_state = zeros_like(
            eqx.filter(start.state.solver_state, eqx.is_inexact_array)
        )
        state = SolveState(first.grad_y, grad_solver_state)
        times = jtu.tree_map(lambda _: None, start.times)
        grads = (grad_parameters, Start(state, saved, times))
        return self._checked(grads, first, not_commutative)

    def _checked(
        self, grads: _T, first: _Carry, not_commutative: Bool[ArrayLike, ""]
    ) -> tuple[_T, Bool[Array, ""]]:
        """`grads`, and whether they are wrong: which is an error, if it is to be."""
        failed = jnp.invert(diffrax.is_okay(first.result))
        did_not_return = first.return_error.is_too_large()
        if self.throw:
            grads = first.result.error_if(grads, failed)
            grads = eqx.error_if(grads, did_not_return, _could_not_return)
            grads = eqx.error_if(grads, not_commutative, _must_commute)
        return grads, failed | did_not_return | not_commutative


def _end(
    backward_solve: _BackwardSolve,
    diff: Parameters,
    final_state: State,
    grad_final_state: State,
) -> _Carry:
    """What is carried at the end of the forward solve."""
    largest_y = jtu.tree_map(
        lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)),
        backward_solve.y0,
        final_state.y,
    )
    tape = backward_solve.tape
    scale = size_of_loss(
        largest_y, [grad_final_state.y, *backward_solve.grad_ys], None, None
    )
    return _Carry(
        t=jnp.asarray(final_state.tprev),
        y=final_state.y,
        grad_y=grad_final_state.y,
        grad_diff=zeros_like(diff),
        positions=get_positions(final_state),
        page=jnp.asarray(1 if tape is None else tape.num_pages) - 1,
        return_error=ReturnError.none(scale, final_state.y, _tolerance),
        result=diffrax.RESULTS.successful,
    )
