"""EES(2,5;1/10) and EES(2,7) of Shmelev et al. 2025: explicit Runge-Kutta methods that
are symmetric up to a high order.

A method is symmetric if a step back, of the same tableau, undoes a step. No explicit
one is, but some are up to a term of high order, far smaller than their own error.
"""

from typing import Any, ClassVar

import diffrax
import numpy as np
from jaxtyping import PyTree

from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._term.reversed import reversed_terms
from .base import AbstractReversibleSolver, check_sense
from .stage_loops import explicit_step


class _EffectivelySymmetric(
    AbstractReversibleSolver,
    diffrax.AbstractERK,
    diffrax.AbstractStratonovichSolver,
):
    """What is common to these methods: all but the tableau."""

    is_near_exact: ClassVar[bool] = True
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        return 2

    def strong_order(self, terms: PyTree[diffrax.AbstractTerm]) -> float:
        return 0.5

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: Any,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, Any, diffrax.RESULTS]:
        check_sense(terms, self)
        y1, y_error, _, solver_state, result = explicit_step(
            self.tableau, terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y1, y_error, dict(y0=y0, y1=y1), solver_state, result

    def backward_step(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: Any,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, Any, diffrax.RESULTS]:
        y0, _, _, solver_state, result = self.step(
            reversed_terms(terms), t1, t0, y1, args, solver_state, made_jump
        )
        return y0, dict(y0=y0, y1=y1), solver_state, result


def _tableau(*a_lower: np.ndarray, b_sol: np.ndarray) -> diffrax.ButcherTableau:
    """With Euler's method as the embedded one."""
    return diffrax.ButcherTableau(
        c=np.array([np.sum(row) for row in a_lower]),
        a_lower=a_lower,
        b_sol=b_sol,
        b_error=b_sol - np.eye(len(b_sol))[0],
    )


class EES25(_EffectivelySymmetric):
    r"""EES(2,5): second order, three stages, and reversible up to a term of sixth
    order.

    A step is undone by the same step with the negative of the control. For an ODE this
    leads back to within $O(h^6)$ for a step of size $h$, and for an SDE, whose
    increments are of size $h^{1/2}$, to within $O(h^3)$. So gradients are those of the
    numerical solution up to this: *near-exact*.
    [`diffrax_sde_adjoint.StochasticAdjoint`][] raises an error if it adds up to too
    much.

    Three evaluations of the vector field a step, forwards and backwards, and no state
    beside the solution. For $y' = -\lambda y$ it is stable up to $\lambda h = 3.09$, so
    it does well with contracting dynamics, where
    [`diffrax_sde_adjoint.ReversibleHeun`][] does not. Undoing a contracting solve
    amplifies errors all the same, by $e^{\lambda T}$ over a horizon of length $T$:
    use `StochasticAdjoint(checkpoint_every=...)`, with $\lambda$ times the time between
    two states that are kept no more than about 3.

    Has an embedded Euler method for adaptive step sizing, and uses linear interpolation
    for dense output.

    When used to solve SDEs it converges to the Stratonovich solution, with strong order
    0.5 in general and 1 for commutative noise.

    Source: Shmelev, Ebrahimi-Fard, Tapia and Salvi, *Explicit and Effectively Symmetric
    Runge-Kutta Methods*, arXiv:2507.21006, 2025.
    """

    tableau: ClassVar[diffrax.ButcherTableau] = _tableau(
        np.array([1 / 3]),
        np.array([-5 / 48, 15 / 16]),
        b_sol=np.array([1 / 10, 1 / 2, 2 / 5]),
    )


EES25.__init__.__doc__ = """**Arguments:** None"""


_s = np.sqrt(2)


class EES27(_EffectivelySymmetric):
    r"""EES(2,7): second order, four stages, and reversible up to a term of eighth
    order.

    As [`diffrax_sde_adjoint.EES25`][], of the same reference, with one more evaluation
    of the vector field a step, which makes undoing a step far more exact: it leads back
    to within $O(h^8)$ for an ODE and $O(h^4)$ for an SDE. For $y' = -\lambda y$ it is
    stable up to $\lambda h = 3.92$. Its own error is smaller too, of the same order.
    """

    tableau: ClassVar[diffrax.ButcherTableau] = _tableau(
        np.array([2 - _s]) / 3,
        np.array([(_s - 4) / 24, (4 + _s) / 8]),
        np.array([(145 * _s - 176) / 168, 3 * (8 - 5 * _s) / 56, 3 * (3 - _s) / 7]),
        b_sol=np.array([5 - 3 * _s, 3 + _s, 6 * _s - 3, 9 - 4 * _s]) / 14,
    )


EES27.__init__.__doc__ = """**Arguments:** None"""
