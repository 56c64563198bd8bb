"""Explicit Runge-Kutta methods that are symmetric up to a high order.

A method is symmetric if a step back undoes a step. No explicit Runge-Kutta method is,
but some are up to a term of high order in the step, far smaller than their own error.
Both directions are the same tableau, from one end with the control or from the other
with its negative.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
from jaxtyping import PyTree

from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._reversal import reverse
from .base import AbstractReversibleSolver, check_sense


class AbstractEffectivelySymmetric(
    AbstractReversibleSolver,
    diffrax.AbstractERK,
    diffrax.AbstractStratonovichSolver,
):
    """Of one of these methods, what is not its tableau."""

    is_near_exact: ClassVar[bool] = True
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

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
        y1, y_error, _, solver_state, result = super().step(
            terms, t0, t1, y0, args, solver_state, made_jump
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
            reverse(terms), t1, t0, y1, args, solver_state, made_jump
        )
        return y0, dict(y0=y0, y1=y1), solver_state, result
