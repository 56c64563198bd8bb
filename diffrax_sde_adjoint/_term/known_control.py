"""The control of a step, evaluated once.

The sweep needs the control over a step twice, to undo the step and to differentiate it.
For noise, the control is most of the cost of a small step, and XLA cannot be relied
upon to notice that it is drawn twice.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._brownian.path_of_solve import of_whole_steps
from .._compat import Args, RealScalarLike, Y
from .base import AbstractForwardingTerm, is_single_term, unwrap


_with_levy_area = {"use_levy": True}
_langevin = (
    diffrax.UnderdampedLangevinDriftTerm,
    diffrax.UnderdampedLangevinDiffusionTerm,
)


class _KnownControl(AbstractForwardingTerm):
    """A term, of which the control from `t0` to `t1` is known to be `control`. If it
    `has_levy_area`, this is the one that is asked for with `use_levy=True`.
    """

    term: diffrax.AbstractTerm
    t0: RealScalarLike
    t1: RealScalarLike
    control: PyTree[Any]
    has_levy_area: bool = eqx.field(static=True)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> PyTree:
        # Within one trace, equal times are the same object. If a solver computes them
        # anew, or wants another control, then there is just nothing to gain.
        asks_for_known = kwargs == (_with_levy_area if self.has_levy_area else {})
        if t0 is self.t0 and t1 is self.t1 and asks_for_known:
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
    """The control of each term over a step from `t0` to `t1`; `None` if it is not known
    what the solver will ask for.
    """
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    # Solvers for these look into the terms.
    can_be_known = lambda term, x: (
        not isinstance(unwrap(term), _langevin) and x in ({}, _with_levy_area)
    )
    return [
        of_whole_steps(term).contr(t0, t1, **x) if can_be_known(term, x) else None
        for term, x in zip(leaves, _kwargs(solver, len(leaves)), strict=True)
    ]


def _kwargs(solver: diffrax.AbstractSolver, num_terms: int) -> list[dict[str, Any]]:
    """With what the solver asks each term for its control."""
    is_kwargs = lambda x: isinstance(x, dict)
    kwargs = jtu.tree_leaves(solver.term_compatible_contr_kwargs, is_leaf=is_kwargs)
    # Or the solver does not look into a `MultiTerm`.
    return kwargs if len(kwargs) == num_terms else num_terms * [{}]


def with_controls(
    solver: diffrax.AbstractSolver,
    terms: PyTree[diffrax.AbstractTerm],
    t0: RealScalarLike,
    t1: RealScalarLike,
    controls: list[PyTree[Any]],
) -> PyTree[diffrax.AbstractTerm]:
    """`terms`, except that they return `controls` when asked from `t0` to `t1`."""
    leaves, treedef = jtu.tree_flatten(terms, is_leaf=is_single_term)
    leaves = [
        term if control is None else _KnownControl(term, t0, t1, control, len(x) > 0)
        for term, control, x in zip(
            leaves, controls, _kwargs(solver, len(leaves)), strict=True
        )
    ]
    return jtu.tree_unflatten(treedef, leaves)
