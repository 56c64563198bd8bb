"""What a term is, to the rest of the package."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import VF, Args, RealScalarLike, WrapTerm, Y, direction_of


class AbstractForwardingTerm(diffrax.AbstractTerm):
    """A term that has the vector field of `term`."""

    term: eqx.AbstractVar[diffrax.AbstractTerm]

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        return self.term.vf(t, y, args)

    def prod(self, vf: VF, control: PyTree[Any]) -> Y:
        return self.term.prod(vf, control)

    def vf_prod(self, t: RealScalarLike, y: Y, args: Args, control: PyTree[Any]) -> Y:
        return self.term.vf_prod(t, y, args, control)


def is_single_term(x: Any) -> bool:
    """Whether `x` is a term that is not made up of others."""
    # Solvers may look for a `MultiTerm`, and do not see the type of its parts:
    # diffrax has wrapped them by now.
    return isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)


def unwrap(term: diffrax.AbstractTerm) -> Any:
    """The term that `diffeqsolve` was given."""
    return term.term if isinstance(term, WrapTerm) else term


def with_weak_directions(terms: PyTree[diffrax.AbstractTerm]) -> PyTree[Any]:
    """`terms`, the directions of which in time have a weak type again. diffrax gives
    them one, so that their products with numbers of any dtype are of that dtype. JAX
    loses it for what is kept inside of a conditional for its derivative.
    """
    is_wrapped = lambda x: isinstance(x, WrapTerm)

    def weak(x: Any) -> Any:
        if not is_wrapped(x):
            return x
        return WrapTerm(x.term, jnp.where(direction_of(x) == 1, 1, -1))

    return jtu.tree_map(weak, terms, is_leaf=is_wrapped)
