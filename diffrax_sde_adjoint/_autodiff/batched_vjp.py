"""Vector-Jacobian products that are summed over a batch.

`grad(vmap(solve))` wants the gradient of parameters that all elements of a batch share.
JAX would evaluate the backward rule of each element by itself, and so find the gradient
of the parameters for each element, at each step, before it adds them up. That takes far
more time and memory than a solve written for the whole batch. `vjp` differentiates the
batched function instead, whose vector-Jacobian product has the sum inside.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._compat import BoolScalarLike


_T = TypeVar("_T")


# The names of the axes over which gradients are summed, the innermost one first.
Axes = tuple[Hashable, ...]


def maximum(x: Array, axes: Axes) -> Array:
    """The largest `x` in the batch."""
    return lax.pmax(x, axes) if axes else x


def any_of(x: Array, axes: Axes) -> Array:
    """Whether `x` is true anywhere in the batch."""
    return lax.pmax(x.astype(jnp.int32), axes) > 0 if axes else x


def where_active(is_active: BoolScalarLike, x: _T, y: _T, axes: Axes) -> _T:
    """`x` for the elements of a batch that are active, and `y` for the others. Without
    a batch, all is active.
    """
    if len(axes) == 0:
        return x
    return jtu.tree_map(lambda a, b: jnp.where(is_active, a, b), x, y)


def vjp(
    fn: Callable[[Any, Any, Any], _T], axes: Axes, shared: Any, own: Any, fixed: Any
) -> tuple[_T, Callable[[Any], tuple[Any, Any]]]:
    """`fn(shared, own, fixed)`, and what pulls back the cotangents of its inexact
    arrays to those of `shared` and of `own`. The cotangents of `shared` are sums over
    all `axes` over which an array is not batched.

    `fn` must not refer to traced arrays by closure, and over each of the axes something
    must be batched, such as the cotangents.
    """
    if len(axes) == 0:
        return eqx.filter_vjp(lambda x, y: fn(x, y, fixed), shared, own)
    diff, nondiff = eqx.partition((shared, own), eqx.is_inexact_array)
    dynamic, static = eqx.partition((nondiff, fixed), eqx.is_array)

    def array_fn(diff_shared, diff_own, dynamic):
        nondiff, fixed = eqx.combine(dynamic, static)
        shared, own = eqx.combine((diff_shared, diff_own), nondiff)
        return eqx.filter(fn(shared, own, fixed), eqx.is_inexact_array)

    def pull_back(cotangents):
        # This evaluates `fn` again; XLA finds that it had been.
        diff_shared, diff_own = diff
        product = _summed_vjp(array_fn, len(axes))
        return product(diff_shared, diff_own, dynamic, cotangents)

    return fn(shared, own, fixed), pull_back


def _summed_vjp(fn, num_axes):
    """The vector-Jacobian product of a function of arrays, inside of `num_axes` times
    `vmap`.
    """

    def product(shared, own, fixed, cotangents):
        _, pull_back = jax.vjp(lambda *x: fn(*x, fixed), shared, own)
        return pull_back(cotangents)

    if num_axes == 0:
        # JAX keeps what it has traced.
        return jax.jit(product, inline=True)
    product = jax.custom_batching.custom_vmap(product)

    # Once for all calls alike. For a loop JAX makes many, as it finds out what in its
    # carry is batched, and more for a loop in a loop.
    @functools.cache
    def batched_product(axis_size, treedef, is_batched):
        shared, _, fixed, _ = jtu.tree_unflatten(treedef, is_batched)
        to_axes = lambda batched: jtu.tree_map(lambda b: 0 if b else None, batched)
        batched_fn = jax.vmap(
            fn, in_axes=(to_axes(shared), 0, to_axes(fixed)), axis_size=axis_size
        )
        return _summed_vjp(batched_fn, num_axes - 1)

    @product.def_vmap
    def rule(axis_size, in_batched, shared, own, fixed, cotangents):
        shared_batched, own_batched, _, cotangents_batched = in_batched
        spread = lambda x, b: x if b else jnp.broadcast_to(x, (axis_size, *x.shape))
        own = jtu.tree_map(spread, own, own_batched)
        cotangents = jtu.tree_map(spread, cotangents, cotangents_batched)
        is_batched, treedef = jtu.tree_flatten(in_batched)
        of_batch = batched_product(axis_size, treedef, tuple(is_batched))
        grads = of_batch(shared, own, fixed, cotangents)
        return grads, (shared_batched, jtu.tree_map(lambda _: True, own_batched))

    return product
