"""The loops over the stages of diffrax's Runge-Kutta solvers.

Such a loop can be one of several kinds, which differ in the derivatives that it has. By
default it has one in reverse mode only, by a rule of its own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import diffrax
import jax.tree_util as jtu

from .._compat import with_scan_kind
from .unrolled_srk import SeparateStages


_Solver = TypeVar("_Solver", bound=diffrax.AbstractSolver)


def in_forward_mode(solver: _Solver) -> _Solver:
    """`solver`, with loops that have a derivative in forward mode."""
    kinds = {None: "lax", "checkpointed": "lax"}
    is_one = lambda cls: issubclass(
        cls, (diffrax.AbstractRungeKutta, diffrax.AbstractSRK)
    )
    return _replace(solver, is_one, lambda x: with_scan_kind(x, kinds))


def summed_over_batches(solver: _Solver) -> _Solver:
    """`solver`, with loops whose gradient may be summed over a batch: by default, it
    would be found for each element.
    """
    is_one = lambda cls: issubclass(cls, diffrax.AbstractRungeKutta)
    return _replace(solver, is_one, lambda x: with_scan_kind(x, {None: "bounded"}))


def without_loops(solver: _Solver) -> _Solver:
    """`solver`, with the stages of stochastic Runge-Kutta methods written out."""
    is_one = lambda cls: (
        issubclass(cls, diffrax.AbstractSRK) and cls.step is diffrax.AbstractSRK.step
    )
    return _replace(solver, is_one, SeparateStages)


def _replace(
    solver: Any, is_one: Callable[[type], bool], fn: Callable[[Any], Any]
) -> Any:
    # Of the type, and not `isinstance`, which looks through wrappers such as
    # `diffrax.HalfSolver`: it is the solver inside that is replaced.
    is_leaf = lambda x: is_one(type(x))
    replace = lambda x: fn(x) if is_leaf(x) else x
    return jtu.tree_map(replace, solver, is_leaf=is_leaf)
