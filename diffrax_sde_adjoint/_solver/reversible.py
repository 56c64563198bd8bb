"""The reversible coupling of two solutions by any one-step solver (McCallum and Foster
2024).

With `change(terms, t0, t1, y)` for what the solver adds to `y` in a step, and a
coupling `c`, each line of a step can be solved for what is at its left end, the second
one first:

    y1 = c y0 + (1 - c) z0 + change(terms, t0, t1, z0)
    z1 = z0 - change(reversed_terms(terms), t1, t0, y1)
"""

from typing import ClassVar, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y, is_sde
from .._term.reversed import reversed_terms
from .base import (
    AbstractForwardingSolver,
    AbstractReversibleSolver,
    check_sense,
    has_layer,
)


_SolverState: TypeAlias = Y
_unsupported = (diffrax.LeapfrogMidpoint, diffrax.AbstractFosterLangevinSRK)


class Reversible(
    AbstractReversibleSolver[_SolverState],
    AbstractForwardingSolver[_SolverState],
    diffrax.AbstractWrappedSolver[_SolverState],
    diffrax.AbstractStratonovichSolver[_SolverState],
):
    r"""Makes any one-step solver reversible, at twice its cost.

    ```python
    diffeqsolve(terms, Reversible(Tsit5()), ..., adjoint=StochasticAdjoint())
    ```

    Beside the solution $y$, a second approximation $z$ of it is carried. With what a
    step of the wrapped solver adds to its argument, $\Psi$ forwards and $\Psi^-$
    backwards along the same control, and the coupling $\lambda$,

    $y_1 = \lambda y_0 + (1 - \lambda) z_0 + \Psi(z_0), \qquad
    z_1 = z_0 - \Psi^-(y_1)$,

    which can be solved for $z_0$ and then for $y_0$. So a step can be undone up to
    rounding, and has the order of the wrapped solver. Both directions make two of its
    steps. Error estimates are those of the step that gives $y_1$, if it has them.
    Linear interpolation is used for dense output, whatever the solver.

    - *Stability*: for $y' = -\lambda' y$ with steps of $h$, the coupling should be at
        most $1 - \lambda' h$ (for second-order solvers; down to 0.5, where steps may be
        as long as 2.1). Above, $z$ is not held to $y$, and there is a spurious solution
        that grows like that of [`diffrax_sde_adjoint.ReversibleHeun`][].
    - *Rounding*: undoing a step divides by the coupling. Over $N$ steps, errors grow by
        $\lambda^{-N}$, which is 2.7 for 1 000 steps with 0.999, and 23 000 with 0.99.
        With `StochasticAdjoint(checkpoint_every=...)` this starts anew from every
        state that is kept.

    The wrapped solver may be explicit or implicit, for ODEs or Stratonovich SDEs. A
    solver that reuses an evaluation of the step before evaluates it again.

    Source: McCallum and Foster, *Efficient, Accurate and Stable Gradients for Neural
    ODEs*, arXiv:2410.11648, 2024.
    """

    solver: diffrax.AbstractSolver
    coupling: float | int = eqx.field(static=True, default=0.999)
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def __check_init__(self):
        if not 0 < self.coupling <= 1:
            raise ValueError(
                "`Reversible(..., coupling=...)` must be above 0 and at most 1, but is "
                f"{self.coupling}."
            )
        if has_layer(self.solver, _unsupported):
            raise ValueError(
                f"`Reversible` does not support `{type(self.solver).__name__}`, whose "
                "steps depend on more than the solution at their start, or cannot be "
                "made backwards in time. With "
                "`diffeqsolve(..., adjoint=StochasticAdjoint())` any solver can be "
                "used as it is."
            )

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del t0, t1, args
        check_sense(terms, self)
        if not is_sde(terms):
            return y0
        name = type(self.solver).__name__
        if has_layer(self.solver, diffrax.AbstractItoSolver):
            raise ValueError(
                f"`Reversible({name}())` would converge to neither the Itô nor the "
                "Stratonovich solution, as it makes steps in both directions of time. "
                "Convert the terms with `diffrax_sde_adjoint.ito_to_stratonovich`, and "
                "use a solver that converges to the Stratonovich solution."
            )
        if not has_layer(self.solver, diffrax.AbstractStratonovichSolver):
            raise ValueError(
                f"`Reversible({name}())` is not for SDEs, as `{name}` is not marked as "
                "converging to the Stratonovich solution. Wrap a solver that is, such "
                "as `diffrax.Heun()`."
            )
        return y0

    def _change(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
    ) -> tuple[Y, Y | None, diffrax.RESULTS]:
        """What a step of the solver adds to `y`."""
        state = self.solver.init(terms, t0, t1, y, args)
        y1, y_error, _, _, result = self.solver.step(
            terms, t0, t1, y, args, state, False
        )
        return jtu.tree_map(lambda a, b: a - b, y1, y), y_error, result

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, diffrax.RESULTS]:
        return self.step_again(
            terms, t0, t1, y0, args, solver_state, made_jump, y1=None
        )

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
        del made_jump
        known_y1, z0 = y1, solver_state
        change, y_error, result0 = self._change(terms, t0, t1, z0, args)
        couple = lambda y, z, dz: self.coupling * y + (1 - self.coupling) * z + dz
        y1 = jtu.tree_map(couple, y0, z0, change)
        if known_y1 is not None:
            y1 = jtu.tree_map(_at_value, y1, known_y1)
        change, _, result1 = self._change(reversed_terms(terms), t1, t0, y1, args)
        z1 = jtu.tree_map(lambda z, dy: z - dy, z0, change)
        result = diffrax.RESULTS.where(diffrax.is_okay(result0), result1, result0)
        return y1, y_error, dict(y0=y0, y1=y1), z1, result

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
        del made_jump
        z1 = solver_state
        change, _, result1 = self._change(reversed_terms(terms), t1, t0, y1, args)
        z0 = jtu.tree_map(lambda z, dy: z + dy, z1, change)
        change, _, result0 = self._change(terms, t0, t1, z0, args)
        decouple = lambda y, z, dz: (y - (1 - self.coupling) * z - dz) / self.coupling
        y0 = jtu.tree_map(decouple, y1, z0, change)
        result = diffrax.RESULTS.where(diffrax.is_okay(result1), result0, result1)
        return y0, dict(y0=y0, y1=y1), z0, result


@jax.custom_jvp
def _at_value(x: Array, value: Array) -> Array:
    """`value`, with the derivative of `x`."""
    del x
    return value


@_at_value.defjvp
def _at_value_jvp(primals, tangents):
    return primals[1], tangents[0]


Reversible.__init__.__doc__ = """**Arguments:**

- `solver`: the solver to wrap.
- `coupling`: a number above 0 and at most 1.

**Raises:**

`ValueError` if `coupling` is out of range, and for `diffrax.LeapfrogMidpoint` and the
solvers for underdamped Langevin dynamics, as they are not one-step or not to be used
backwards in time; and, when the solve of an SDE starts, for a solver that is not for
Stratonovich SDEs.
"""
