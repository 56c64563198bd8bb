"""The derivative of a solve with respect to when its steps are made.

The sweep takes the times of the steps as they were. Where these depend on something
that is differentiated (`t0`, `t1`, `dt0`, or what is in a step size controller), this
is a few numbers, and forward mode is the way: the loop is run once more, and takes the
derivative with respect to them along.
"""

from typing import Any

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import State


def distinct(tree: PyTree[Any]) -> PyTree[Any]:
    """`tree`, with arrays that are no other's, so that they can be told by identity."""
    return jtu.tree_map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, tree)


def split_times(
    loop: eqx.Partial, times: PyTree[Any]
) -> tuple[eqx.Partial, eqx.Partial]:
    """The arrays in `loop` that are in `times`, which are to be `distinct`, and
    everything else: with `None` in each where the other has something. A loop is over
    the steps of a solve, from a given state, and refers to no array by closure.
    """
    ids = {id(x) for x in jtu.tree_leaves(times) if eqx.is_array(x)}
    return eqx.partition(loop, lambda x: id(x) in ids)


def pull_back_times(
    times: eqx.Partial,
    rest: eqx.Partial,
    perturbed: eqx.Partial,
    grad_final_state: State,
) -> PyTree[Array | None]:
    """The cotangents of those of `times` that are `perturbed`, of the loop that they
    are with the `rest`.
    """
    if not any(jtu.tree_leaves(perturbed)):
        return jtu.tree_map(lambda _: None, times)
    diff, nondiff = eqx.partition(times, perturbed)
    diff = eqx.filter(diff, eqx.is_inexact_array)

    def final_state(diff):
        state, _ = eqx.combine(diff, nondiff, rest)()
        return eqx.filter(state, eqx.is_inexact_array)

    # The controller may have numbers of other dtypes than that of the times.
    with jax.numpy_dtype_promotion("standard"):
        flat, unravel = jfu.ravel_pytree(diff)

    def derivative(direction):
        _, tangents = jax.jvp(lambda x: final_state(unravel(x)), (flat,), (direction,))
        products = jtu.tree_map(product, grad_final_state, tangents)
        return sum(jtu.tree_leaves(products), start=jnp.zeros((), flat.dtype))

    def product(grad, tangent):
        # Where either is zero there is no dependence, whatever the other is: outputs
        # that were not written, or that nothing refers to, may have NaNs.
        is_zero = (grad == 0) | (tangent == 0)
        total = jnp.sum(jnp.where(is_zero, 0, grad * tangent))
        return jnp.real(total).astype(flat.dtype)

    return unravel(jax.vmap(derivative)(jnp.eye(flat.size, dtype=flat.dtype)))
