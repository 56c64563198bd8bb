"""`StochasticAdjoint`: what it accepts, and the call into the backward sweep.

A solve is diffrax's own, up to its loop over steps. This runs without derivatives, and
records a tape (`_tape.py`); its derivative is the sweep (`_sweep/`). Everything
before and after the loop, such as the initial state of the solver, the time of an event
or the output of `diffeqsolve`, is differentiated by JAX.
"""

import math
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._batching import detach, with_derivative
from ._closures import hoist_closures, hoist_save_fns
from ._compat import (
    SaveState,
    State,
    is_unsafe_sde,
    nondifferentiable,
    nondifferentiable_backward,
    save_y,
)
from ._guard import Drift, did_not_return
from ._saves import Position, Saved, SaveInputs
from ._solver import AbstractReversibleSolver, ReversibleHeun
from ._stages import in_forward_mode, summed_over_batches
from ._sweep import (
    Cotangents,
    Sweep,
    SweepState,
    arrive,
    can_stagger,
    replay,
    reverse,
    staggered,
)
from ._tape import SolveState, loop_and_record, plain_while_loop
from ._times import Loop, distinct, pull_back_times, split_times
from ._trees import zeros_like


_instead = "Use `adjoint=diffrax.RecursiveCheckpointAdjoint()` instead."
_no_second_derivative = (
    "`adjoint=StochasticAdjoint()` does not support differentiating a gradient in "
    "reverse mode. Differentiate it in forward mode, as in `jax.jacfwd(jax.grad(f))`, "
    "or use `adjoint=diffrax.DirectAdjoint()` instead."
)
# Of a page of the tape, if there is nothing else to say how long one should be.
_steps_per_page = 63


class StochasticAdjoint(diffrax.AbstractAdjoint):
    """Backpropagate through [`diffrax.diffeqsolve`][], exactly, and fast.

    ```python
    diffeqsolve(..., adjoint=StochasticAdjoint())
    ```

    Gradients are those of the numerical solution, as for
    [`diffrax.RecursiveCheckpointAdjoint`][] and up to rounding equal to its, for every
    solver, step size controller and `SaveAt` of diffrax, and for SDEs, ODEs and CDEs.
    There are two ways back through a solve:

    - *Undoing its steps*, with a solver for which this is possible: any
        [`diffrax_sde_adjoint.AbstractReversibleSolver`][], such as
        [`diffrax_sde_adjoint.ReversibleHeun`][]. Memory does not grow with the number
        of steps, except for the time of each of `max_steps` (4 bytes in float32, twice
        that if there can be jumps). Going back through a step costs undoing it and one
        VJP of it. For convenience, [`diffrax.ReversibleHeun`][] is replaced by ours.
    - *Making its steps again*, with any other solver. The forward solve keeps its state
        every `checkpoint_every` steps; from there the steps in between are made again,
        and their states kept for as long as they are needed. This holds
        `max_steps / checkpoint_every + checkpoint_every` states. Going back through a
        step costs making it and one VJP of it.

    Brownian paths have to give the same value when queried again, as
    [`diffrax_sde_adjoint.BrownianInterval`][] does.

    Undoing a solve whose dynamics contract amplifies rounding errors. If it does not
    lead back to where the solve had been, and this would change the loss by more than
    the cube root of the unit of rounding (6e-6 in float64, 5e-3 in float32, relative to
    the size of the outputs times their cotangents), then this is an error; or, with
    `diffeqsolve(..., throw=False)`, the gradient is NaN. With `checkpoint_every`, this
    starts anew from every state that was kept.

    Gradients are computed with respect to `y0`, `args`, a passed `solver_state`,
    `SaveAt(ts=...)`, every floating-point array inside `terms`, and whatever a vector
    field or a `SaveAt(fn=...)` refers to by closure. For ODEs and CDEs also with
    respect to `t0`, `t1`, `dt0` and what is in the step size controller, which costs
    another solve, and its memory, for each number that is differentiated. (Brownian
    paths have no derivative in time.) That a step size controller looks at the solution
    to choose a step, or refers to something by closure, is not differentiated; it has
    no derivative with those of diffrax either.

    Gradients can be differentiated in forward mode: `jax.hessian` and
    `jax.jvp(jax.grad(...), ...)`.

    ??? info "What is not supported"

        The following raise an error:

        - differentiating a solve in forward mode, for which there is
            [`diffrax.ForwardMode`][];
        - differentiating a gradient in reverse mode, for which there is
            [`diffrax.DirectAdjoint`][];
        - differentiating a solve with `max_steps=None`;
        - differentiating with respect to what is in the solver, or what a control
            refers to by closure;
        - differentiating with respect to times with a progress meter.

    ??? cite "Reference"

        ```bibtex
        @article{kidger2021efficient,
            author={Kidger, Patrick and Foster, James and Li, Xuechen and Lyons, Terry},
            title={{E}fficient and {A}ccurate {G}radients for {N}eural {SDE}s},
            year={2021},
            journal={Advances in Neural Information Processing Systems}
        }
        ```
    """

    checkpoint_every: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        num = self.checkpoint_every
        if num is not None and (not isinstance(num, int) or num < 1):
            raise ValueError(
                "`StochasticAdjoint(checkpoint_every=...)` must be a positive integer, "
                f"or `None`, but is {num}."
            )

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ) -> tuple[State, Any]:
        del passed_solver_state, passed_controller_state
        if is_unsafe_sde(terms):
            raise ValueError(
                "`adjoint=StochasticAdjoint()` does not support `UnsafeBrownianPath`, "
                "as it cannot be evaluated again. Use "
                "`diffrax_sde_adjoint.BrownianInterval`, which costs the same."
            )
        if type(solver) is diffrax.ReversibleHeun:
            solver = ReversibleHeun()
        terms = hoist_closures(terms, t0, init_state.y, args)
        saveat = hoist_save_fns(saveat, t0, init_state.y, args)

        solver = nondifferentiable(
            solver,
            msg="`adjoint=StochasticAdjoint()` does not differentiate `solver`. "
            f"{_instead}",
        )
        t1, stepsize_controller = distinct((t1, stepsize_controller))
        times = distinct(_get_times(init_state))
        init_state = eqx.tree_at(_get_times, init_state, times, is_leaf=_is_none)

        def outer_while_loop(cond_fun, body_fun, init_state, *, max_steps, buffers):
            return self._differentiable_loop(
                cond_fun,
                body_fun,
                init_state,
                max_steps=max_steps,
                buffers=buffers,
                args=args,
                terms=terms,
                solver=solver,
                stepsize_controller=stepsize_controller,
                saveat=saveat,
                times=(t1, stepsize_controller, times),
                has_progress_meter=type(progress_meter) is not diffrax.NoProgressMeter,
                throw=throw,
            )

        return self._loop(
            args=args,
            terms=terms,
            solver=in_forward_mode(solver),
            stepsize_controller=stepsize_controller,
            event=event,
            saveat=saveat,
            t0=t0,
            t1=t1,
            dt0=dt0,
            max_steps=max_steps,
            init_state=init_state,
            inner_while_loop=plain_while_loop,
            outer_while_loop=outer_while_loop,
            progress_meter=progress_meter,
        )

    def _differentiable_loop(
        self,
        cond_fun,
        body_fun,
        init_state,
        *,
        max_steps,
        buffers,
        args,
        terms,
        solver,
        stepsize_controller,
        saveat,
        times,
        has_progress_meter,
        throw,
    ) -> State:
        subs = jtu.tree_leaves(saveat.subs, is_leaf=_is_subsaveat)

        def run(init_state):
            if max_steps is None:
                final_state = plain_while_loop(
                    cond_fun, body_fun, init_state, max_steps=None, buffers=buffers
                )
                return final_state, None
            steps_per_page = self.checkpoint_every
            if steps_per_page is None:
                steps_per_page = _default_steps_per_page(solver, max_steps)
            return loop_and_record(
                cond_fun,
                body_fun,
                init_state,
                max_steps=max_steps,
                buffers=buffers,
                steps_per_page=steps_per_page,
                may_have_gaps=_may_jump(stepsize_controller, init_state.made_jump),
                take_snapshots=not _is_reversible(solver)
                or self.checkpoint_every is not None,
            )

        loop = Loop(eqx.filter_closure_convert(run, init_state), init_state)
        of_times, loop = split_times(loop, times)
        shared = (
            terms,
            SaveInputs(args, [sub.fn for sub in subs], [sub.ts for sub in subs]),
        )
        own = (
            SolveState(init_state.y, init_state.solver_state),
            _get_saved(init_state),
            of_times,
        )
        _, (*_, detached_of_times), loop = detach((shared, own, loop))
        final_state, tape = nondifferentiable_backward(
            eqx.combine(detached_of_times, loop)(), msg=_no_second_derivative
        )
        final_state = with_derivative(
            _Backward([sub.steps for sub in subs], has_progress_meter, throw),
            shared,
            own,
            (
                tape,
                [x.save_index for x in _save_states(init_state)],
                loop,
                solver,
            ),
            final_state,
        )
        return eqx.tree_at(
            lambda s: s.controller_state,
            final_state,
            replace_fn=lambda x: nondifferentiable_backward(
                x,
                msg="`adjoint=StochasticAdjoint()` does not differentiate the output "
                f"`controller_state`. {_instead}",
                symbolic=False,
            ),
            is_leaf=_is_none,
        )


StochasticAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoint_every`: keep the state of the solve every so many accepted steps. With a
    solver whose steps can be undone, this bounds for how long rounding errors can grow;
    by default nothing is kept. With other solvers every value takes the same time; by
    default it is the square root of `max_steps`, which takes the least memory.

**Raises:**

`ValueError` if `checkpoint_every` is not a positive integer.
"""


class _Backward(eqx.Module):
    """The rule for the derivative of the loop of a solve, which starts with certain
    states and outputs, and refers to terms and to the inputs of what is saved.
    """

    steps: list[int]
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
        diff_terms, nondiff_terms = eqx.partition(terms, perturbed_terms)
        diff_inputs, nondiff_inputs = eqx.partition(save_inputs, perturbed_save_inputs)
        save_states = _save_states(final_state)
        grad_save_states = _save_states(grad_final_state)
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
        sweep = Sweep(solver, tape, saved, diff_inputs, diff_terms, nondiff_terms, axes)
        get_dense_infos = lambda state: (state.dense_infos, state.event_dense_info)
        saved_ys = [
            (state.ys, grad, fn is save_y)
            for state, grad, fn in zip(
                save_states, saved.grad_ys, save_inputs.fns, strict=True
            )
        ]
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
                tape.largest_y,
                [grad_final_state.y, *(grad for _, grad, is_y in saved_ys if is_y)],
                (
                    [ys for ys, _, is_y in saved_ys if not is_y],
                    get_dense_infos(final_state),
                ),
                (
                    [grad for _, grad, is_y in saved_ys if not is_y],
                    get_dense_infos(grad_final_state),
                ),
            ),
            diffrax.RESULTS.successful,
        )
        if not _is_reversible(solver):
            start = sweep(replay, end)
        else:
            way = staggered if can_stagger(sweep, end) else reverse
            start = arrive(sweep(way, end), init_state)
        grads = start.grads

        # What was saved within the steps has been dealt with.
        def is_kept(grad, first, end):
            index = jnp.arange(len(grad)).reshape((-1,) + (1,) * (grad.ndim - 1))
            return (index < first) | (index >= end)

        grad_saved, grad_dense_ts = _get_saved(grad_final_state)
        grad_saved = [
            jtu.tree_map(
                lambda g, i=i, x=x: jnp.where(is_kept(g, i, x.save_index), g, 0), grad
            )
            for grad, i, x in zip(grad_saved, num_saved, save_states, strict=True)
        ]
        if grad_dense_ts is not None:
            is_start = is_kept(grad_dense_ts, 1, final_state.dense_save_index + 1)
            grad_dense_ts = jnp.where(is_start, grad_dense_ts, 0)
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
            (grad_saved, grad_dense_ts),
            grad_times,
        )
        failed = jnp.invert(diffrax.is_okay(start.result))
        drifted = start.drift.is_too_large()
        if self.throw:
            grad_shared, grad_own = start.result.error_if(
                (grad_shared, grad_own), failed
            )
            grad_shared, grad_own = eqx.error_if(
                (grad_shared, grad_own), drifted, did_not_return
            )
        grad_shared, grad_own = nondifferentiable_backward(
            (grad_shared, grad_own), msg=_no_second_derivative
        )
        return grad_shared, grad_own, failed | drifted


def _is_none(x: Any) -> bool:
    return x is None


def _is_subsaveat(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def _save_states(state: State) -> list[SaveState]:
    is_save_state = lambda x: isinstance(x, SaveState)
    leaves = jtu.tree_leaves(state.save_state, is_leaf=is_save_state)
    return [x for x in leaves if is_save_state(x)]


def _is_reversible(solver: diffrax.AbstractSolver) -> bool:
    # Not `isinstance`, which looks through wrappers such as `diffrax.HalfSolver`.
    return issubclass(type(solver), AbstractReversibleSolver)


def _default_steps_per_page(solver: diffrax.AbstractSolver, max_steps: int) -> int:
    if _is_reversible(solver):
        return _steps_per_page
    return max(1, math.ceil(math.sqrt(max_steps)))


def _may_jump(controller: diffrax.AbstractStepSizeController, made_jump: Any) -> bool:
    """Whether a step may start elsewhere than where the one before it ended, or after a
    jump.
    """
    if made_jump is not False:
        return True
    if type(controller) is diffrax.ClipStepSizeController:
        has_jumps = controller.jump_ts is not None
        return has_jumps or _may_jump(controller.controller, made_jump)
    never = (diffrax.ConstantStepSize, diffrax.StepTo, diffrax.PIDController)
    return type(controller) not in never


def _get_times(state: State) -> tuple[Any, ...]:
    return (
        state.tprev,
        state.tnext,
        state.controller_state,
        state.event_tprev,
        state.event_tnext,
    )


def _get_saved(state: State) -> tuple[list[tuple[Any, Any]], Any]:
    """What there may be of it before the first step."""
    return [(x.ys, x.ts) for x in _save_states(state)], state.dense_ts
