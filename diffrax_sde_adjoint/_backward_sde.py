"""`BackwardSDE`: gradients by solving the backward SDE of Li et al. 2020.

From the final state, this goes from one time to the next at which something happens:
where a cotangent arrives, as the solution was saved there, or where the state is known,
as the forward solve has kept it. In between is a `diffrax.diffeqsolve` of the lifted
terms (`_lift.py`).
"""

import itertools
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._backward import no_second_derivative
from ._batching import vjp
from ._compat import (
    RealScalarLike,
    WrapTerm,
    Y,
    nondifferentiable_backward,
    save_y,
)
from ._controls import is_single_term
from ._dependence import depends_on
from ._guard import Drift
from ._ito import check_independent, is_noise
from ._lift import LiftedTerm, Role, System, make_quadrature
from ._saves import cotangents_of_earlier, get_save_states
from ._solver import Reversible, ReversibleHeun, is_kind
from ._srk import is_for_additive_noise
from ._stages import without_loops
from ._tape import SolveState, plain_while_loop
from ._trees import zeros_like


# Of the size of the loss, what the backward solve may miss a known state by. It is not
# exact: this is for solutions that have gone astray.
_tolerance = 0.5

_instead = "Use `adjoint=StochasticAdjoint()`, without `backward`, instead."

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


no_numerics = (
    "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not differentiate "
    "with respect to the times of a solve (`t0`, `t1`, `dt0`, `ts`), or what is in its "
    f"solver and step size controller. {_instead}"
)

no_solver_state = (
    "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not differentiate "
    f"`solver_state`. {_instead}"
)


class BackwardSDE(eqx.Module):
    r"""Gradients by solving an SDE backwards in time (Li, Wong, Chen, Duvenaud 2020).

    ```python
    diffeqsolve(..., adjoint=StochasticAdjoint(backward=BackwardSDE()))
    ```

    The cotangent of the solution is itself the solution of a Stratonovich SDE, along
    the same path from right to left. It is solved together with the original SDE, from
    the final state on, and cotangents arrive where the solution was saved. Those of the
    parameters are an integral along the way, which takes one VJP for each evaluation of
    a vector field, and which no step size controller looks at.

    Gradients are *approximate*: they have an error that goes to zero with the step size
    of both solves. Without `backward`, [`diffrax_sde_adjoint.StochasticAdjoint`][] has
    exact gradients, and is to be preferred. This is for what only the backward SDE can
    do: constant memory with any solver, and numerics of its own.

    Memory is that of a single step of the backward solve, whatever the number of steps.
    `StochasticAdjoint(checkpoint_every=...)` adds the states that are kept: the
    solution starts anew from each. A step costs one evaluation of the vector field and
    two VJPs for each of the solver's.

    - *Terms*: what drives an SDE has to be seen: a [`diffrax.ControlTerm`][] whose
        control is a Brownian path, and not a function that evaluates one, which would
        be taken for a smooth control.
    - *Solvers*: any of diffrax's for Stratonovich or Itô SDEs, or for ODEs, but for
        those of underdamped Langevin dynamics, `SemiImplicitEuler` and
        `LeapfrogMidpoint`. Reversible solvers make the steps of the method that they
        are built on. Those for additive noise (`SEA`, `SRA1`, `ShARK`) need it, and it
        is checked; Milstein's need commutative noise, and this is checked where the
        solve ends.
    - *Itô SDEs*, those that were solved with a solver for them, are converted to
        Stratonovich form, and back if the backward solver is for Itô SDEs too. This
        takes a JVP of the diffusion for each number of the noise: see
        [`diffrax_sde_adjoint.ito_to_stratonovich`][].
    - *Outputs*: `SaveAt(t0=..., t1=..., ts=...)`, also as several `SubSaveAt`.
    - Gradients are computed with respect to `y0`, `args`, and what is in the vector
        fields of `terms` or what these refer to by closure.
    - Under `jax.vmap`, the gradient in shared parameters is made for every element and
        then added up. A batch that is a single state does not do so.

    Everything else raises an error. So does a backward solve that misses a known state
    of the forward one by what is worth half of the size of the outputs times their
    cotangents, to first order.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{li2020scalable,
            author={Li, Xuechen and Wong, Ting-Kam Leonard and Chen, Ricky T. Q. and
                    Duvenaud, David},
            title={{S}calable {G}radients for {S}tochastic {D}ifferential
                   {E}quations},
            booktitle={International Conference on Artificial Intelligence and
                       Statistics},
            year={2020}
        }
        ```
    """

    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    dt0: RealScalarLike | None = None
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if isinstance(self.dt0, int | float) and self.dt0 <= 0:
            raise ValueError(
                "`BackwardSDE(dt0=...)` is the length of a step, which is positive in "
                f"either direction of time, but is {self.dt0}."
            )


BackwardSDE.__init__.__doc__ = """**Arguments:**

Of the backward solve; each is that of the forward solve by default.

- `solver`: the solver.
- `stepsize_controller`: the step size controller, with times (such as `jump_ts`) as for
    the forward solve. The error that it looks at is that of the solution and of its
    cotangent, whose size is that of the loss.
- `dt0`: the length of the first step after each time at which the solution was saved.
    A positive number.
- `max_steps`: how many steps there may be between two times at which the solution was
    saved.

**Raises:**

`ValueError` if `dt0` is not positive.
"""


class Numerics(eqx.Module):
    """How a backward solve is made."""

    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController
    dt0: RealScalarLike | None
    max_steps: int | None = eqx.field(static=True)


class Kind(NamedTuple):
    """Of the equation, what the backward solve has to know."""

    roles: tuple[Role, ...]
    is_ito: bool


def look_at(
    solver: diffrax.AbstractSolver,
    terms: PyTree[diffrax.AbstractTerm],
    saveat: diffrax.SaveAt,
    event: diffrax.Event | None,
    y: Y,
) -> Kind:
    """Raises an error if a solve is not supported, as it would be without a gradient
    that is known to be right.
    """
    unsupported = lambda what: ValueError(
        "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not support "
        f"{what}. {_instead}"
    )
    if event is not None:
        raise unsupported("events")
    subs = jtu.tree_leaves(saveat.subs, is_leaf=_is_subsaveat)
    if saveat.dense:
        raise unsupported("`SaveAt(dense=True)`")
    if any(sub.steps for sub in subs):
        raise unsupported("`SaveAt(steps=...)`")
    if any(sub.fn is not save_y for sub in subs):
        raise unsupported("`SaveAt(fn=...)`")
    if not all(
        jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in jtu.tree_leaves(y)
    ):
        raise unsupported("complex states")

    if not isinstance(terms, diffrax.AbstractTerm):
        raise unsupported(
            f"the solver `{type(solver).__name__}`, which does not take a single term"
        )
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    check_independent([x for x in leaves if is_noise(x)])
    roles: tuple[Role, ...] = tuple(_role(x) for x in leaves)
    is_ito = is_kind(solver, diffrax.AbstractItoSolver)
    if "noise" in roles:
        if not is_ito and not is_kind(solver, diffrax.AbstractStratonovichSolver):
            raise unsupported(
                f"the solver `{type(solver).__name__}` for SDEs, as it is not known to "
                "converge to the Itô or the Stratonovich solution"
            )
        if is_ito:
            _check_drift(roles)
    return Kind(roles, is_ito and "noise" in roles)


def _check_drift(roles: tuple[Role, ...]) -> None:
    if "drift" not in roles:
        raise ValueError(
            "`BackwardSDE` with a solver for Itô SDEs needs a drift to add a "
            "correction to. Pass a `diffrax.MultiTerm` of a `diffrax.ODETerm`, which "
            "may be zero, and the noise."
        )


def _role(term: diffrax.AbstractTerm) -> Role:
    inner = term.term if isinstance(term, WrapTerm) else term
    if isinstance(inner, diffrax.ODETerm | diffrax.UnderdampedLangevinDriftTerm):
        return "drift"
    return "noise" if is_noise(term) else "control"


def make_numerics(
    backward: BackwardSDE,
    kind: Kind,
    solver: diffrax.AbstractSolver,
    terms: PyTree[diffrax.AbstractTerm],
    stepsize_controller: diffrax.AbstractStepSizeController,
    dt0: RealScalarLike | None,
    max_steps: int | None,
    time_dtype: Any,
) -> Numerics:
    """Those of the forward solve, where `backward` does not say otherwise."""
    if backward.solver is not None:
        solver = without_loops(backward.solver)
    # As every step starts from the solution alone, these make the steps of others.
    if type(solver) in (diffrax.ReversibleHeun, ReversibleHeun):
        solver = diffrax.Heun()
    if type(solver) is Reversible:
        solver = solver.solver
    name = type(solver).__name__
    unsupported = (
        diffrax.AbstractFosterLangevinSRK,
        diffrax.LeapfrogMidpoint,
    )
    if is_kind(solver, unsupported):
        raise ValueError(
            f"`BackwardSDE` does not support the solver `{name}` backwards in time. "
            "Pass another one for the backward solve, as in "
            "`BackwardSDE(solver=diffrax.Heun())`."
        )
    if "noise" in kind.roles and not is_kind(
        solver, (diffrax.AbstractItoSolver, diffrax.AbstractStratonovichSolver)
    ):
        raise ValueError(
            f"`BackwardSDE(solver={name}())` is not a solver for SDEs. Pass one that "
            "is, such as `diffrax.Heun()`."
        )
    if "noise" in kind.roles and is_kind(solver, diffrax.AbstractItoSolver):
        _check_drift(kind.roles)
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    (direction, *_) = [x.direction for x in leaves if isinstance(x, WrapTerm)]
    controller = stepsize_controller
    if backward.stepsize_controller is not None:
        controller = backward.stepsize_controller.wrap(direction)
    if type(controller) is diffrax.StepTo:
        raise ValueError(
            "`BackwardSDE` does not support `StepTo`, as it also stops where the "
            "solution was saved. Pass another step size controller for the backward "
            "solve, as in `BackwardSDE(stepsize_controller=diffrax.ConstantStepSize(), "
            "dt0=...)`."
        )
    if (
        "noise" in kind.roles
        and is_kind(solver, diffrax.Euler)
        and isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    ):
        raise ValueError(
            "`BackwardSDE` does not support adaptive steps of `Euler`, which may not "
            "converge. Pass another solver, as in "
            "`BackwardSDE(solver=diffrax.HalfSolver(diffrax.Heun()))`."
        )
    if backward.dt0 is not None:
        dt0 = jnp.asarray(backward.dt0, time_dtype)
    return Numerics(
        solver,
        controller.wrap(-1),
        dt0,
        max_steps if backward.max_steps is None else backward.max_steps,
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


def _is_subsaveat(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def _check_controls(system: System, diff: PyTree[Any], t: RealScalarLike) -> None:
    def controls(diff):
        terms, _ = system.terms(diff)
        return [term.contr(t, t) for term in terms]

    if depends_on(controls, diff):
        raise ValueError(
            "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not "
            "differentiate with respect to what is in a control or a Brownian path. "
            f"{_instead}"
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
            lambda *x: jnp.max(jnp.abs(jnp.stack(x)), initial=0),
            init_state.y,
            final_state.y,
        )
        drift = Drift.none(
            largest_y, [grad_final_state.y, *grad_ys], None, None, _tolerance
        )
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
        grads = nondifferentiable_backward(grads, msg=no_second_derivative)
        return *grads, is_wrong
