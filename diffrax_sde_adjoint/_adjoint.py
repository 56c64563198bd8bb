"""`StochasticAdjoint`: what it accepts, and the forward solve.

A solve is diffrax's own, up to its loop over steps. This runs without derivatives, and
records a tape (`_forward/tape.py`); its derivative is a rule of its own
(`_sweep/rule.py`). Everything before and after the loop, such as the initial state of
the solver, the time of an event or the output of `diffeqsolve`, is differentiated by
JAX.
"""

import functools as ft
import math
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._autodiff.custom_derivative import detach, with_derivative
from ._backward_sde.options import (
    BackwardSDE,
    first_derivatives_only,
    look_at,
    make_numerics,
    no_numerics,
    no_solver_state,
)
from ._backward_sde.rule import SolveBackwards
from ._brownian.steps import warn_of_costly_steps
from ._compat import State, is_unsafe_sde, nondifferentiable, nondifferentiable_backward
from ._forward.saved import SaveInputs, get_save_states, get_saved
from ._forward.step_sizes import look_into, may_jump
from ._forward.step_times import Loop, distinct, split_times
from ._forward.tape import SolveState, loop_and_record, plain_while_loop
from ._solver import ReversibleHeun, carried, check_sense, is_reversible
from ._solver.stage_loops import in_forward_mode, without_loops
from ._sweep import Backward, no_second_derivative
from ._term.hoisted import hoist_closures, hoist_save_fns


_instead = "Use `adjoint=diffrax.RecursiveCheckpointAdjoint()` instead."
_no_forward_mode = (
    "`adjoint=StochasticAdjoint()` does not support forward mode (`jax.jvp`, "
    "`jax.jacfwd`, `jax.linearize`) of a solve. Use `adjoint=diffrax.ForwardMode()` "
    "instead, or `diffrax_sde_adjoint.forward_sensitivity`, or reverse mode "
    "(`jax.grad`, `jax.jacrev`). (Gradients can be differentiated in forward mode, as "
    "in `jax.hessian`.)"
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
        [`diffrax_sde_adjoint.ReversibleHeun`][] for Stratonovich SDEs. Memory does not
        grow with the number of steps, except for the time of each of `max_steps` (4
        bytes in float32, twice that if there can be jumps). Going back through a step
        costs undoing it and one VJP of it. For convenience,
        [`diffrax.ReversibleHeun`][] is replaced by ours.
    - *Making its steps again*, with any other solver. The forward solve keeps its state
        every `checkpoint_every` steps; from there the steps in between are made again,
        and their states kept for as long as they are needed. This holds
        `max_steps / checkpoint_every + checkpoint_every` states, and the noise of
        `checkpoint_every` steps. Going back through a step costs making it and one VJP
        of it.

    The stages of diffrax's stochastic Runge-Kutta methods are written out, which is
    faster than their loop. Solutions are the same up to rounding.

    Brownian paths have to give the same value when queried again, as
    [`diffrax_sde_adjoint.BrownianInterval`][] does.

    Undoing a solve whose dynamics contract amplifies rounding errors. If it does not
    lead back to where the solve had been, and this would change the loss by more than
    the cube root of the unit of rounding (6e-6 in float64, 5e-3 in float32, relative to
    the size of the outputs times their cotangents), then this is an error; or, with
    `diffeqsolve(..., throw=False)`, the gradient is NaN. With `checkpoint_every`, this
    starts anew from every state that was kept. Near-exact solvers, such as
    [`diffrax_sde_adjoint.EES25`][], may be off by 5e-3 in float64 too. Likewise it is
    an error if [`diffrax_sde_adjoint.ReversibleHeun`][] is not stable on a solve, so
    that its loss is wrong by more than 3% of how far the solution moves times the
    cotangents, both summed over all elements of a batch (13% without a batch).

    Gradients are computed with respect to `y0`, `args`, a passed `solver_state`,
    `SaveAt(ts=...)`, every floating-point array inside `terms`, and whatever a vector
    field or a `SaveAt(fn=...)` refers to by closure. For ODEs and CDEs also with
    respect to `t0`, `t1`, `dt0` and what is in the step size controller, which costs
    another solve, and its memory, for each number that is differentiated. (Brownian
    paths have no derivative in time.) How step sizes depend on the solution is not
    differentiated: with the controllers of diffrax they have no derivative either.

    Gradients can be differentiated in forward mode: `jax.hessian` and
    `jax.jvp(jax.grad(...), ...)`.

    ??? info "What is not supported"

        The following raise an error:

        - terms whose product of vector field and control is not of the structure of
            the solution;
        - terms that were converted for solvers of the other kind (Itô, Stratonovich);
        - differentiating a solve in forward mode, for which there is
            [`diffrax.ForwardMode`][];
        - differentiating a gradient in reverse mode, for which there is
            [`diffrax.DirectAdjoint`][];
        - differentiating a solve with `max_steps=None`;
        - differentiating with respect to what is in the solver, or what a control
            refers to by closure;
        - differentiating with respect to times with a progress meter;
        - differentiating a solve with a step size controller of your own, if what it
            decides has a derivative with respect to the solution or `args`.

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
    backward: BackwardSDE | None = None

    def __check_init__(self):
        num = self.checkpoint_every
        if num is not None and (not isinstance(num, int) or num < 1):
            raise ValueError(
                "`StochasticAdjoint(checkpoint_every=...)` must be a positive integer, "
                f"or `None`, but is {num}."
            )
        if not isinstance(self.backward, BackwardSDE | None):
            raise ValueError(
                "`StochasticAdjoint(backward=...)` must be an instance of "
                "`BackwardSDE`, as `BackwardSDE()` is, or `None`, but is "
                f"{self.backward}."
            )

    def loop(
        self=None,
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
        del passed_controller_state
        if self is None:
            # `diffeqsolve` calls this method of whatever it is given.
            raise ValueError(
                "`diffeqsolve(..., adjoint=StochasticAdjoint)` was given the class. "
                "Pass an instance: `adjoint=StochasticAdjoint()`."
            )
        check_sense(terms, solver)
        if is_unsafe_sde(terms):
            raise ValueError(
                "`adjoint=StochasticAdjoint()` does not support `UnsafeBrownianPath`, "
                "as it cannot be evaluated again. Use "
                "`diffrax_sde_adjoint.BrownianInterval`, which costs the same."
            )
        warn_of_costly_steps(terms, stepsize_controller, t0, t1, dt0)
        if type(solver) is diffrax.ReversibleHeun:
            solver = ReversibleHeun()
            init_state = eqx.tree_at(
                lambda s: s.solver_state, init_state, carried(init_state.solver_state)
            )
        solver = without_loops(solver)
        if self.backward is None:
            way_back = None
        else:
            if self.checkpoint_every is not None and max_steps is None:
                raise ValueError(
                    "`StochasticAdjoint(checkpoint_every=..., backward=...)` needs "
                    "`diffeqsolve(..., max_steps=...)`, to know how many states to "
                    "keep."
                )
            kind = look_at(solver, terms, saveat, event, init_state.y)
            numerics = make_numerics(
                self.backward,
                kind,
                solver,
                terms,
                stepsize_controller,
                dt0,
                max_steps,
                init_state.tprev.dtype,
            )
            way_back = (kind, nondifferentiable(numerics, msg=no_numerics))
            if passed_solver_state:
                init_state = eqx.tree_at(
                    lambda s: s.solver_state,
                    init_state,
                    nondifferentiable(init_state.solver_state, msg=no_solver_state),
                )
        terms = hoist_closures(terms, t0, init_state.y, args)
        saveat = hoist_save_fns(saveat, t0, init_state.y, args)

        solver = nondifferentiable(
            solver,
            msg="`adjoint=StochasticAdjoint()` does not differentiate `solver`. "
            f"{_instead}",
        )
        # With these loops the solver has every derivative.
        forward_solver = in_forward_mode(solver)
        # In a batch, an element whose solve has no length makes no step, but one is
        # evaluated as long as others make some. diffrax would have it leave the path.
        tnext = jnp.where(t0 < t1, init_state.tnext, init_state.tprev)
        init_state = eqx.tree_at(lambda s: s.tnext, init_state, tnext)
        stepsize_controller, sees_solution = look_into(
            stepsize_controller, terms, forward_solver, init_state, args
        )
        t1, stepsize_controller = distinct((t1, stepsize_controller))
        times = distinct(_get_times(init_state))
        init_state = eqx.tree_at(_get_times, init_state, times, is_leaf=_is_none)

        return self._loop(
            args=args,
            terms=terms,
            solver=forward_solver,
            stepsize_controller=stepsize_controller,
            event=event,
            saveat=saveat,
            t0=t0,
            t1=t1,
            dt0=dt0,
            max_steps=max_steps,
            init_state=init_state,
            inner_while_loop=plain_while_loop,
            outer_while_loop=ft.partial(
                self._differentiable_loop,
                args=args,
                terms=terms,
                solver=solver,
                way_back=way_back,
                stepsize_controller=stepsize_controller,
                saveat=saveat,
                times=(t1, stepsize_controller, times),
                sees_solution=sees_solution,
                has_progress_meter=type(progress_meter) is not diffrax.NoProgressMeter,
                throw=throw,
            ),
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
        way_back,
        stepsize_controller,
        saveat,
        times,
        sees_solution,
        has_progress_meter,
        throw,
    ) -> State:
        subs = jtu.tree_leaves(saveat.subs, is_leaf=_is_subsaveat)

        def run(init_state):
            needs_no_tape = way_back is not None and self.checkpoint_every is None
            if max_steps is None or needs_no_tape:
                final_state = plain_while_loop(
                    cond_fun, body_fun, init_state, max_steps=max_steps, buffers=buffers
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
                may_have_gaps=init_state.made_jump is not False
                or may_jump(stepsize_controller),
                take_snapshots=not is_reversible(solver)
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
            get_saved(init_state),
            of_times,
        )
        _, (*_, detached_of_times), loop = detach((shared, own, loop))
        final_state, tape = nondifferentiable_backward(
            eqx.combine(detached_of_times, loop)(),
            msg=no_second_derivative if way_back is None else first_derivatives_only,
        )
        num_saved = [x.save_index for x in get_save_states(init_state)]
        if way_back is None:
            rule = Backward(
                [sub.steps for sub in subs], sees_solution, has_progress_meter, throw
            )
            residuals = (tape, num_saved, loop, solver)
        else:
            kind, numerics = way_back
            rule = SolveBackwards(kind, throw)
            residuals = (tape, num_saved, (init_state.tprev, numerics))
        final_state = with_derivative(
            rule, shared, own, residuals, final_state, no_forward_mode=_no_forward_mode
        )
        if way_back is not None:
            final_state = eqx.tree_at(
                lambda s: s.solver_state,
                final_state,
                nondifferentiable_backward(
                    final_state.solver_state, msg=no_solver_state, symbolic=False
                ),
                is_leaf=_is_none,
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
    default it is the square root of `max_steps`, which takes the least memory. With
    `backward`, the backward solve starts anew from every state that is kept; by default
    nothing is kept.
- `backward`: solve the backward SDE for approximate gradients, as it says. By default,
    gradients are exact.

**Raises:**

`ValueError` if `checkpoint_every` is not a positive integer.
"""


def _is_none(x: Any) -> bool:
    return x is None


def _is_subsaveat(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def _default_steps_per_page(solver: diffrax.AbstractSolver, max_steps: int) -> int:
    if is_reversible(solver):
        return _steps_per_page
    return max(1, math.ceil(math.sqrt(max_steps)))


def _get_times(state: State) -> tuple[Any, ...]:
    return (
        state.tprev,
        state.tnext,
        state.controller_state,
        state.event_tprev,
        state.event_tnext,
    )
