"""What a solver has in common with the one that it is built around."""

from typing import TypeVar

import diffrax
import equinox as eqx
from jaxtyping import PyTree

from .._compat import VF, Args, RealScalarLike, Y, contr_kwargs


_SolverState = TypeVar("_SolverState")


class AbstractForwardingSolver(diffrax.AbstractSolver[_SolverState]):
    """A solver that has the terms, the orders and the root finder of `solver`."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    @property
    def term_structure(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return contr_kwargs(self.solver)

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
