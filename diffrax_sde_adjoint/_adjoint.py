"""`StochasticAdjoint`: what it accepts, and the call into the backward sweep.

A solve is one function with a derivative of its own. Forwards it is diffrax's own loop,
which records a tape (`_tape.py`); backwards it is the sweep (`_sweep.py`). Everything
before and after the loop, such as the initial state of the solver or the output of
`diffeqsolve`, is differentiated by JAX.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._closures import hoist_closures
from ._compat import (
    State,
    is_unsafe_sde,
    nondifferentiable,
    nondifferentiable_backward,
    save_y,
)
from ._guard import did_not_return, has_drifted, largest
from ._saves import SavedCotangents
from ._solver import AbstractReversibleSolver, ReversibleHeun
from ._sweep import sweep
from ._tape import loop_and_record, plain_while_loop


_instead = "Use `adjoint=diffrax.RecursiveCheckpointAdjoint()` instead."


class StochasticAdjoint(diffrax.AbstractAdjoint):
    """Backpropagate through [`diffrax.diffeqsolve`][] by undoing its steps.

    Gradients are those of the numerical solution, as for
    [`diffrax.RecursiveCheckpointAdjoint`][] and up to rounding equal to its; memory
    does not grow with the number of steps, but for the time of each (4 bytes in
    float32). Going back through a step costs undoing it and one VJP of it.

    ```python
    diffeqsolve(..., solver=ReversibleHeun(), adjoint=StochasticAdjoint())
    ```

    This needs a solver whose steps can be undone: any
    [`diffrax_sde_adjoint.AbstractReversibleSolver`][], such as
    [`diffrax_sde_adjoint.ReversibleHeun`][]. For convenience,
    [`diffrax.ReversibleHeun`][] is accepted too, and replaced by the latter. Any terms
    that the solver accepts can be used: SDEs, ODEs and CDEs. Brownian paths have to
    give the same value when queried again, as
    [`diffrax_sde_adjoint.BrownianInterval`][] does.

    Undoing a solve whose dynamics contract amplifies rounding errors. If it does not
    lead back to where the solve started, and this would change the loss by more than
    the cube root of the unit of rounding (6e-6 in float64, 5e-3 in float32, relative to
    the outputs times their cotangents), then this is an error; or, with
    `diffeqsolve(..., throw=False)`, the gradient is NaN.

    Gradients are computed with respect to `y0`, `args`, a passed `solver_state`, every
    floating-point array inside `terms`, and whatever a vector field refers to by
    closure. Differentiating with respect to anything else is an error.

    ??? info "What is not supported"

        The following raise an error, and need [`diffrax.RecursiveCheckpointAdjoint`][]:

        - step size controllers other than [`diffrax.ConstantStepSize`][] and
            [`diffrax.StepTo`][];
        - `SaveAt` with `steps`, `fn`, `subs` or `dense`;
        - events, and passing `made_jump`;
        - forward-mode autodifferentiation, and differentiating a gradient again;
        - differentiating a solve with `max_steps=None`.

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
        terms = hoist_closures(terms, t0, init_state.y, args)
        if type(solver) is diffrax.ReversibleHeun:
            solver = ReversibleHeun()
        _check_supported(terms, solver, stepsize_controller, event, saveat, init_state)

        t0, t1, dt0 = (
            nondifferentiable(x, name=_name(f"`{name}`"))
            for x, name in ((t0, "t0"), (t1, "t1"), (dt0, "dt0"))
        )
        saveat = nondifferentiable(saveat, name=_name("`SaveAt(ts=...)`"))
        stepsize_controller = nondifferentiable(
            stepsize_controller, name=_name("`stepsize_controller`")
        )
        y0, solver_state0 = init_state.y, init_state.solver_state
        init_state = _with_initial(init_state, None, None)
        init_state = nondifferentiable(init_state, name=_name("the times of a solve"))

        final_state, aux_stats = _solve(
            (y0, solver_state0, args, terms),
            self=self,
            solver=solver,
            stepsize_controller=stepsize_controller,
            event=event,
            saveat=saveat,
            t0=t0,
            t1=t1,
            dt0=dt0,
            max_steps=max_steps,
            throw=throw,
            init_state=init_state,
            progress_meter=progress_meter,
        )
        return _only_outputs_differentiable(final_state), aux_stats


StochasticAdjoint.__init__.__doc__ = """**Arguments:** None"""


def _is_none(x: Any) -> bool:
    return x is None


def _name(what: str) -> str:
    return f"When using `adjoint=StochasticAdjoint()`, then {what}"


def _check_supported(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController,
    event: diffrax.Event | None,
    saveat: diffrax.SaveAt,
    init_state: State,
) -> None:
    if is_unsafe_sde(terms):
        raise ValueError(
            "`adjoint=StochasticAdjoint()` does not support `UnsafeBrownianPath`, as "
            "it cannot be evaluated again. Use `diffrax_sde_adjoint.BrownianInterval`, "
            "which costs the same."
        )
    # Not `isinstance`, which looks through wrappers such as `diffrax.HalfSolver`.
    if not issubclass(type(solver), AbstractReversibleSolver):
        kind = (
            "Itô solver" if isinstance(solver, diffrax.AbstractItoSolver) else "solver"
        )
        raise NotImplementedError(
            f"`adjoint=StochasticAdjoint()` does not support the {kind} "
            f"`{type(solver).__name__}`, as its steps cannot be undone. Use "
            "`solver=diffrax_sde_adjoint.ReversibleHeun()` (which solves Stratonovich "
            "SDEs), or an `AbstractReversibleSolver` of your own, or "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    is_subsaveat = lambda x: isinstance(x, diffrax.SubSaveAt)
    subs = saveat.subs
    unsupported = {
        f"`stepsize_controller={type(stepsize_controller).__name__}(...)`": not (
            isinstance(stepsize_controller, diffrax.ConstantStepSize | diffrax.StepTo)
        ),
        "`event=...`": event is not None,
        "`SaveAt(dense=True)`": saveat.dense,
        "`SaveAt(subs=...)`": not is_subsaveat(subs),
        "`SaveAt(steps=...)`": is_subsaveat(subs) and subs.steps != 0,
        "`SaveAt(fn=...)`": is_subsaveat(subs) and subs.fn is not save_y,
        "`made_jump=...`": init_state.made_jump is not False,
    }
    for what, is_used in unsupported.items():
        if is_used:
            raise NotImplementedError(
                f"`adjoint=StochasticAdjoint()` does not support {what}. {_instead}"
            )


def _only_outputs_differentiable(final_state: State) -> State:
    def get_outputs(state):
        return state.save_state.ys, state.solver_state

    outputs = get_outputs(final_state)
    final_state = nondifferentiable_backward(
        final_state,
        name=_name("an output other than `ys` and `solver_state`"),
        symbolic=False,
    )
    return eqx.tree_at(get_outputs, final_state, outputs, is_leaf=_is_none)


def _with_initial(init_state: State, y0, solver_state0) -> State:
    return eqx.tree_at(
        lambda s: (s.y, s.solver_state),
        init_state,
        (y0, solver_state0),
        is_leaf=_is_none,
    )


@eqx.filter_custom_vjp
def _solve(vjp_arg, *, self, init_state, throw, **kwargs):
    del throw
    y0, solver_state0, args, terms = vjp_arg
    return self._loop(
        args=args,
        terms=terms,
        init_state=_with_initial(init_state, y0, solver_state0),
        inner_while_loop=plain_while_loop,
        outer_while_loop=plain_while_loop,
        **kwargs,
    )


@_solve.def_fwd
def _solve_fwd(
    perturbed, vjp_arg, *, self, init_state, saveat, t0, t1, max_steps, throw, **kwargs
):
    del perturbed, throw
    if max_steps is None:
        raise ValueError(
            "Cannot differentiate `diffeqsolve(..., max_steps=None, "
            "adjoint=StochasticAdjoint())`, as JAX needs to know how much memory to "
            "allocate for the times of the steps. Pass a bound as `max_steps`, which "
            "may be generous: it costs the size of one floating-point number a step."
        )
    y0, solver_state0, args, terms = vjp_arg
    final_state, aux_stats, tape = loop_and_record(
        self._loop,
        init_state=_with_initial(init_state, y0, solver_state0),
        max_steps=max_steps,
        saveat=saveat,
        t0=t0,
        t1=t1,
        args=args,
        terms=terms,
        **kwargs,
    )
    save_state, solver_state1 = final_state.save_state, final_state.solver_state
    num_ts = save_state.saveat_ts_index
    if saveat.subs.ts is not None:
        # diffrax saves at all of `ts`, without counting, if there are no steps to make.
        num_ts = jnp.where(t0 == t1, len(saveat.subs.ts), num_ts)
    out_struct = eqx.filter_eval_shape(lambda: (save_state.ys, solver_state1))
    residuals = (tape, num_ts, final_state.y, solver_state1, out_struct)
    return (final_state, aux_stats), residuals


@_solve.def_bwd
def _solve_bwd(
    residuals, grad_out, perturbed, vjp_arg, *, solver, saveat, throw, **kwargs
):
    del kwargs
    residuals, grad_out, vjp_arg = nondifferentiable(
        (residuals, grad_out, vjp_arg),
        msg="`adjoint=StochasticAdjoint()` does not support differentiating a gradient "
        f"again. {_instead}",
    )
    tape, num_ts, y1, solver_state1, out_struct = residuals
    grad_final_state, _ = grad_out
    y0, solver_state0, args, terms = vjp_arg
    _, _, perturbed_args, perturbed_terms = perturbed

    grad_ys, grad_solver_state1 = jtu.tree_map(
        _materialise_zeros,
        out_struct,
        (grad_final_state.save_state.ys, grad_final_state.solver_state),
    )
    subs = saveat.subs
    saved = SavedCotangents(subs.t0, subs.t1, subs.ts, grad_ys, num_ts)
    swept = sweep(
        terms,
        solver,
        args,
        tape,
        saved,
        y1,
        solver_state1,
        grad_solver_state1,
        perturbed_args,
        perturbed_terms,
    )
    grads = swept.grads
    failed = jnp.invert(diffrax.is_okay(swept.result))
    drifted = has_drifted(
        found=(swept.y, swept.solver_state),
        start=(y0, solver_state0),
        grad_start=(grads.y, grads.solver_state),
        grad_out=(grad_ys, grad_solver_state1),
        largest_out=(swept.largest_y, largest(solver_state1)),
    )
    grad_y0 = saved.add_grad_initial_y(grads.y, swept.num_ts_left)
    grad_vjp_arg = (grad_y0, grads.solver_state, grads.args, grads.terms)
    if throw:
        grad_vjp_arg = swept.result.error_if(grad_vjp_arg, failed)
        return eqx.error_if(grad_vjp_arg, drifted, did_not_return)
    else:
        is_wrong = failed | drifted
        return jtu.tree_map(lambda x: jnp.where(is_wrong, jnp.nan, x), grad_vjp_arg)


def _materialise_zeros(
    struct: jax.ShapeDtypeStruct, grad: Array | None
) -> Array | None:
    if not jnp.issubdtype(struct.dtype, jnp.inexact):
        return None
    return jnp.zeros(struct.shape, struct.dtype) if grad is None else grad
