"""The rule for the derivative of the loop of a solve: the sweep, from what the forward
solve left to the cotangents of all that it depends on.
"""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import nondifferentiable_backward, save_y
from .._forward.instability import Spurious, is_unstable
from .._forward.return_error import (
    Drift,
    did_not_return,
    is_not_inverse,
    near_exact_tolerance,
    size_of_loss,
)
from .._forward.saved import cotangents_of_earlier, get_save_states
from .._forward.step_times import pull_back_times
from .._forward.tape import SolveState
from .._misc import zeros_like
from .._solver import EES25, EES27, Reversible, ReversibleHeun, is_reversible
from .._solver.stage_loops import summed_over_batches
from .._term.base import with_weak_directions
from .replay import replay
from .saved_outputs import Position, Saved
from .sweep import Cotangents, Sweep, SweepState, arrive
from .undo import inverts_last_step, reverse
from .undo_staggered import can_stagger, staggered


no_second_derivative = (
    "`adjoint=StochasticAdjoint()` does not support differentiating a gradient in "
    "reverse mode. Differentiate it in forward mode, as in `jax.jacfwd(jax.grad(f))`, "
    "or use `adjoint=diffrax.DirectAdjoint()` instead."
)


# Solvers whose `backward_step` is known to be right.
_invertible = (EES25, EES27, Reversible, ReversibleHeun)


class Backward(eqx.Module):
    """The rule for the derivative of the loop of a solve, which starts with certain
    states and outputs, and refers to terms and to the inputs of what is saved.
    """

    steps: list[int]
    sees_solution: bool
    has_progress_meter: bool
    throw: bool

    def __call__(
        self, perturbed, inputs, residuals, final_state, grad_final_state, axes
    ):
        (terms, save_inputs), (init_state, _, times) = inputs
        (perturbed_terms, perturbed_save_inputs), (*_, perturbed_times) = perturbed
        tape, num_saved, loop, solver = residuals
        if tape is None:
            raise ValueError(
                "Cannot differentiate `diffeqsolve(..., max_steps=None, "
                "adjoint=StochasticAdjoint())`, as JAX needs to know how much memory "
                "to allocate for the times of the steps. Pass a bound as `max_steps`, "
                "which may be generous: it costs the size of one floating-point number "
                "a step."
            )
        if self.sees_solution:
            raise ValueError(
                "`adjoint=StochasticAdjoint()` does not differentiate how step sizes "
                "depend on the solution, as they do with this step size controller. "
                "Put `jax.lax.stop_gradient` around what it computes from the "
                "solution, as `diffrax.PIDController` does, or use "
                "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
            )
        terms = with_weak_directions(terms)
        diff_terms, nondiff_terms = eqx.partition(terms, perturbed_terms)
        diff_inputs, nondiff_inputs = eqx.partition(save_inputs, perturbed_save_inputs)
        save_states = get_save_states(final_state)
        grad_save_states = get_save_states(grad_final_state)
        saved = Saved(
            self.steps,
            axes,
            nondiff_inputs,
            [x.ys for x in grad_save_states],
            [x.ts for x in grad_save_states],
            grad_final_state.dense_infos,
            grad_final_state.event_dense_info,
        )
        if axes:
            solver = summed_over_batches(solver)
        sweep = Sweep(
            solver,
            tape,
            init_state.y,
            saved,
            diff_inputs,
            diff_terms,
            nondiff_terms,
            axes,
        )
        get_dense_infos = lambda state: (state.dense_infos, state.event_dense_info)
        saved_ys = [
            (state.ys, grad, fn is save_y)
            for state, grad, fn in zip(
                save_states, saved.grad_ys, save_inputs.fns, strict=True
            )
        ]
        grad_ys = [
            grad_final_state.y,
            *(grad for _, grad, is_y in saved_ys if is_y),
        ]
        others = (
            [ys for ys, _, is_y in saved_ys if not is_y],
            get_dense_infos(final_state),
            final_state.solver_state,
        )
        grad_others = (
            [grad for _, grad, is_y in saved_ys if not is_y],
            get_dense_infos(grad_final_state),
            grad_final_state.solver_state,
        )
        can_be_unstable = issubclass(type(solver), ReversibleHeun)
        end = SweepState(
            SolveState(final_state.y, final_state.solver_state),
            final_state.tprev,
            [
                Position(jnp.asarray(x.saveat_ts_index), jnp.asarray(x.save_index))
                for x in save_states
            ],
            Cotangents(
                grad_final_state.y,
                grad_final_state.solver_state,
                zeros_like(diff_terms),
                zeros_like(diff_inputs),
            ),
            Drift.none(
                size_of_loss(tape.largest_y, grad_ys, others, grad_others),
                final_state.y,
                near_exact_tolerance
                if is_reversible(solver) and solver.is_near_exact
                else 0.0,
            ),
            Spurious.none(final_state.y, init_state.y) if can_be_unstable else None,
            diffrax.RESULTS.successful,
        )
        if not is_reversible(solver):
            start = sweep(replay, end)
        else:
            way = staggered if can_stagger(sweep, end) else reverse
            start = arrive(sweep(way, end), init_state)
        grads = start.grads

        grad_saved = cotangents_of_earlier(num_saved, final_state, grad_final_state)
        grad_times = jtu.tree_map(lambda _: None, times)
        if any(jtu.tree_leaves(perturbed_times)):
            if self.has_progress_meter:
                raise ValueError(
                    "`diffeqsolve(..., progress_meter=..., adjoint=StochasticAdjoint())"
                    "` does not support differentiating with respect to the times of a "
                    "solve, as it is then run once more. Do without the progress meter."
                )
            grad_times = pull_back_times(times, loop, perturbed_times, grad_final_state)
        grad_shared = (grads.terms, grads.inputs)
        grad_own = (
            SolveState(grads.y, grads.solver_state),
            grad_saved,
            grad_times,
        )
        failed = jnp.invert(diffrax.is_okay(start.result))
        drifted = start.drift.is_too_large()
        unstable = unstable_here = jnp.array(False)
        if start.spurious is not None:
            loss = lambda size: size_of_loss(
                size, grad_ys, others, grad_others, by_entry=True
            )
            unstable, unstable_here = start.spurious.is_too_large(
                tape.largest_y, loss, axes
            )
        if self.throw:
            grads = (grad_shared, grad_own)
            grads = start.result.error_if(grads, failed)
            grads = eqx.error_if(grads, unstable, is_unstable)
            # Of a solver that a user wrote, it may be the fault of its `backward_step`.
            is_inverse = jnp.array(True)
            if (
                is_reversible(solver)
                and not issubclass(type(solver), _invertible)
                and not solver.is_near_exact
            ):
                is_inverse = inverts_last_step(sweep, end)
            grad_shared, grad_own = eqx.branched_error_if(
                grads,
                drifted,
                jnp.where(is_inverse, 0, 1),
                [did_not_return, is_not_inverse(solver)],
            )
        grad_shared, grad_own = nondifferentiable_backward(
            (grad_shared, grad_own), msg=no_second_derivative
        )
        return grad_shared, grad_own, failed | drifted | unstable_here
