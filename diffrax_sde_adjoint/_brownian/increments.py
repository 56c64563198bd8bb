"""The algebra of Brownian increments.

An increment over an interval is what is known of the path there, relative to its left
end: the length `dt` of the interval and the increment `W` of the path over it, each a
PyTree with the structure of the path's shape. Increments over adjacent intervals are
joined into the one over their union; over disjoint intervals they are independent.
"""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


def sample(
    key: PRNGKeyArray, dt: Float[Array, ""], shape: PyTree[jax.ShapeDtypeStruct]
) -> diffrax.BrownianIncrement:
    """The increment over an interval of length `dt`, of which nothing else is known.

    `shape` is a PyTree of `jax.ShapeDtypeStruct`s; `W` has independent entries of mean
    zero and variance `dt`.
    """
    leaves, treedef = jtu.tree_flatten(shape)
    # A path with one leaf, by far the most common, is spared the cost of a split.
    keys = [key] if len(leaves) == 1 else jr.split(key, len(leaves))
    std = jnp.sqrt(dt)
    w = [
        jr.normal(k, x.shape, x.dtype) * std.astype(x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return diffrax.BrownianIncrement(
        dt=_lengths(dt, shape), W=jtu.tree_unflatten(treedef, w)
    )


def zero(shape: PyTree[jax.ShapeDtypeStruct]) -> diffrax.BrownianIncrement:
    """The increment over an interval of length zero."""
    w = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    return diffrax.BrownianIncrement(dt=_lengths(jnp.zeros(()), shape), W=w)


def join(
    left: diffrax.BrownianIncrement, right: diffrax.BrownianIncrement
) -> diffrax.BrownianIncrement:
    """The increment over the union of two adjacent intervals."""
    return jtu.tree_map(lambda a, b: a + b, left, right)


def _lengths(
    dt: Float[Array, ""], shape: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[Array]:
    # A complex path has real lengths.
    return jtu.tree_map(lambda x: dt.astype(jnp.finfo(x.dtype).dtype), shape)
