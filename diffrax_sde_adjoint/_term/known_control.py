"""The control of a step, evaluated once.

The sweep needs the control over a step twice, to undo the step and to differentiate it.
For noise, the control is most of the cost of a small step, and XLA cannot be relied
upon to notice that it is drawn twice.
"""

from typing import Any

import diffrax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import Args, RealScalarLike, Y
from .base import AbstractForwardingTerm, is_single_term


class _KnownControl(AbstractForwardingTerm):
    """A term, of which the control from `t0` to `t1` is known to be `control`."""

    term: diffrax.AbstractTerm
    t0: RealScalarLike
    t1: RealScalarLike
    control: PyTree[Any]

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> PyTree:
        # Within one trace, equal times are the same object. If a solver computes them
        # anew, or wants more than an increment, then there is just nothing to gain.
        if t0 is self.t0 and t1 is self.t1 and len(kwargs) == 0:
            return self.control
        return self.term.contr(t0, t1, **kwargs)

    def is_vf_expensive(
        self, t0: RealScalarLike, t1: RealScalarLike, y: Y, args: Args
    ) -> bool:
        return self.term.is_vf_expensive(t0, t1, y, args)


def evaluate_controls(
    solver: diffrax.AbstractSolver,
    terms: PyTree[diffrax.AbstractTerm],
    t0: RealScalarLike,
    t1: RealScalarLike,
) -> list[PyTree[Any]]:
    """The control of each term from `t0` to `t1`; `None` if it is not an increment that
    the solver will ask for.
    """
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    is_kwargs = lambda x: isinstance(x, dict)
    kwargs = jtu.tree_leaves(solver.term_compatible_contr_kwargs, is_leaf=is_kwargs)
    if len(kwargs) != len(leaves):
        # The solver does not look into a `MultiTerm`.
        kwargs = [{} for _ in leaves]
    return [
        term.contr(t0, t1) if len(x) == 0 else None
        for term, x in zip(leaves, kwargs, strict=True)
    ]


def with_controls(
    terms: PyTree[diffrax.AbstractTerm],
    t0: RealScalarLike,
    t1: RealScalarLike,
    controls: list[PyTree[Any]],
) -> PyTree[diffrax.AbstractTerm]:
    """`terms`, except that they return `controls` when asked from `t0` to `t1`."""
    leaves, treedef = jtu.tree_flatten(terms, is_leaf=is_single_term)
    leaves = [
        term if control is None else _KnownControl(term, t0, t1, control)
        for term, control in zip(leaves, controls, strict=True)
    ]
    return jtu.tree_unflatten(treedef, leaves)
