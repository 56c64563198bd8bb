"""What `BackwardSDEAdjoint` does not accept, as its gradient would not be right: of the
forward solve, of the options of the backward one, and of the two together.
"""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, PyTree

from .._autodiff.dependence import depends_on
from .._compat import RealScalarLike, Y, save_y
from .._forward.records import Parameters
from .._forward.saved import get_subs
from .._misc import zeros_like
from .._solver import has_layer
from .._solver.stage_loops import is_for_additive_noise, name_of
from .._term.base import is_single_term, unwrap
from .._term.noise import check_independent, has_own_control, is_noise
from .adjoint_terms import ForwardTerms, Role


instead = "Use `adjoint=StochasticAdjoint()` instead."


class Equation(NamedTuple):
    """What the backward solve has to know of the forward one: what moves its solution,
    and whether this is that of an Itô SDE.
    """

    roles: tuple[Role, ...]
    is_ito: bool


def check_supported(*, solver, terms, saveat, event, init_state, **kwargs) -> Equation:
    """Raises an error if a solve is not supported, by its arguments from `prepare`."""
    del kwargs
    unsupported = lambda what: ValueError(
        f"`adjoint=BackwardSDEAdjoint(...)` does not support {what}. {instead}"
    )
    name = name_of(solver)
    subs = get_subs(saveat)
    found = {
        "events": event is not None,
        "`SaveAt(dense=True)`": saveat.dense,
        "`SaveAt(steps=...)`": any(sub.steps for sub in subs),
        "`SaveAt(fn=...)`": any(sub.fn is not save_y for sub in subs),
        "complex states": any(map(jnp.iscomplexobj, jtu.tree_leaves(init_state.y))),
        f"the solver `{name}`, which does not take a single term": not isinstance(
            terms, diffrax.AbstractTerm
        ),
    }
    for what, is_found in found.items():
        if is_found:
            raise unsupported(what)
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    check_independent([x for x in leaves if is_noise(x)])
    roles: tuple[Role, ...] = tuple(_role(x) for x in leaves)
    is_ito = has_layer(solver, diffrax.AbstractItoSolver)
    is_for_sdes = is_ito or has_layer(solver, diffrax.AbstractStratonovichSolver)
    if "noise" in roles and not is_for_sdes:
        raise unsupported(
            f"the solver `{name}` for SDEs, as it is not known to "
            "converge to the Itô or the Stratonovich solution"
        )
    return Equation(roles, is_ito and "noise" in roles)


def _role(term: diffrax.AbstractTerm) -> Role:
    inner = unwrap(term)
    if isinstance(inner, diffrax.UnderdampedLangevinDriftTerm):
        return "drift"
    if isinstance(inner, diffrax.ODETerm):
        return "control" if has_own_control(inner) else "drift"
    return "noise" if is_noise(term) else "control"


def check_numerics(
    equation: Equation,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
) -> None:
    """An error if the backward SDE cannot be solved so."""
    name = name_of(solver)
    has_noise = "noise" in equation.roles
    is_ito = has_layer(solver, diffrax.AbstractItoSolver)
    is_any_ito = equation.is_ito or (has_noise and is_ito)
    if is_any_ito and "drift" not in equation.roles:
        raise ValueError(
            "`BackwardSDEAdjoint` with a solver for Itô SDEs needs a drift to add a "
            "correction to. Pass a `diffrax.MultiTerm` of a `diffrax.ODETerm`, which "
            "may be zero, and the noise."
        )
    if has_layer(solver, (diffrax.AbstractFosterLangevinSRK, diffrax.LeapfrogMidpoint)):
        raise ValueError(
            f"`BackwardSDEAdjoint` does not support the solver `{name}` backwards in "
            "time. Pass another one for the backward solve, as in "
            "`BackwardSDEAdjoint(solver=diffrax.Heun())`."
        )
    is_for_sdes = is_ito or has_layer(solver, diffrax.AbstractStratonovichSolver)
    if has_noise and not is_for_sdes:
        raise ValueError(
            f"`BackwardSDEAdjoint(solver={name}())` is not a solver for SDEs. Pass one "
            "that is, such as `diffrax.Heun()`."
        )
    if type(controller) is diffrax.StepTo:
        raise ValueError(
            "`BackwardSDEAdjoint` does not support `StepTo`, as it also stops where "
            "the solution was saved. Pass another step size controller for the "
            "backward solve, as in `BackwardSDEAdjoint(stepsize_controller="
            "diffrax.ConstantStepSize(), dt0=...)`."
        )
    is_adaptive = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    if has_noise and has_layer(solver, diffrax.Euler) and is_adaptive:
        raise ValueError(
            "`BackwardSDEAdjoint` does not support adaptive steps of `Euler`, which "
            "may not converge. Pass another solver, as in "
            "`BackwardSDEAdjoint(solver=diffrax.HalfSolver(diffrax.Heun()))`."
        )


def check_controls(forward: ForwardTerms, diff: Parameters, t: RealScalarLike) -> None:
    def controls(diff):
        terms, _ = forward.terms(diff)
        return [term.contr(t, t) for term in terms]

    if depends_on(controls, diff):
        raise ValueError(
            "`adjoint=BackwardSDEAdjoint(...)` does not "
            "differentiate with respect to what is in a control or a Brownian path. "
            f"{instead}"
        )


def _noises(
    forward: ForwardTerms, diff: Parameters, t: RealScalarLike
) -> list[tuple[int, PyTree[Array]]]:
    """The terms that are noise, each with a zero for its increment."""
    terms, _ = forward.terms(diff)
    return [
        (i, zeros_like(eqx.filter_eval_shape(term.contr, t, t)))
        for i, (term, role) in enumerate(zip(terms, forward.roles, strict=True))
        if role == "noise"
    ]


def check_additive(
    forward: ForwardTerms,
    diff: Parameters,
    solver: diffrax.AbstractSolver,
    t: Any,
    y: Y,
) -> None:
    """An error for a solver that is for additive noise only, if noise is not."""
    if not is_for_additive_noise(solver):
        return
    for i, zero in _noises(forward, diff, t):
        fn = lambda y, i=i, zero=zero: forward.increment(i, diff, t, y, zero)
        if depends_on(fn, y):
            raise ValueError(
                "The solver of `BackwardSDEAdjoint` is for additive noise, but the "
                "diffusion depends on the state, so that the backward SDE would be "
                "wrong. Pass a solver for any noise, as in "
                "`BackwardSDEAdjoint(solver=diffrax.Heun())`."
            )


def does_not_commute(
    forward: ForwardTerms,
    diff: Parameters,
    solver: diffrax.AbstractSolver,
    t: Any,
    y: Y,
) -> Bool[ArrayLike, ""]:
    """Whether the columns of the diffusion have Lie brackets, for a Milstein solver."""
    milstein = (diffrax.StratonovichMilstein, diffrax.ItoMilstein)
    noises = _noises(forward, diff, t)
    if not has_layer(solver, milstein):
        return False
    flat, unravel = jfu.ravel_pytree([zero for _, zero in noises])
    if flat.size <= 1:
        return False

    def column(y, unit):
        parts = [
            forward.increment(i, diff, t, y, control)
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
