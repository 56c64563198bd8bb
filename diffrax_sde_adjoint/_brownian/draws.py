"""Normal random numbers from keys, and combinations of them.

Each evaluation of JAX's hash function makes 64 random bits. `jax.random.normal` folds
them into 32 for a number in single precision; here they are two numbers. As hashing is
most of the cost of a number on a CPU, they take 0.5-0.7 times as long for large arrays.
Numbers in double precision are those of `jax.random.normal`, as it is by default (with
JAX's option `jax_threefry_partitionable`). Half precision is drawn in single: few bits
have a bias, which adds up over many cells.

Some rows of arrays are drawn alone, and are those of whole arrays: each hash is of the
key and of a number that counts them.
"""

import math
from functools import partial

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int, Key, PyTree, UInt, UInt32

from .._misc import zeros_like


# The bytes of an array above which XLA runs the loop that it is in several times
# slower: see `docs/how_it_works/small_loops.md`. Operations that are there, but rarely
# run, had better not touch one.
_small = 512
# Into how many parts a draw is split at most to keep arrays small, as each is code that
# has to be compiled. More parts than that are a loop.
_max_parts = 6
# XLA shares the work on large arrays among cores: the more there is, the better. What
# is shared costs more than it saves for smaller ones.
_large = 2**15


class Rows(eqx.Module):
    """Where the rows of arrays are, along their second axis, in arrays of a `total`."""

    first: Int[Array, ""]
    total: int = eqx.field(static=True)

    def hold(self, num: int) -> Bool[Array, ""]:
        """Whether there are `num` rows from the first on."""
        return (self.first >= 0) & (self.first <= self.total - num)


def draw(
    key: Key[Array, ""], like: PyTree[jax.ShapeDtypeStruct], rows: Rows | None
) -> PyTree[Array]:
    """Independent standard normal numbers, in at least single precision."""
    return _numbers(_hash(key, like, rows), like)


def _hash(
    key: Key[Array, ""], like: PyTree[jax.ShapeDtypeStruct], rows: Rows | None
) -> list[Array]:
    leaves = jtu.tree_leaves(like)
    # A path with one leaf, by far the most common, is spared the cost of a split.
    keys = [key] if len(leaves) == 1 else jr.split(key, len(leaves))
    return [_hash_leaf(k, x, rows) for k, x in zip(keys, leaves, strict=True)]


def _numbers(hashed: list[Array], like: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    leaves, treedef = jtu.tree_flatten(like)
    return jtu.tree_unflatten(treedef, map(_to_normal, hashed, leaves))


def combine(
    keys: list[Key[Array, " keys"]],
    coefs: list[list[Float[Array, "keys num"]]],
    like: PyTree[jax.ShapeDtypeStruct],
    rows: Rows | None,
    is_rare: bool,
) -> list[PyTree[Array]]:
    """The components, stacked as in `like`, with the given coefficients of the numbers
    that keys give, for each of several lists of keys. In single precision at least.

    What `is_rare` is kept from slowing down what is around it.
    """
    stacked = [jnp.stack(x, axis=1) for x in coefs]
    hash_all = jax.vmap(lambda key: _hash(key, like, rows))
    all_numbers = jax.vmap(lambda hashed: _numbers(hashed, like))
    sizes = [x.size * x.dtype.itemsize for x in jtu.tree_leaves(like)]
    size = max([1, *sizes])
    at_once = _small // size
    num_loops = -(-len(keys[0]) // (_max_parts * max(at_once, 1)))
    if at_once == 0 or (num_loops > 1 and not is_rare):
        if size >= _large:
            numbers = all_numbers(hash_all(jnp.concatenate(keys)))
            splits = np.cumsum([len(x) for x in keys])[:-1]
            split = lambda x: jnp.split(x, splits)
            numbers = jtu.tree_transpose(
                jtu.tree_structure(numbers), None, jtu.tree_map(split, numbers)
            )
        else:
            numbers = [all_numbers(hash_all(x)) for x in keys]
        return [
            jtu.tree_map(partial(_dot, c), x)
            for c, x in zip(stacked, numbers, strict=True)
        ]

    # As many keys at once as keep all arrays small: hashes take half of the space.
    def combine_in_parts(keys, coefs):
        parts = []
        for i in range(0, len(keys), 2 * at_once):
            hashed = hash_all(keys[i : i + 2 * at_once])
            for j in range(0, min(2 * at_once, len(keys) - i), at_once):
                numbers = all_numbers([x[j : j + at_once] for x in hashed])
                some = coefs[i + j : i + j + at_once]
                parts.append(jtu.tree_map(partial(_sum_of_products, some), numbers))
        return jtu.tree_map(lambda *x: sum(x[1:], x[0]), *parts)

    def combine_in_loop(keys, coefs):
        if num_loops == 1:
            return combine_in_parts(keys, coefs)
        # The last may have fewer keys than the others.
        in_loop = -(-len(keys) // num_loops)
        missing = num_loops * in_loop - len(keys)
        keys = jnp.concatenate([keys, keys[:missing]])
        coefs = jnp.concatenate([coefs, jnp.zeros_like(coefs[:missing])])

        def add(i, out):
            some = [
                lax.dynamic_slice_in_dim(x, i * in_loop, in_loop) for x in (keys, coefs)
            ]
            return jtu.tree_map(jnp.add, out, combine_in_parts(*some))

        zeros = jtu.tree_map(at_least_single, zeros_like(like))
        return lax.fori_loop(0, num_loops, add, zeros)

    return [combine_in_loop(k, c) for k, c in zip(keys, stacked, strict=True)]


def _dot(
    coefs: Float[Array, "keys num num"], numbers: Inexact[Array, "keys num *shape"]
) -> Inexact[Array, "num *shape"]:
    coefs = coefs.astype(numbers.dtype)
    # Not in the reduced precision that accelerators default to.
    return jnp.einsum("kcn,kn...->c...", coefs, numbers, precision="highest")


def _sum_of_products(
    coefs: Float[Array, "keys num num"], numbers: Inexact[Array, "keys num *shape"]
) -> Inexact[Array, "num *shape"]:
    # As `_dot`, but XLA compiles this together with the draw.
    ones = (1,) * (numbers.ndim - 2)
    coefs = coefs.astype(numbers.dtype).reshape(*coefs.shape, *ones)
    rows = range(coefs.shape[1])
    return jnp.stack([jnp.sum(coefs[:, i] * numbers, axis=(0, 1)) for i in rows])


def _hash_leaf(
    key: Key[Array, ""], like: jax.ShapeDtypeStruct, rows: Rows | None
) -> UInt32[Array, "..."]:
    """The first step of a draw: random bits, words of 32 along the last axis."""
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        parts = [_hash_leaf(k, _real(like), rows) for k in jr.split(key)]
        return jnp.stack(parts)
    two_a_hash = _is_at_most_single(like.dtype)
    if rows is not None:
        return _hash_rows(key, like, rows, two_a_hash)
    size = -(-like.size // 2) if two_a_hash else like.size
    # The data of a key are random bits: those that JAX makes of all 64.
    if two_a_hash and size <= 1:
        return jr.key_data(key)[None, :2]
    return jr.key_data(jr.split(key, size))[:, :2]


def _hash_rows(
    key: Key[Array, ""], like: jax.ShapeDtypeStruct, rows: Rows, two_a_hash: bool
) -> UInt32[Array, "numbers words"]:
    """As for whole arrays, of which number `i` is made of hash `i`; or if there are two
    numbers of each hash, of the first word of hash `i` if this is less than `half`, and
    else of the second word of hash `i - half`.
    """
    num, count, *rest = like.shape
    stride = math.prod(rest)
    index = jnp.arange(count * stride, dtype=jnp.uint32)
    index = index + rows.first.astype(jnp.uint32) * np.uint32(stride)
    of_component = jnp.arange(num, dtype=jnp.uint32) * np.uint32(rows.total * stride)
    index = (of_component[:, None] + index).reshape(-1)
    size = num * rows.total * stride
    if not two_a_hash:
        return jr.key_data(jax.vmap(jr.fold_in, (None, 0))(key, index))[:, :2]
    half = np.uint32(-(-size // 2))
    is_second = index >= half
    if size <= 2:
        words = jnp.broadcast_to(jr.key_data(key)[:2], (len(index), 2))
    else:
        index = jnp.where(is_second, index - half, index)
        words = jr.key_data(jax.vmap(jr.fold_in, (None, 0))(key, index))
    return jnp.where(is_second, words[:, 1], words[:, 0])[:, None]


def _to_normal(
    hashed: UInt32[Array, "..."], like: jax.ShapeDtypeStruct
) -> Inexact[Array, "..."]:
    """The second step of a draw: the numbers."""
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        real, imag = (_to_normal(x, _real(like)) / math.sqrt(2) for x in hashed)
        return lax.complex(real, imag)
    if _is_at_most_single(like.dtype):
        dtype, words = jnp.float32, range(hashed.shape[1])
        bits = jnp.concatenate([hashed[:, i] for i in words])[: like.size]
    else:
        dtype = jnp.float64
        high, low = hashed[:, 0].astype(jnp.uint64), hashed[:, 1].astype(jnp.uint64)
        bits = (high << jnp.uint64(32)) | low
    return _bits_to_normal(bits.reshape(like.shape), dtype)


def _bits_to_normal(bits: UInt[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    # Uniform on [1, 2), then on (-1, 1).
    unused = bits.dtype.type(jnp.finfo(dtype).bits - jnp.finfo(dtype).nmant)
    one = lax.bitcast_convert_type(jnp.ones((), dtype), bits.dtype)
    uniform = lax.bitcast_convert_type((bits >> unused) | one, dtype)
    smallest = jnp.nextafter(dtype(-1), dtype(0))
    uniform = jnp.maximum((uniform - 1) * (1 - smallest) + smallest, smallest)
    return dtype(math.sqrt(2)) * lax.erf_inv(uniform)


def _real(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, jnp.finfo(like.dtype).dtype)


def _is_at_most_single(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32


def at_least_single(x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`x`, in single precision if it was in less."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
