"""The forward solve, for an adjoint whose derivative is a rule.

A solve is diffrax's own, up to its loop over steps. This runs without derivatives, and
records what the rule needs. Everything before and after the loop, such as the initial
state of the solver, the time of an event or the output of `diffeqsolve`, is
differentiated by JAX.
"""

import contextlib
import dataclasses
import functools as ft
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._autodiff.custom_derivative import detach, with_derivative
from .._brownian.costly_steps import warn_of_costly_steps
from .._brownian.path_of_solve import has_steps_on_cells, with_paths_of_solve
from .._compat import (
    Args,
    State,
    integration_loop,
    is_unsafe_sde,
    nondifferentiable,
    nondifferentiable_backward,
)
from .._misc import num_bytes, zeros_like
from .._solver import (
    ReversibleHeun,
    carried,
    check_sense,
    has_layer,
    never_fails,
)
from .._solver.stage_loops import (
    in_forward_mode,
    linearizable,
    started,
    without_loops,
)
from .._term.base import with_weak_directions
from .._term.hoisted import hoist_closures, hoist_save_fns
from .controllers import (
    close_over_controller,
    known_num_steps,
    may_jump,
)
from .gradient_in_times import distinct, split_times
from .records import Differentiated, Parameters, Recorded, Start
from .saved import get_save_states, get_saved, get_subs
from .steps import DrawnSolver, KeepingSolver, LinearizedStep, MadeStep
from .tape import SolveState, Tape, loop_and_record, plain_while_loop


_instead = "Use `adjoint=diffrax.RecursiveCheckpointAdjoint()` instead."


class Derivative(NamedTuple):
    """How a solve is differentiated.

    `rule(parameters, start, perturbed, recorded, final_state, grad_final_state)` finds
    the cotangents of the first two, and whether these are to be replaced by NaN.
    `perturbed` has `True` for each array in `start` that is differentiated. Without a
    `recording`, there is no tape.
    """

    rule: Callable[..., tuple[tuple[Parameters, Start], Bool[Array, ""]]]
    recording: "Recording | None"
    no_second_derivative: str
    no_forward_mode: str


class Recording(NamedTuple):
    """What the tape has: `steps_per_page`, or how to find it from the bytes of a state
    and of what is kept of a step; the state at the start of every `snapshot_every`th
    page, if it is not `None`; and what the way back needs of each step, if it
    `keeps_steps`.
    """

    steps_per_page: int | Callable[[int, int], int]
    snapshot_every: int | None
    keeps_steps: bool


def check_checkpoint_every(name: str, num: Any) -> None:
    if num is not None and (not isinstance(num, int) or num < 1):
        raise ValueError(
            f"`{name}(checkpoint_every=...)` must be a positive integer, or `None`, "
            f"but is {num}."
        )


def prepare(
    adjoint: Any,
    name: str,
    *,
    throw: bool,
    passed_solver_state: bool,
    passed_controller_state: bool,
    **kwargs: Any,
) -> dict[str, Any]:
    """The arguments of `AbstractAdjoint.loop`, which are checked, with a solver whose
    steps are those that are made. Messages are those of an `adjoint` of this `name`.
    """
    if adjoint is None:
        # `diffeqsolve` calls this method of whatever it is given.
        raise ValueError(
            f"`diffeqsolve(..., adjoint={name})` was given the class. Pass an "
            f"instance: `adjoint={name}()`."
        )
    terms, solver, init_state = (kwargs[x] for x in ("terms", "solver", "init_state"))
    check_sense(terms, solver)
    if is_unsafe_sde(terms):
        raise ValueError(
            f"`adjoint={name}()` does not support `UnsafeBrownianPath`, as it cannot "
            "be evaluated again. Use `diffrax_sde_adjoint.BrownianInterval`, which "
            "costs the same."
        )
    times = [kwargs[x] for x in ("t0", "t1", "dt0")]
    warn_of_costly_steps(terms, kwargs["stepsize_controller"], *times)
    controller, has_event = kwargs["stepsize_controller"], kwargs["event"] is not None
    num_steps = None
    if not passed_controller_state:
        num_steps = known_num_steps(controller, *times)
    is_constant = type(controller) is diffrax.ConstantStepSize
    terms, y = with_paths_of_solve(
        terms,
        init_state.y,
        *times,
        has_planned_steps=is_constant and num_steps is not None,
        # Or fails: with an error if it is to throw one.
        goes_to_end=throw and not has_event,
    )
    init_state = dataclasses.replace(init_state, y=y)
    if type(solver) is diffrax.ReversibleHeun:
        solver = ReversibleHeun()
        init_state = eqx.tree_at(
            lambda s: s.solver_state, init_state, carried(init_state.solver_state)
        )
    solver = without_loops(solver)
    if not passed_solver_state:
        solver, solver_state = started(
            solver,
            init_state.solver_state,
            terms,
            times[0],
            init_state.y,
            kwargs["args"],
        )
        init_state = dataclasses.replace(init_state, solver_state=solver_state)
    max_steps = kwargs["max_steps"]
    too_many = num_steps is not None and max_steps is not None and num_steps > max_steps
    if has_event or too_many or not never_fails(solver):
        num_steps = None
    changed = dict(solver=solver, init_state=init_state, num_steps=num_steps)
    return {**kwargs, **changed, "terms": terms}


def solve(
    adjoint: diffrax.AbstractAdjoint,
    derivative: Derivative,
    *,
    args,
    terms,
    solver,
    stepsize_controller,
    saveat,
    t0,
    t1,
    init_state,
    num_steps,
    **kwargs,
) -> tuple[State, Any]:
    """What `AbstractAdjoint.loop` is to return, for arguments from `prepare`."""
    name = type(adjoint).__name__
    terms = hoist_closures(terms, t0, init_state.y, args, name)
    saveat = hoist_save_fns(saveat, t0, init_state.y, args)
    msg = f"`adjoint={name}()` does not differentiate `solver`. {_instead}"
    solver = nondifferentiable(solver, msg=msg)
    # In a batch, an element whose solve has no length makes no step, but one is
    # evaluated as long as others make some. diffrax would have it leave the path.
    tnext = jnp.where(t0 < t1, init_state.tnext, init_state.tprev)
    init_state = eqx.tree_at(lambda s: s.tnext, init_state, tnext)
    stepsize_controller, sees_solution = close_over_controller(
        stepsize_controller, terms, solver, init_state, args
    )
    t1, stepsize_controller = distinct((t1, stepsize_controller))
    times = distinct(_get_times(init_state))
    init_state = eqx.tree_at(_get_times, init_state, times, is_leaf=lambda x: x is None)
    times = (t1, stepsize_controller, times)
    subs = get_subs(saveat)
    parameters = Parameters(
        terms, args, [sub.fn for sub in subs], [sub.ts for sub in subs]
    )
    may_have_gaps = init_state.made_jump is not False or may_jump(stepsize_controller)
    recorder = _make_recorder(
        derivative.recording,
        solver,
        terms,
        args,
        init_state,
        may_have_gaps,
        num_steps,
        **kwargs,
    )
    # With these loops the solver has every derivative.
    solver = in_forward_mode(solver)
    if recorder is not None and recorder.linearized_step is not None:
        solver = KeepingSolver(solver, recorder.linearized_step)
    elif has_steps_on_cells(terms):
        solver = DrawnSolver(solver)

    def loop(cond_fun, body_fun, init_state, **kwargs):
        if recorder is not None:
            init_state = recorder.without_step(init_state)
        run = ft.partial(_run, recorder, cond_fun, body_fun, **kwargs)
        final_state = _with_derivative(
            derivative, recorder, run, parameters, init_state, times, sees_solution
        )
        msg = (
            f"`adjoint={name}()` does not differentiate the output "
            f"`controller_state`. {_instead}"
        )
        return without_derivative(lambda s: s.controller_state, final_state, msg)

    return integration_loop(
        adjoint,
        args=args,
        terms=terms,
        solver=solver,
        stepsize_controller=stepsize_controller,
        saveat=saveat,
        t0=t0,
        t1=t1,
        init_state=init_state if recorder is None else recorder.with_step(init_state),
        inner_while_loop=plain_while_loop,
        outer_while_loop=loop,
        **kwargs,
    )


class _Recorder(NamedTuple):
    """A `Recording` of a solve: how it is made. `num_steps` is how many there will be,
    if this is known; `first_step` is what would be kept of one from the start.
    """

    num_steps: int | None
    steps_per_page: int
    snapshot_every: int | None
    may_have_gaps: bool
    linearized_step: LinearizedStep | None
    first_step: Callable[[State], MadeStep] | None

    def with_step(self, state: State) -> State:
        """With a place for the last step in the state of the solver, if steps are kept:
        what diffrax makes steps from.
        """
        if self.first_step is None:
            return state
        no_step = zeros_like(eqx.filter_eval_shape(self.first_step, state))
        with_step = (state.solver_state, no_step)
        return dataclasses.replace(state, solver_state=with_step)

    def without_step(self, state: State) -> State:
        if self.linearized_step is None:
            return state
        solver_state, _ = state.solver_state
        return dataclasses.replace(state, solver_state=solver_state)


def _make_recorder(
    recording: Recording | None,
    solver: diffrax.AbstractSolver,
    terms: PyTree[diffrax.AbstractTerm],
    args: Args,
    init_state: State,
    may_have_gaps: bool,
    num_steps: int | None,
    *,
    max_steps: int | None,
    **kwargs: Any,
) -> _Recorder | None:
    del kwargs
    if recording is None or max_steps is None:
        return None
    trace = lambda: LinearizedStep.trace(
        linearizable(solver), terms, args, init_state, may_have_gaps
    )
    linearized_step = trace() if recording.keeps_steps else None
    steps_per_page = recording.steps_per_page
    if callable(steps_per_page):
        size_of_state = size_of_step = num_bytes(
            (init_state.y, init_state.solver_state)
        )
        # The solve may not be differentiated, and its vector field have no derivative.
        # What is kept of an implicit step, a few states, takes long to find out.
        with contextlib.suppress(Exception):
            step = linearized_step
            if step is None and not has_layer(solver, diffrax.AbstractImplicitSolver):
                step = trace()
            if step is not None:
                size_of_step = num_bytes(step.linearized.kept_structs)
        steps_per_page = steps_per_page(size_of_state, size_of_step)

    def first_step(state: State) -> MadeStep:
        assert linearized_step is not None
        _, made = linearized_step(
            terms, state.tprev, state.tnext, state.y, args, state.solver_state, False
        )
        return made

    return _Recorder(
        num_steps,
        steps_per_page,
        recording.snapshot_every,
        may_have_gaps,
        linearized_step,
        None if linearized_step is None else first_step,
    )


def _with_derivative(
    derivative: Derivative,
    recorder: _Recorder | None,
    run: Callable[[State], tuple[State, Tape | None]],
    parameters: Parameters,
    init_state: State,
    times: PyTree[Any],
    sees_solution: bool,
) -> State:
    """The final state of a loop, with its derivative."""
    loop = eqx.Partial(eqx.filter_closure_convert(run, init_state), init_state)
    of_times, loop = split_times(loop, times)
    state = SolveState(init_state.y, init_state.solver_state)
    start = Start(state, get_saved(init_state), of_times)
    _, detached_start, loop = detach((parameters, start, loop))
    final_state, tape = nondifferentiable_backward(
        eqx.combine(detached_start.times, loop)(), msg=derivative.no_second_derivative
    )
    num_saved = [x.save_index for x in get_save_states(init_state)]
    linearized_step = None if recorder is None else recorder.linearized_step
    recorded = Recorded(tape, linearized_step, num_saved, loop, sees_solution)
    return with_derivative(
        _pull_back,
        parameters,
        start,
        (recorded, derivative),
        final_state,
        no_forward_mode=derivative.no_forward_mode,
    )


def _pull_back(
    perturbed, inputs, residuals, final_state, grad_final_state, axes
) -> tuple[Parameters, Start, Bool[Array, ""]]:
    """The rule for the derivative of every loop, by that of its `Derivative`."""
    (parameters, start), (is_perturbed, start_is_perturbed) = inputs, perturbed
    recorded, derivative = residuals
    terms = with_weak_directions(parameters.terms)
    parameters = eqx.tree_at(lambda p: p.terms, parameters, terms)
    grads, is_wrong = derivative.rule(
        Differentiated(*eqx.partition(parameters, is_perturbed), axes),
        start,
        start_is_perturbed,
        recorded,
        final_state,
        grad_final_state,
    )
    grads = nondifferentiable_backward(grads, msg=derivative.no_second_derivative)
    return *grads, is_wrong


def without_derivative(
    get: Callable[[State], Any], final_state: State, msg: str
) -> State:
    """`final_state`, with an error if what `get` returns of it is differentiated."""
    return eqx.tree_at(
        get,
        final_state,
        replace_fn=lambda x: nondifferentiable_backward(x, msg=msg, symbolic=False),
        is_leaf=lambda x: x is None,
    )


def _run(
    recorder: _Recorder | None,
    cond_fun: Callable[[State], Bool[Array, ""]],
    body_fun: Callable[[State], State],
    init_state: State,
    **kwargs: Any,
) -> tuple[State, Tape | None]:
    """The loop without its derivative, and the tape if there is one."""
    if recorder is None:
        return plain_while_loop(cond_fun, body_fun, init_state, **kwargs), None
    return loop_and_record(
        cond_fun,
        body_fun,
        init_state,
        num_steps=recorder.num_steps,
        steps_per_page=recorder.steps_per_page,
        may_have_gaps=recorder.may_have_gaps,
        snapshot_every=recorder.snapshot_every,
        first_step=recorder.first_step,
        **kwargs,
    )


_get_times = operator.attrgetter(
    "tprev", "tnext", "controller_state", "event_tprev", "event_tnext"
)
