"""The loops over the stages of diffrax's Runge-Kutta solvers.

Such a loop can be one of several kinds, which differ in the derivatives that it has. By
default it has one in reverse mode only, by a rule of its own.
"""

from typing import TypeVar

import diffrax
import equinox as eqx


_Solver = TypeVar("_Solver", bound=diffrax.AbstractSolver)


def in_forward_mode(solver: _Solver) -> _Solver:
    """`solver`, for steps that may be differentiated in forward mode only."""
    return _with(solver, "lax", (diffrax.AbstractRungeKutta, diffrax.AbstractSRK))


def summed_over_batches(solver: _Solver) -> _Solver:
    """`solver`, for steps whose gradient may be summed over a batch: the default rule
    would find it for each element.
    """
    # Stochastic Runge-Kutta solvers do not have this kind of loop.
    return _with(solver, "bounded", (diffrax.AbstractRungeKutta,))


def _with(solver, kind, classes):
    # Not `isinstance`, which looks through wrappers such as `diffrax.HalfSolver`.
    if issubclass(type(solver), classes) and solver.scan_kind is None:
        is_none = lambda x: x is None
        return eqx.tree_at(lambda s: s.scan_kind, solver, kind, is_leaf=is_none)
    return solver
