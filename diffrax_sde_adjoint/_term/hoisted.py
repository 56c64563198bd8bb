"""What functions refer to by closure: made a part of them.

JAX passes arrays into a function with a derivative of its own only through its
arguments. So where a vector field or a function of a `SubSaveAt` refers to an array
that is being traced (by `jit`, `vmap` or `grad`), it is replaced by one that has this
array as a part of itself.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.core
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._autodiff.closures import Hoisted, hoist
from .._compat import VF, Args, RealScalarLike, Y, nondifferentiable, save_y
from .base import is_single_term, unwrap
from .products import product


class _HoistedTerm(diffrax.AbstractTerm):
    """`term`, with its vector field as a function of all that it depends on: `term`
    itself, time, `y` and `args`.
    """

    term: diffrax.AbstractTerm
    hoisted_vf: Hoisted

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        return self.hoisted_vf(self.term, t, y, args)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> PyTree:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: PyTree) -> Y:
        return self.term.prod(vf, control)

    def is_vf_expensive(
        self, t0: RealScalarLike, t1: RealScalarLike, y: Y, args: Args
    ) -> bool:
        return self.term.is_vf_expensive(t0, t1, y, args)


def hoist_closures(
    terms: PyTree[diffrax.AbstractTerm],
    t: RealScalarLike,
    y: Y,
    args: Args,
    adjoint: str,
) -> PyTree[diffrax.AbstractTerm]:
    """`terms`, none of whose vector fields refers to a traced array by closure. An
    error if one of their products is not of the structure of the solution. `adjoint` is
    a name for messages.
    """

    def hoist_vf(term: diffrax.AbstractTerm, y: Y) -> diffrax.AbstractTerm:
        hoisted_vf = hoist(lambda term, *x: term.vf(*x), term, t, y, args)
        closure = hoisted_vf.closure

        def evaluate(term, t, y, args):
            control = term.contr(t, t)
            return control, product(term, term.vf(t, y, args), control, y)

        everything, *_ = eqx.filter_make_jaxpr(evaluate)(term, t, y, args)
        _check_controls(set(map(id, closure)), everything.consts, adjoint)
        if not any(isinstance(x, jax.core.Tracer) for x in closure):
            return term
        if isinstance(unwrap(term), diffrax.UnderdampedLangevinDriftTerm):
            raise NotImplementedError(
                "`UnderdampedLangevinDriftTerm(grad_f=...)` must not refer to an array "
                f"that is traced by JAX with `adjoint={adjoint}()`. Make it a "
                "part of `grad_f`, as an `equinox.Module` or `jax.tree_util.Partial`, "
                "or use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
            )
        return _HoistedTerm(term, hoisted_vf)

    # A solver may take terms in another structure, which the solution has too: each
    # part of it has a term of its own.
    is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
    hoist_all = lambda term, y: jtu.tree_map(
        lambda x: hoist_vf(x, y), term, is_leaf=is_single_term
    )
    return jtu.tree_map(hoist_all, terms, y, is_leaf=is_term)


def _check_controls(
    of_vector_field: set[int], everything: list[Any], adjoint: str
) -> None:
    """An error if a control is differentiated in what it refers to by closure."""
    for x in everything:
        if isinstance(x, jax.core.Tracer) and id(x) not in of_vector_field:
            nondifferentiable(
                x,
                msg=f"`adjoint={adjoint}()` does not differentiate what a "
                "control refers to by closure. Make it a part of the control, as in "
                "`diffrax.ControlTerm(vector_field, jax.tree_util.Partial(f, x))`, or "
                "use `adjoint=diffrax.RecursiveCheckpointAdjoint()`.",
            )


def hoist_save_fns(
    saveat: diffrax.SaveAt, t: RealScalarLike, y: Y, args: Args
) -> diffrax.SaveAt:
    """`saveat`, none of whose functions refers to an array by closure."""

    def hoist_fn(sub: diffrax.SubSaveAt) -> diffrax.SubSaveAt:
        if sub.fn is save_y:
            return sub
        fn = eqx.filter_closure_convert(sub.fn, t, y, args)
        return eqx.tree_at(lambda s: s.fn, sub, fn)

    is_subsaveat = lambda x: isinstance(x, diffrax.SubSaveAt)
    subs = jtu.tree_map(hoist_fn, saveat.subs, is_leaf=is_subsaveat)
    return eqx.tree_at(lambda s: s.subs, saveat, subs)
