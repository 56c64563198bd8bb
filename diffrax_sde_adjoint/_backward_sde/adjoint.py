"""`BackwardSDEAdjoint`: what it is, and how its backward solve is made."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import (
    RealScalarLike,
    State,
    WrapTerm,
    direction_of,
    nondifferentiable,
)
from .._forward.solve import (
    Derivative,
    Recording,
    check_checkpoint_every,
    prepare,
    solve,
    without_derivative,
)
from .._solver import Reversible, ReversibleHeun
from .._solver.stage_loops import without_loops
from .._term.base import is_single_term
from .checks import Equation, check_numerics, check_supported, instead
from .rule import BackwardSDERule, Numerics, no_numerics


_no_solver_state = (
    "`adjoint=BackwardSDEAdjoint(...)` does not differentiate `solver_state`. "
    f"{instead}"
)
_no_forward_mode = (
    "`adjoint=BackwardSDEAdjoint(...)` does not support forward mode (`jax.jvp`, "
    "`jax.jacfwd`, `jax.linearize`). Use `adjoint=diffrax.ForwardMode()` instead, or "
    "`diffrax_sde_adjoint.forward_sensitivity`, or reverse mode (`jax.grad`, "
    "`jax.jacrev`)."
)
_no_second_derivative = (
    f"`adjoint=BackwardSDEAdjoint(...)` does not support second derivatives. {instead}"
)


class BackwardSDEAdjoint(diffrax.AbstractAdjoint):
    r"""Approximate gradients, by solving an SDE backwards in time (Li, Wong, Chen,
    Duvenaud 2020).

    ```python
    diffeqsolve(..., adjoint=BackwardSDEAdjoint())
    ```

    The cotangent of the solution is itself the solution of a Stratonovich SDE, along
    the same path from right to left. It is solved together with the original SDE, from
    the final state on, and cotangents arrive where the solution was saved. Those of the
    parameters are an integral along the way, which no step size controller looks at.

    Gradients are *approximate*: their error goes to zero with the step size of both
    solves. Those of [`diffrax_sde_adjoint.StochasticAdjoint`][] are exact, and to be
    preferred. This is for what only the backward SDE can do: constant memory with any
    solver, and numerics of its own. [Here](../which_solver.md#the-backward-sde) are
    errors of all solvers.

    Memory is that of a single step of the backward solve, and with `checkpoint_every`
    of the states that are kept, from each of which the solution starts anew. A step
    costs one evaluation of the vector field and two VJPs for each of the solver's; for
    Itô SDEs, also those of the corrections.

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

    Everything else raises an error, and so do gradients of gradients, and a backward
    solve that misses a known state of the forward one by what is worth half of the size
    of the outputs times their cotangents, to first order.

    Source: Li, Wong, Chen and Duvenaud, *Scalable Gradients for Stochastic Differential
    Equations*, AISTATS 2020.
    """

    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    dt0: RealScalarLike | None = None
    max_steps: int | None = eqx.field(static=True, default=None)
    checkpoint_every: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if isinstance(self.dt0, int | float) and self.dt0 <= 0:
            raise ValueError(
                "`BackwardSDEAdjoint(dt0=...)` is the length of a step, which is "
                f"positive in either direction of time, but is {self.dt0}."
            )
        check_checkpoint_every("BackwardSDEAdjoint", self.checkpoint_every)

    def loop(
        self=None, *, throw, passed_solver_state, passed_controller_state, **kwargs
    ) -> tuple[State, Any]:
        kwargs = prepare(
            self,
            "BackwardSDEAdjoint",
            throw=throw,
            passed_solver_state=passed_solver_state,
            passed_controller_state=passed_controller_state,
            **kwargs,
        )
        assert self is not None
        init_state = kwargs["init_state"]
        if self.checkpoint_every is not None and kwargs["max_steps"] is None:
            raise ValueError(
                "`BackwardSDEAdjoint(checkpoint_every=...)` needs "
                "`diffeqsolve(..., max_steps=...)`, to know how many states to keep."
            )
        equation = check_supported(**kwargs)
        numerics = nondifferentiable(
            self._numerics(equation, **kwargs), msg=no_numerics
        )
        get = lambda state: state.solver_state
        if passed_solver_state:
            solver_state = nondifferentiable(get(init_state), msg=_no_solver_state)
            kwargs["init_state"] = eqx.tree_at(get, init_state, solver_state)
        recording = None
        if self.checkpoint_every is not None:
            recording = Recording(
                self.checkpoint_every, snapshot_every=1, keeps_steps=False
            )
        derivative = Derivative(
            rule=BackwardSDERule(equation, init_state.tprev, numerics, throw),
            recording=recording,
            no_second_derivative=_no_second_derivative,
            no_forward_mode=_no_forward_mode,
        )
        state, aux = solve(self, derivative, **kwargs)
        return without_derivative(get, state, _no_solver_state), aux

    def _numerics(
        self,
        equation: Equation,
        *,
        solver,
        terms,
        stepsize_controller,
        init_state,
        dt0,
        max_steps,
        **kwargs,
    ) -> Numerics:
        """How the backward solve is made: as the forward one, where this adjoint does
        not say otherwise.
        """
        del kwargs
        if self.solver is not None:
            solver = without_loops(self.solver)
        if self.dt0 is not None:
            dt0 = jnp.asarray(self.dt0, init_state.tprev.dtype)
        if self.max_steps is not None:
            max_steps = self.max_steps
        # As every step starts from the solution alone, these make the steps of others.
        if type(solver) in (diffrax.ReversibleHeun, ReversibleHeun):
            solver = diffrax.Heun()
        if type(solver) is Reversible:
            solver = solver.solver
        leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
        (direction, *_) = [direction_of(x) for x in leaves if isinstance(x, WrapTerm)]
        if self.stepsize_controller is not None:
            stepsize_controller = self.stepsize_controller.wrap(direction)
        check_numerics(equation, solver, stepsize_controller)
        return Numerics(solver, stepsize_controller.wrap(-1), dt0, max_steps)


BackwardSDEAdjoint.__init__.__doc__ = """**Arguments:**

Of the backward solve; each of the first four is that of the forward solve by default.

- `solver`: the solver.
- `stepsize_controller`: the step size controller, with times (such as `jump_ts`) as for
    the forward solve. The error that it looks at is that of the solution and of its
    cotangent, whose size is that of the loss; a `norm` is called with this pair.
- `dt0`: the length of the first step after each time at which the solution was saved.
    A positive number.
- `max_steps`: how many steps there may be between two times at which the solution was
    saved.
- `checkpoint_every`: keep the state of the forward solve every so many accepted steps.
    The backward solve starts anew from every state that is kept; by default nothing is
    kept.

**Raises:**

`ValueError` if `dt0` is not positive, or `checkpoint_every` is not a positive integer.
"""
