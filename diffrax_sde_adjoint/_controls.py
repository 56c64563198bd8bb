"""The control of a step, evaluated once.

The sweep needs the control over a step twice, to undo the step and to differentiate it.
For noise, the control is most of the cost of a small step, and XLA cannot be relied
upon to notice that it is drawn twice.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._compat import VF, Args, RealScalarLike, WrapTerm, Y


class AbstractForwardingTerm(diffrax.AbstractTerm):
    """A term that has the vector field of `term`."""

    term: eqx.AbstractVar[diffrax.AbstractTerm]

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        return self.term.vf(t, y, args)

    def prod(self, vf: VF, control: PyTree[Any]) -> Y:
        return self.term.prod(vf, control)

    def vf_prod(self, t: RealScalarLike, y: Y, args: Args, control: PyTree[Any]) -> Y:
        return self.term.vf_prod(t, y, args, control)


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


def is_single_term(x: Any) -> bool:
    """Whether `x` is a term that is not made up of others."""
    # Solvers may look for a `MultiTerm`, and do not see the type of its parts:
    # diffrax has wrapped them by now.
    return isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)


def with_weak_directions(terms: PyTree[diffrax.AbstractTerm]) -> PyTree[Any]:
    """`terms`, the directions of which in time have a weak type again. diffrax gives
    them one, so that their products with numbers of any dtype are of that dtype. JAX
    loses it for what is kept inside of a conditional for its derivative.
    """
    is_wrapped = lambda x: isinstance(x, WrapTerm)

    def weak(x: Any) -> Any:
        if not is_wrapped(x):
            return x
        return WrapTerm(x.term, jnp.where(x.direction == 1, 1, -1))

    return jtu.tree_map(weak, terms, is_leaf=is_wrapped)
