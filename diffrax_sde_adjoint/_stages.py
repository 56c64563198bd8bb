"""The loops over the stages of diffrax's Runge-Kutta solvers.

Such a loop can be one of several kinds, which differ in the derivatives that it has. By
default it has one in reverse mode only, by a rule of its own.
"""

from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax.tree_util as jtu


_Solver = TypeVar("_Solver", bound=diffrax.AbstractSolver)


def in_forward_mode(solver: _Solver) -> _Solver:
    """`solver`, with loops that have a derivative in forward mode."""
    classes = (diffrax.AbstractRungeKutta, diffrax.AbstractSRK)
    return _replace(solver, classes, {None: "lax", "checkpointed": "lax"})


def summed_over_batches(solver: _Solver) -> _Solver:
    """`solver`, with loops whose gradient may be summed over a batch: by default, it
    would be found for each element.
    """
    # Stochastic Runge-Kutta solvers do not have this kind of loop.
    return _replace(solver, (diffrax.AbstractRungeKutta,), {None: "bounded"})


def _replace(solver: Any, classes: tuple[type, ...], kinds: dict) -> Any:
    # Not `isinstance`, which looks through wrappers such as `diffrax.HalfSolver`: it is
    # the solver inside that has the field.
    is_one = lambda x: issubclass(type(x), classes)

    def replace(x):
        if not is_one(x):
            return x
        kind = kinds.get(x.scan_kind, x.scan_kind)
        return eqx.tree_at(lambda s: s.scan_kind, x, kind, is_leaf=lambda x: x is None)

    return jtu.tree_map(replace, solver, is_leaf=is_one)
