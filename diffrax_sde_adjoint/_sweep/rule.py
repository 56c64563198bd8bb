"""The rule for the derivative of the loop of a solve: from the cotangents of its final
state and outputs to those of all that it depends on.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._compat import State, save_y
from .._forward.gradient_in_times import pull_back_times
from .._forward.instability import (
    Spurious,
    has_overflowed,
    is_not_finite,
    is_unstable,
)
from .._forward.records import Cotangents, Recorded, Start
from .._forward.return_error import (
    ReturnError,
    could_not_return,
    is_not_inverse,
    near_exact_tolerance,
    size_of_loss,
)
from .._forward.saved import cotangents_of_earlier, get_positions, get_save_states
from .._forward.tape import SolveState
from .._misc import zeros_like
from .._solver import EES25, EES27, Reversible, ReversibleHeun, is_reversible
from .._solver.stage_loops import linearizable
from .kept import pull_back_kept
from .replay import replay
from .saved_outputs import SavedOutputs
from .sweep import Sweep, SweepState, arrive
from .undo import inverts_last_step, undo
from .undo_carried import undo_carried
from .undo_staggered import can_stagger, has_plain_steps, undo_staggered


_T = TypeVar("_T")

# Solvers whose `backward_step` is known to be right.
_invertible = (EES25, EES27, Reversible, ReversibleHeun)


class SweepRule(eqx.Module):
    """The rule for the derivative of the loop of a solve: the sweep, from what the
    forward solve left to the cotangents of all that it depends on. `save_steps` is
    `SubSaveAt.steps` of each.
    """

    solver: diffrax.AbstractSolver
    save_steps: list[int]
    has_progress_meter: bool
    throw: bool

    def __call__(
        self, parameters, start, perturbed, recorded, final_state, grad_final_state
    ):
        self._check_supported(recorded, perturbed)
        size = _make_size_of_loss(
            final_state, grad_final_state, parameters.all.save_fns
        )
        solver = linearizable(self.solver)
        grad_saved = get_save_states(grad_final_state)
        outputs = SavedOutputs(
            steps=self.save_steps,
            interpolation_cls=solver.interpolation_cls,
            parameters=parameters,
            grad_ys=[x.ys for x in grad_saved],
            grad_ts=[x.ts for x in grad_saved],
            grad_dense_infos=grad_final_state.dense_infos,
            grad_event_dense_info=grad_final_state.event_dense_info,
        )
        sweep = Sweep(solver, recorded.tape, start.state.y, outputs, parameters)
        end = _end(sweep, final_state, grad_final_state, size)
        if recorded.linearized_step is not None:
            first = sweep(ft.partial(pull_back_kept, recorded.linearized_step), end)
        elif is_reversible(solver):
            way = undo
            if has_plain_steps(sweep, end):
                way = undo_staggered if can_stagger(sweep, end) else undo_carried
            first = arrive(sweep(way, end), start.state)
        else:
            first = sweep(replay, end)
        saved = cotangents_of_earlier(recorded.num_saved, final_state, grad_final_state)
        times = pull_back_times(
            start.times, recorded.loop, perturbed.times, grad_final_state
        )
        grads = (first.grads.parameters, Start(first.grads.state, saved, times))
        return self._checked(grads, sweep, end, first, size, grad_final_state)

    def _check_supported(self, recorded: Recorded, perturbed: Start) -> None:
        if recorded.tape is None:
            raise ValueError(
                "Cannot differentiate `diffeqsolve(..., max_steps=None, "
                "adjoint=StochasticAdjoint())`, as JAX needs to know how much memory "
                "to allocate. Pass a bound as `max_steps`. It may be generous, as it "
                "costs the size of one floating-point number a step; but with "
                "`store_all=True` that of all that is kept of a step, unless there are "
                "constant steps between times that are Python's numbers."
            )
        if recorded.sees_solution:
            raise ValueError(
                "`adjoint=StochasticAdjoint()` does not differentiate how step sizes "
                "depend on the solution, as they do with this step size controller. "
                "Put `jax.lax.stop_gradient` around what it computes from the "
                "solution, as `diffrax.PIDController` does, or use "
                "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
            )
        if self.has_progress_meter and any(jtu.tree_leaves(perturbed.times)):
            raise ValueError(
                "`diffeqsolve(..., progress_meter=..., adjoint=StochasticAdjoint())` "
                "does not support differentiating with respect to the times of a "
                "solve, as it is then run once more. Do without the progress meter."
            )

    def _checked(
        self,
        grads: _T,
        sweep: Sweep,
        end: SweepState,
        first: SweepState,
        size: Callable[..., Float[Array, ""]],
        grad_final_state: State,
    ) -> tuple[_T, Bool[Array, ""]]:
        """`grads`, and whether they are wrong: which is an error, if it is to be."""
        failed = jnp.invert(diffrax.is_okay(first.result))
        did_not_return = first.return_error.is_too_large()
        unstable = unstable_here = overflow = jnp.array(False)
        if first.spurious is not None:
            change = first.spurious.size_of_change(sweep.tape, sweep.init_y)
            scale = size(change, by_entry=True)
            unstable, unstable_here = first.spurious.is_too_large(scale, sweep.axes)
            overflow = has_overflowed(
                end.state.y, sweep.init_y, sweep.parameters.all, grad_final_state
            )
        if self.throw:
            grads = first.result.error_if(grads, failed)
            grads = eqx.error_if(grads, unstable, is_unstable)
            grads = eqx.error_if(grads, overflow, is_not_finite)
            # Of a solver that a user wrote, it may be the fault of its `backward_step`.
            is_inverse = jnp.array(True)
            if is_reversible(sweep.solver) and not (
                issubclass(type(sweep.solver), _invertible)
                or sweep.solver.is_near_exact
            ):
                is_inverse = inverts_last_step(sweep, end)
            grads = eqx.branched_error_if(
                grads,
                did_not_return,
                jnp.where(is_inverse, 0, 1),
                [could_not_return, is_not_inverse(sweep.solver)],
            )
        return grads, failed | did_not_return | unstable_here | overflow


def _make_size_of_loss(
    final_state: State, grad_final_state: State, save_fns: list[Any]
) -> Callable[..., Float[Array, ""]]:
    """`size_of_loss` of what a solve has left, as a function of the size of `y`."""
    grad_ys, outputs, grad_outputs = [grad_final_state.y], [], []
    states = (final_state, grad_final_state)
    for fn, x, grad in zip(save_fns, *map(get_save_states, states), strict=True):
        if fn is save_y:
            grad_ys.append(grad.ys)
        else:
            outputs.append(x.ys)
            grad_outputs.append(grad.ys)
    get = lambda state: (state.dense_infos, state.event_dense_info, state.solver_state)
    return ft.partial(
        size_of_loss,
        grad_ys=grad_ys,
        outputs=(outputs, get(final_state)),
        grad_outputs=(grad_outputs, get(grad_final_state)),
    )


def _end(
    sweep: Sweep,
    final_state: State,
    grad_final_state: State,
    size: Callable[..., Float[Array, ""]],
) -> SweepState:
    """What the sweep carries at the end of the solve."""
    solver = sweep.solver
    is_near_exact = is_reversible(solver) and solver.is_near_exact
    return SweepState(
        state=SolveState(final_state.y, final_state.solver_state),
        next_t0=final_state.tprev,
        positions=get_positions(final_state),
        grads=Cotangents(
            state=SolveState(grad_final_state.y, grad_final_state.solver_state),
            parameters=zeros_like(sweep.parameters.diff),
        ),
        return_error=ReturnError.none(
            size(sweep.tape.largest_y),
            final_state.y,
            near_exact_tolerance if is_near_exact else 0.0,
        ),
        spurious=(
            Spurious.none(final_state.y, sweep.init_y)
            if issubclass(type(solver), ReversibleHeun)
            else None
        ),
        result=diffrax.RESULTS.successful,
    )
