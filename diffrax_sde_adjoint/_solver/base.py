"""The interface of a solver whose steps can be undone, and what is asked of solvers."""

import abc
from collections.abc import Iterator
from typing import ClassVar, TypeGuard, TypeVar, cast

import diffrax
import equinox as eqx
from jaxtyping import PyTree

from .._compat import VF, Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._term.noise import converted_drifts


_SolverState = TypeVar("_SolverState")


class AbstractReversibleSolver(diffrax.AbstractSolver[_SolverState]):
    """Abstract base class for solvers whose steps can be undone algebraically.

    Subclass this, and implement [`diffrax.AbstractSolver`][] and `backward_step`, to
    use a solver of your own with [`diffrax_sde_adjoint.StochasticAdjoint`][]. Nothing
    else is asked of it: the adjoint differentiates `step` by itself.

    What is asked of `backward_step` is that it be the inverse of `step`. With
    ```python
    y1, _, _, state1, _ = solver.step(terms, t0, t1, y0, args, state0, made_jump)
    y0_, _, state0_, _ = solver.backward_step(
        terms, t0, t1, y1, args, state1, made_jump
    )
    ```
    then `(y0_, state0_)` should equal `(y0, state0)` up to rounding, as gradients are
    evaluated at `(y0_, state0_)`. A solver for which it does up to a small error of its
    own may say so with `is_near_exact = True`: then the adjoint tolerates the error to
    be worth 5e-3 of the loss, also in double precision.
    """

    is_near_exact: ClassVar[bool] = False

    @abc.abstractmethod
    def backward_step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, _SolverState, diffrax.RESULTS]:
        """Undo a single step of the solver.

        `0` and `1` always mean the left and right end of the step, here as in `step`.

        **Arguments:**

        - `terms`: the PyTree of terms representing the vector fields and controls.
        - `t0`: the start of the interval that the step was made over.
        - `t1`: the end of the interval that the step was made over.
        - `y1`: the value of the solution at `t1`.
        - `args`: any extra arguments passed to the vector field.
        - `solver_state`: the state of the solver at `t1`.
        - `made_jump`: whether there was a discontinuity in the vector field at `t0`;
            the value that `step` was called with.

        **Returns:**

        A tuple of several objects:

        - The value of the solution at `t0`.
        - The `dense_info` that `step` returned for this step.
        - The state of the solver at `t0`.
        - A [`diffrax.RESULTS`][] saying whether the step could be undone.
        """

    def step_again(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
        y1: Y,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, diffrax.RESULTS]:
        """Make a step that has been undone, to differentiate it.

        By default this is `step`. Where that evaluates the vector field at the end of
        the step, as `backward_step` does, a method of your own may do so at `y1` rather
        than where it comes to again, up to rounding. Then it is evaluated there once.

        **Arguments:**

        As for `step`, and

        - `y1`: the value of the solution at `t1`. It has no derivative: the vector
            field is to be evaluated at what has this value and the derivative of the
            end of the step, as a `jax.custom_jvp` can return it.

        **Returns:**

        As `step` does.
        """
        del y1
        return self.step(terms, t0, t1, y0, args, solver_state, made_jump)


class AbstractForwardingSolver(diffrax.AbstractSolver[_SolverState]):
    """A solver that has the terms, the orders and the root finder of `solver`."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    @property
    def term_structure(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def root_finder(self):
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def scan_kind(self):
        # diffrax looks through one wrapper, and takes it for the Runge-Kutta method.
        return self.solver.scan_kind  # pyright: ignore[reportAttributeAccessIssue]

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def strong_order(
        self, terms: PyTree[diffrax.AbstractTerm]
    ) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree[diffrax.AbstractTerm]) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def func(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return self.solver.func(terms, t0, y0, args)


class AbstractSameSolver(
    AbstractForwardingSolver[_SolverState], diffrax.AbstractWrappedSolver[_SolverState]
):
    """A solver that makes the steps of `solver`, in another way."""

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.interpolation_cls

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        return self.solver.init(terms, t0, t1, y0, args)


def is_reversible(
    solver: diffrax.AbstractSolver,
) -> TypeGuard[AbstractReversibleSolver]:
    # Not `isinstance`, which looks through wrappers such as `diffrax.HalfSolver`.
    return issubclass(type(solver), AbstractReversibleSolver)


def layers(solver: diffrax.AbstractSolver) -> Iterator[diffrax.AbstractSolver]:
    """The solver, and all those that it wraps, from the outside to the inside."""
    yield solver
    if issubclass(type(solver), diffrax.AbstractWrappedSolver):
        yield from layers(cast(diffrax.AbstractWrappedSolver, solver).solver)


def has_layer(solver: diffrax.AbstractSolver, cls: type | tuple[type, ...]) -> bool:
    """Whether the solver is of a class, or one that it wraps. `isinstance` looks
    through one wrapper only.
    """
    return any(issubclass(type(x), cls) for x in layers(solver))


def never_fails(solver: diffrax.AbstractSolver) -> bool:
    """Whether all steps are known to succeed: those of diffrax's explicit solvers, and
    of those here.
    """
    packages = {type(x).__module__.partition(".")[0] for x in layers(solver)}
    is_implicit = has_layer(solver, diffrax.AbstractImplicitSolver)
    return packages <= {"diffrax", __name__.partition(".")[0]} and not is_implicit


def check_sense(
    terms: PyTree[diffrax.AbstractTerm], solver: diffrax.AbstractSolver
) -> None:
    """An error if terms were converted for a solver of the other kind."""
    is_ito = has_layer(solver, diffrax.AbstractItoSolver)
    is_stratonovich = has_layer(solver, diffrax.AbstractStratonovichSolver)
    for drift in converted_drifts(terms):
        if is_ito == is_stratonovich or is_ito == (drift.sense == "ito"):
            continue
        origin, kind, other, instead = {
            "ito": ("stratonovich_to_ito", "Itô", "Stratonovich", "Euler"),
            "stratonovich": ("ito_to_stratonovich", "Stratonovich", "Itô", "Heun"),
        }[drift.sense]
        raise ValueError(
            f"These terms come from `{origin}`, and are for a solver that converges to "
            f"the {kind} solution, but `{type(solver).__name__}` converges to the "
            f"{other} one. Pass terms as they were before, or `diffrax.{instead}()`."
        )
