"""Zeros, sums and comparisons of PyTrees of arrays."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


def zeros_like(tree: PyTree[Any]) -> PyTree[Array]:
    """Of the same shapes and dtypes as the leaves, which may be structs."""
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def add_where_given(
    x: PyTree[Array | None], y: PyTree[Array | None]
) -> PyTree[Array | None]:
    """`x + y`, where `None` is zero. Where `x` is `None`, so is the sum."""
    add = lambda a, b: a if a is None or b is None else a + b
    return jtu.tree_map(add, x, y, is_leaf=lambda a: a is None)


def are_alike(x: PyTree[Any], y: PyTree[Any]) -> bool:
    """Whether they have the same structure, shapes and dtypes."""
    describe = lambda tree: jtu.tree_map(
        lambda z: f"{jnp.result_type(z)}{getattr(z, 'shape', ())}", tree
    )
    return eqx.tree_equal(describe(x), describe(y)) is True
