"""Vector-Jacobian products that are summed over a batch.

`grad(vmap(solve))` wants the gradient of parameters that all elements of a batch share.
JAX would evaluate the backward rule of each element by itself, and so find the gradient
of the parameters for each element, at each step, before it adds them up. That takes far
more time and memory than a solve written for the whole batch. `pull_back` transposes
the batched function instead, whose vector-Jacobian product has the sum inside.
"""

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._compat import BoolScalarLike
from .in_place import transpose_into


_T = TypeVar("_T")
_Number = TypeVar("_Number", bound=Array | int)


# The names of the axes over which gradients are summed, the innermost one first.
Axes = tuple[Hashable, ...]


def maximum(x: _Number, axes: Axes) -> _Number:
    """The largest `x` in the batch; a number is that of all elements."""
    if isinstance(x, int) or len(axes) == 0:
        return x
    return cast(_Number, lax.pmax(x, axes))


def any_of(x: Array, axes: Axes) -> Array:
    """Whether `x` is true anywhere in the batch."""
    return lax.pmax(x.astype(jnp.int32), axes) > 0 if axes else x


def where_active(is_active: BoolScalarLike, x: _T, y: _T, axes: Axes) -> _T:
    """`x` for the elements of a batch that are active, and `y` for the others. Without
    a batch, all is active.
    """
    if len(axes) == 0 or is_active is True:
        return x
    return jtu.tree_map(lambda a, b: jnp.where(is_active, a, b), x, y)


def pull_back(
    fn: Callable[..., list[Array]],
    axes: Axes,
    shared: list[Array],
    own: list[Array],
    residuals: list[Array],
    cotangents: list[Array],
    sums: list[Array],
    *,
    is_linear: bool,
) -> tuple[list[Array], list[Array]]:
    """`sums`, with the cotangents of `shared` added, and those of `own`: from those of
    `fn(shared, own, residuals)`. The former are sums over all `axes` over which an
    array is not batched. If `fn` is linear in `shared` and `own`, of these only shapes
    matter.

    Over each of the axes something must be batched, such as the cotangents.
    """
    product = _summed_vjp(fn, is_linear, len(axes))
    return product(shared, own, residuals, cotangents, sums)


def _summed_vjp(fn, is_linear, num_axes):
    """The vector-Jacobian product of a function of arrays, inside of `num_axes` times
    `vmap`.
    """

    def product(shared, own, residuals, cotangents, sums):
        if is_linear:
            return transpose_into(fn, shared, own, residuals, cotangents, sums)
        _, pull_back = jax.vjp(lambda *x: fn(*x, residuals), shared, own)
        grads, grad_own = pull_back(cotangents)
        return jtu.tree_map(jnp.add, sums, grads), grad_own

    if num_axes == 0:
        # JAX keeps what it has traced.
        return jax.jit(product, inline=True)
    product = jax.custom_batching.custom_vmap(product)

    # Once for all calls alike. For a loop JAX makes many, as it finds out what in its
    # carry is batched, and more for a loop in a loop.
    @functools.cache
    def batched_product(axis_size, shared, residuals):
        to_axes = lambda batched: [0 if b else None for b in batched]
        batched_fn = jax.vmap(
            fn, in_axes=(to_axes(shared), 0, to_axes(residuals)), axis_size=axis_size
        )
        return _summed_vjp(batched_fn, is_linear, num_axes - 1)

    @product.def_vmap
    def rule(axis_size, in_batched, shared, own, residuals, cotangents, sums):
        shared_batched, own_batched, residuals_batched, *others_batched = in_batched
        spread = lambda x, b: x if b else jnp.broadcast_to(x, (axis_size, *x.shape))
        own = list(map(spread, own, own_batched))
        cotangents = list(map(spread, cotangents, others_batched[0]))
        # An element that has a parameter of its own has a sum of its own.
        spread_if = lambda is_own, x, b: spread(x, b) if is_own else x
        sums = list(map(spread_if, shared_batched, sums, others_batched[1]))
        of_batch = batched_product(
            axis_size, tuple(shared_batched), tuple(residuals_batched)
        )
        out = of_batch(shared, own, residuals, cotangents, sums)
        return out, (list(shared_batched), [True] * len(own))

    return product
