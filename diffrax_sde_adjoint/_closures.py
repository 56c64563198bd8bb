"""What a vector field refers to by closure, made a part of its term.

JAX passes arrays into a function with a derivative of its own only through its
arguments. So where a vector field refers to an array that is being traced (by `jit`,
`vmap` or `grad`), it is replaced by one that has this array as a part of itself.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.core
import jax.extend as jex
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._compat import VF, Args, RealScalarLike, Y
from ._controls import is_single_term


class _HoistedTerm(diffrax.AbstractTerm):
    """`term`, with its vector field as a function of all that it depends on: `closure`,
    time, and the arrays in `term`, `y` and `args`.
    """

    term: diffrax.AbstractTerm
    closure: list[Array]
    jaxpr: Any = eqx.field(static=True)
    out_struct: PyTree = eqx.field(static=True)

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        arrays = jtu.tree_leaves(eqx.filter((self.term, t, y, args), eqx.is_array))
        closed_jaxpr = jex.core.ClosedJaxpr(self.jaxpr, self.closure)
        out = jex.core.jaxpr_as_fun(closed_jaxpr)(*arrays)
        dynamic, static = self.out_struct
        leaves, treedef = jtu.tree_flatten(dynamic)
        assert len(leaves) == len(out)
        return eqx.combine(jtu.tree_unflatten(treedef, out), static)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> PyTree:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: PyTree) -> Y:
        return self.term.prod(vf, control)


def hoist_closures(
    terms: PyTree[diffrax.AbstractTerm], t: RealScalarLike, y: Y, args: Args
) -> PyTree[diffrax.AbstractTerm]:
    """`terms`, none of whose vector fields refers to a traced array by closure."""

    def hoist(term: diffrax.AbstractTerm) -> diffrax.AbstractTerm:
        vf = lambda term, t, y, args: term.vf(t, y, args)
        closed_jaxpr, *out_struct = eqx.filter_make_jaxpr(vf)(term, t, y, args)
        closure = closed_jaxpr.consts
        if not any(isinstance(x, jax.core.Tracer) for x in closure):
            return term
        return _HoistedTerm(term, closure, closed_jaxpr.jaxpr, tuple(out_struct))

    return jtu.tree_map(hoist, terms, is_leaf=is_single_term)
