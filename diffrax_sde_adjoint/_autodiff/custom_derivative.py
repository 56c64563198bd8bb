"""Functions whose derivative is a rule of our own, which sums over a batch.

A `jax.custom_vjp` knows nothing of a batch: `jax.vmap` maps its rule over the elements,
each by itself. So here a function with a rule for its derivative is a JAX primitive,
and its batching rule is to become that primitive with one more axis. When it is
differentiated, it is known over which axes it had been batched by then, which are the
axes to sum over. The rule is evaluated under a `jax.vmap` over each, and finds the
gradient of a shared parameter with `pull_back` of `batched_vjp.py`.

Axes that come after differentiation, as in `vmap(grad(solve))`, are JAX's own affair.
There the gradients of the elements are kept apart, as they should be.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import is_symbolic_zero, make_primitive, symbolic_zero
from .batched_vjp import Axes, any_of


_T = TypeVar("_T")


class _Axis(NamedTuple):
    """One over which a solve was batched, and where it is in each of the arrays that
    have it.
    """

    size: int
    dims: tuple[int | None, ...]


# What gives outputs their derivative, see `with_derivative`.
Rule = Callable[[Any, Any, Any, Any, Any, Axes], tuple[Any, Any, Array]]


@dataclasses.dataclass(eq=False, repr=False)
class _Call:
    """The rule, and how to put its arguments together from arrays. It is a parameter of
    a primitive, and equal only to itself.
    """

    rule: Rule
    no_forward_mode: str
    treedef: Any
    static: PyTree[Any]
    num_outputs: int

    def arrays(self, leaves: Sequence[Any]) -> PyTree[Array]:
        # JAX may have made numbers of some.
        return jtu.tree_unflatten(self.treedef, map(jnp.asarray, leaves))


def with_derivative(
    rule: Rule,
    shared: Any,
    own: Any,
    residuals: Any,
    outputs: _T,
    *,
    no_forward_mode: str,
) -> _T:
    """`outputs`, as a differentiable function of `shared` and `own`.

    `rule(perturbed, (shared, own), residuals, outputs, grad_outputs, axes)` returns the
    cotangents of `shared` and `own`, for one element of a batch over `axes`. The
    cotangents of `shared` are to be sums over all `axes` over which an array is not
    batched. `perturbed` has `True` for each array that is differentiated. The third
    thing that `rule` returns is whether the cotangents are to be replaced by NaN.
    `no_forward_mode` is the message of the error in forward mode.
    """
    arrays, static = eqx.partition((shared, own, residuals, outputs), eqx.is_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    out_leaves, out_treedef = jtu.tree_flatten(arrays[-1])
    call = _Call(rule, no_forward_mode, treedef, static, len(out_leaves))
    leaves = map(jnp.asarray, leaves)  # from those of NumPy
    out = _with_derivative_p.bind(*leaves, call=call, axes=())
    return eqx.combine(jtu.tree_unflatten(out_treedef, out), static[-1])


def detach(tree: _T) -> _T:
    """`tree`, whose arrays have no derivative, for a function that is to be given
    another `with_derivative`.

    Unlike for `jax.lax.stop_gradient`, this is so for one differentiation: the
    innermost one that any of the arrays takes part in. If a gradient is differentiated,
    then in the outer differentiation they have their derivative.
    """
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    return eqx.combine(jtu.tree_unflatten(treedef, _detach_p.bind(*leaves)), rest)


def _detach_jvp(primals, tangents):
    del tangents
    # Not bound again: an outer differentiation does not see that these were detached.
    return list(primals), [symbolic_zero(x) for x in primals]


_detach_p = make_primitive(
    "detach",
    impl=lambda *leaves: list(leaves),
    abstract_eval=lambda *leaves: list(leaves),
    batch=lambda leaves, dims: (_detach_p.bind(*leaves), dims),
    jvp=_detach_jvp,
)


def _impl(*leaves, call, axes):
    del axes
    return list(leaves[len(leaves) - call.num_outputs :])


def _batch(leaves, dims, *, call, axes):
    (size,) = {x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None}

    def batch(i, x, dim):
        is_output = i >= len(leaves) - call.num_outputs
        if dim is None and is_output and eqx.is_inexact_array(x):
            # So that there is one cotangent for each element.
            return jnp.broadcast_to(x, (size, *x.shape)), 0
        return x, dim

    leaves, dims = zip(*map(batch, range(len(leaves)), leaves, dims), strict=True)
    out = _with_derivative_p.bind(*leaves, call=call, axes=(*axes, _Axis(size, dims)))
    return out, list(dims[len(leaves) - len(out) :])


def _jvp(primals, tangents, *, call, axes):
    is_zero = lambda t: is_symbolic_zero(t) or t.dtype == jax.dtypes.float0
    tangents = [None if is_zero(t) else t for t in tangents]
    tangents_of_outputs = tangents[len(tangents) - call.num_outputs :]
    if any(t is not None for t in tangents_of_outputs):
        # This is an outer differentiation, in which the outputs were not detached, of
        # an inner one that did not come here: they have their derivative.
        return _finish_jvp(_impl(*primals, call=call, axes=axes), tangents_of_outputs)
    bind = lambda t: _in_reverse_p.bind(t, msg=call.no_forward_mode)
    tangents = jtu.tree_map(bind, tangents)
    out, tangent_out = eqx.filter_jvp(
        lambda *arrays: _differentiable(arrays, call=call, axes=axes),
        call.arrays(primals),
        jtu.tree_unflatten(call.treedef, tangents),
    )
    out, treedef = jtu.tree_flatten(out)
    return _finish_jvp(out, treedef.flatten_up_to(tangent_out))


def _finish_jvp(out, tangent_out):
    return list(out), [
        symbolic_zero(x) if t is None else t
        for x, t in zip(out, tangent_out, strict=True)
    ]


_with_derivative_p = make_primitive(
    "with_derivative", impl=_impl, abstract_eval=_impl, batch=_batch, jvp=_jvp
)


def _refuse(*_, msg):
    raise ValueError(msg)


# The identity, on the tangents of what has a rule in reverse mode only. There it is
# transposed, and neither evaluated nor batched.
_in_reverse_p = make_primitive(
    "in_reverse",
    multiple_results=False,
    impl=_refuse,
    abstract_eval=lambda tangent, *, msg: tangent,
    batch=_refuse,
    transpose=lambda cotangent, _, *, msg: [cotangent],
)


@eqx.filter_custom_vjp
def _differentiable(arrays, *, call, axes):
    del call, axes
    return arrays[-1]


@_differentiable.def_fwd
def _differentiable_fwd(perturbed, arrays, *, call, axes):
    del perturbed, call, axes
    return arrays[-1], None


@_differentiable.def_bwd
def _differentiable_bwd(_, grad_outputs, perturbed, arrays, *, call, axes):
    # Of what is not an array, nothing is.
    perturbed = eqx.combine(perturbed, jtu.tree_map(lambda _: False, call.static))[:2]
    grad_outputs = jtu.tree_map(_materialise_zeros, arrays[-1], grad_outputs)
    grad_outputs, treedef_of_grads = jtu.tree_flatten(grad_outputs)
    names = tuple(object() for _ in axes)
    is_batched = [
        jtu.tree_unflatten(call.treedef, [d is not None for d in axis.dims])[:2]
        for axis in axes
    ]

    def rule(leaves, grad_outputs):
        *inputs, residuals, outputs = eqx.combine(call.arrays(leaves), call.static)
        grads = jtu.tree_unflatten(treedef_of_grads, grad_outputs)
        *grads, is_wrong = call.rule(
            perturbed, tuple(inputs), residuals, outputs, grads, names
        )

        def finish(is_summed, grad, *is_batched):
            if grad is None:
                return None
            pairs = zip(names, is_batched, strict=True)
            shared_over = tuple(name for name, batched in pairs if not batched)
            is_any_wrong = any_of(is_wrong, shared_over)
            if shared_over and not is_summed:
                grad = lax.psum(grad, shared_over)
            return jnp.where(is_any_wrong, jnp.nan, grad)

        is_none = lambda x: x is None
        return tuple(
            jtu.tree_map(partial(finish, is_summed), *trees, is_leaf=is_none)
            for is_summed, *trees in zip((True, False), grads, *is_batched, strict=True)
        )

    are_inexact = [eqx.is_inexact_array(x) for x in jtu.tree_leaves(arrays[-1])]
    for name, axis in zip(names, axes, strict=True):
        of_outputs = axis.dims[len(axis.dims) - call.num_outputs :]
        pairs = zip(of_outputs, are_inexact, strict=True)
        rule = jax.vmap(
            rule,
            in_axes=(list(axis.dims), [dim for dim, b in pairs if b]),
            out_axes=jtu.tree_unflatten(call.treedef, axis.dims)[:2],
            axis_size=axis.size,
            axis_name=name,
        )
    none = jtu.tree_map(lambda _: None, arrays[2:])
    return *rule(jtu.tree_leaves(arrays), grad_outputs), *none


def _materialise_zeros(x: Array, grad: Array | None) -> Array | None:
    if not eqx.is_inexact_array(x):
        return None
    return jnp.zeros_like(x) if grad is None else grad
