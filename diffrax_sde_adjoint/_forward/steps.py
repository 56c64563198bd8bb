"""Steps of a solver, as functions of all that they depend on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .._autodiff.batched_vjp import Axes
from .._autodiff.linearized import Linearized
from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, State, Y
from .._solver import (
    AbstractReversibleSolver,
    AbstractSameSolver,
    has_layer,
)
from .._term.known_control import evaluate_controls, with_controls
from .records import Differentiated, LinearizedInParameters, Parameters, of_step
from .tape import SolveState, Step


class MadeStep(eqx.Module):
    """What the way back through a step needs of it: what is kept of the linearized
    step, and what an output within the step may depend on.
    """

    kept: Sequence[Any]
    y1: PyTree[Any]
    dense_info: PyTree[Any]


def make_step(
    parameters: Parameters,
    own: tuple[SolveState, list[PyTree[Any]]],
    solver: diffrax.AbstractSolver,
    t0: RealScalarLike,
    t1: RealScalarLike,
    made_jump: BoolScalarLike,
    known_y1: Y | None,
) -> tuple[tuple[Y, DenseInfo, PyTree[Any]], tuple[Y | None, diffrax.RESULTS]]:
    """Makes a step from a state at its start and the controls over it, or makes it
    again, if it is known to end at `known_y1`. What has no derivative is apart: the
    estimate of the error, and whether there was one.
    """
    state0, controls = own
    args = parameters.args
    terms = with_controls(solver, parameters.terms, t0, t1, controls)
    inputs = (terms, t0, t1, state0.y, args, state0.solver_state, made_jump)
    if known_y1 is None:
        out = solver.step(*inputs)
    else:
        assert isinstance(solver, AbstractReversibleSolver)
        out = solver.step_again(*inputs, known_y1)
    y1, y_error, dense_info, solver_state1, result = out
    return (y1, dense_info, solver_state1), (y_error, result)


def linearize_step(parameters: Differentiated, *inputs: Any) -> LinearizedInParameters:
    """`make_step`, traced for inputs as of `inputs_of_step`."""
    _, solver, *_ = inputs
    return parameters.linearized(
        make_step,
        of_step,
        *inputs,
        has_aux=True,
        finds_roots=has_layer(solver, diffrax.AbstractImplicitSolver),
    )


def inputs_of_step(
    solver: diffrax.AbstractSolver,
    t0: RealScalarLike,
    t1: RealScalarLike,
    state0: SolveState | None,
    controls: list[PyTree[Any]] | None,
    made_jump: BoolScalarLike,
    known_y1: Y | None = None,
) -> tuple[Any, ...]:
    """What `make_step` is given beside the parameters."""
    return (state0, controls), solver, t0, t1, made_jump, known_y1


class LinearizedStep(eqx.Module):
    """A step with respect to all that it depends on. If there `may_be_jumps`, it is not
    known before whether one was made.
    """

    solver: diffrax.AbstractSolver
    may_be_jumps: bool = eqx.field(static=True)
    linearized: Linearized = eqx.field(static=True)

    @staticmethod
    def trace(
        solver: diffrax.AbstractSolver,
        terms: PyTree[diffrax.AbstractTerm],
        args: Args,
        state: State,
        may_be_jumps: bool,
    ) -> "LinearizedStep":
        """Traces a step from `state`."""
        t0, t1 = state.tprev, state.tnext
        inputs = inputs_of_step(
            solver,
            t0,
            t1,
            SolveState(state.y, state.solver_state),
            evaluate_controls(solver, terms, t0, t1),
            jnp.array(False) if may_be_jumps else False,
        )
        linearized = linearize_step(_all_of(terms, args, ()), *inputs)
        return LinearizedStep(solver, may_be_jumps, linearized.linearized)

    def __call__(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """As `solver.step`. Also returns the step."""
        made_jump = jnp.asarray(made_jump) if self.may_be_jumps else False
        state0 = SolveState(y0, solver_state)
        controls = evaluate_controls(self.solver, terms, t0, t1)
        inputs = inputs_of_step(self.solver, t0, t1, state0, controls, made_jump)
        out, kept = self._with(_all_of(terms, args, ()))(*inputs)
        (y1, dense_info, solver_state), (y_error, result) = out
        made = MadeStep(kept, y1, dense_info)
        return (y1, y_error, dense_info, solver_state, result), made

    def pull_back(
        self,
        parameters: Differentiated,
        step: Step,
        made: MadeStep,
        grad_step: Any,
        sums: Parameters,
    ) -> tuple[Parameters, Any]:
        """As `LinearizedInParameters.pull_back`. Only those of the parameters that are
        differentiated have a sum.
        """
        everything = _all_of(parameters.all.terms, parameters.all.args, parameters.axes)
        made_jump = jnp.asarray(step.made_jump) if self.may_be_jumps else False
        _, *fixed = inputs_of_step(self.solver, step.t0, step.t1, None, None, made_jump)
        given = Parameters(sums.terms, sums.args, [], [])
        given, grad_own = self._with(everything).pull_back(
            made.kept, tuple(fixed), grad_step, given
        )
        return dataclasses.replace(sums, terms=given.terms, args=given.args), grad_own

    def _with(self, parameters: Differentiated) -> LinearizedInParameters:
        return LinearizedInParameters(self.linearized, of_step, parameters)


class DrawnSolver(AbstractSameSolver):
    """A solver whose steps are given the controls of all terms, as these are cheaper if
    it is known that they are of a whole step.
    """

    solver: diffrax.AbstractSolver

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        controls = evaluate_controls(self.solver, terms, t0, t1)
        terms = with_controls(self.solver, terms, t0, t1, controls)
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)


class KeepingSolver(AbstractSameSolver):
    """A solver the state of which has the last step too."""

    solver: diffrax.AbstractSolver
    linearized: LinearizedStep

    def init(self, terms, t0, t1, y0, args):
        # A step is added to the state of the solver inside when the loop starts.
        raise NotImplementedError("`diffeqsolve` calls this before there is a loop.")

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        solver_state, _ = solver_state
        out, made = self.linearized(terms, t0, t1, y0, args, solver_state, made_jump)
        y1, y_error, dense_info, solver_state, result = out
        return y1, y_error, dense_info, (solver_state, made), result


def _all_of(
    terms: PyTree[diffrax.AbstractTerm], args: Args, axes: Axes
) -> Differentiated:
    parameters = Parameters(terms, args, [], [])
    return Differentiated(*eqx.partition(parameters, eqx.is_inexact_array), axes)
