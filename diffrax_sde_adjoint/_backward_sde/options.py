"""`BackwardSDE`: what it accepts, and how its solve is made (`rule.py`)."""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import RealScalarLike, WrapTerm, Y, save_y
from .._solver import Reversible, ReversibleHeun, is_kind
from .._solver.stage_loops import without_loops
from .._term.base import is_single_term, unwrap
from .._term.noise import check_independent, has_own_control, is_noise
from .adjoint_terms import Role


instead = "Use `adjoint=StochasticAdjoint()`, without `backward`, instead."

no_numerics = (
    "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not differentiate "
    "with respect to the times of a solve (`t0`, `t1`, `dt0`, `ts`), or what is in its "
    f"solver and step size controller. {instead}"
)

first_derivatives_only = (
    "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not support second "
    f"derivatives. {instead}"
)

no_solver_state = (
    "`adjoint=StochasticAdjoint(backward=BackwardSDE(...))` does not differentiate "
    f"`solver_state`. {instead}"
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
    two VJPs for each of the solver's; for Itô SDEs, also those of the corrections.

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

    Everything else raises an error, and so do second derivatives, and a backward solve
    that misses a known state of the forward one by what is worth half of the size of
    the outputs times their cotangents, to first order.

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
    cotangent, whose size is that of the loss; a `norm` is called with this pair.
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
        f"{what}. {instead}"
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
    inner = unwrap(term)
    if isinstance(inner, diffrax.UnderdampedLangevinDriftTerm):
        return "drift"
    if isinstance(inner, diffrax.ODETerm):
        return "control" if has_own_control(inner) else "drift"
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


def _is_subsaveat(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)
