"""The interface of a solver whose steps can be undone."""

import abc
from collections.abc import Iterator
from typing import ClassVar, TypeGuard, TypeVar, cast

import diffrax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._term.noise import AbstractConvertedDrift


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


def is_reversible(
    solver: diffrax.AbstractSolver,
) -> TypeGuard[AbstractReversibleSolver]:
    # Not `isinstance`, which looks through wrappers such as `diffrax.HalfSolver`.
    return issubclass(type(solver), AbstractReversibleSolver)


def layers(solver: diffrax.AbstractSolver) -> Iterator[diffrax.AbstractSolver]:
    """The solver, and all those that it wraps, from the outside to the inside."""
    yield solver
    while issubclass(type(solver), diffrax.AbstractWrappedSolver):
        solver = cast(diffrax.AbstractWrappedSolver, solver).solver
        yield solver


def has_layer(solver: diffrax.AbstractSolver, cls: type | tuple[type, ...]) -> bool:
    """Whether the solver is of a class, or one that it wraps. `isinstance` looks
    through one wrapper only.
    """
    return any(issubclass(type(x), cls) for x in layers(solver))


def check_sense(
    terms: PyTree[diffrax.AbstractTerm], solver: diffrax.AbstractSolver
) -> None:
    """An error if terms were converted for a solver of the other kind."""
    is_converted = lambda x: isinstance(x, AbstractConvertedDrift)
    name = type(solver).__name__
    is_ito = has_layer(solver, diffrax.AbstractItoSolver)
    is_stratonovich = has_layer(solver, diffrax.AbstractStratonovichSolver)
    for drift in jtu.tree_leaves(terms, is_leaf=is_converted):
        if not is_converted(drift):
            continue
        if drift.sense == "ito" and is_stratonovich and not is_ito:
            raise ValueError(
                "These terms come from `stratonovich_to_ito`, and are for a solver "
                f"that converges to the Itô solution, but `{name}` converges to the "
                "Stratonovich solution. Pass the terms as they were before, or use an "
                "Itô solver, such as `diffrax.Euler()`."
            )
        if drift.sense == "stratonovich" and is_ito and not is_stratonovich:
            raise ValueError(
                "These terms come from `ito_to_stratonovich`, and are for a solver "
                f"that converges to the Stratonovich solution, but `{name}` converges "
                "to the Itô solution. Pass the terms as they were before, or use a "
                "Stratonovich solver, such as `diffrax.Heun()`."
            )
