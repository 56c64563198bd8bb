"""The algebra of Brownian increments: `W`, `H` and `K`.

Over an interval of length `h`, with `x` in `[0, 1]` the position within it, a path with
white noise `dW` has

    W = int dW,    H = int (1/2 - x) dW,    K = int (1/12 - x (1 - x) / 2) dW

its increment, space-time Lévy area and space-time-time Lévy area. The three kernels are
multiples of the first three Legendre polynomials, hence orthogonal: `W`, `H` and `K`
are independent, with variances `h`, `h / 12` and `h / 720`. All that follows is algebra
of these polynomials. How many of the three are known of an interval is the number of
its *components*.

**Embed**: what a part contributes to the whole. If the part has its midpoint at
`y + 1/2` and width `w`, in units of the whole, then position `x'` in the part is
`x = y + 1/2 + w (x' - 1/2)` in the whole. Written in `x'`, the kernels of the whole are
combinations of those of the part. Two adjacent intervals *join* as what each of them
contributes.

**Restrict**: the mean of a part, given the whole. Given `W`, `H` and `K`, white noise
has the mean `W + 12 H (1/2 - x) + 720 K (1/12 - x (1 - x) / 2)`, as the squared norms
of the kernels are 1, 1/12 and 1/720. What is returned are the components of this
polynomial over the part.

**Split**: the components of the halves of an interval are these means, plus what is not
known from the whole. This has as many dimensions as there are components, so is made of
as many independent normal numbers; reflecting the interval maps each of them to itself
up to sign, which nearly determines them (`halves`). For `[W, H]` this is Theorem 6.1.6
of Foster (2020), for `[W, H, K]` it is in Jelinčić, Foster and Kidger (2024), both
cited at `BrownianInterval`. Splitting without end expands white noise in an orthonormal
basis of piecewise polynomials: Haar's for `[W]`, for the others the multiwavelets of
Alpert (A class of bases in L2 for the sparse representation of integral operators, SIAM
Journal on Mathematical Analysis 24, 1993).

The split at a point other than the midpoint is in `leaf_bridge.py`.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Key, PyTree

from .draws import Rows, draw


# The standard deviations of `W`, `H` and `K` over an interval of length one.
stds: tuple[float, float, float] = (1.0, 1 / math.sqrt(12), 1 / math.sqrt(720))

# The left one of the `halves`, by the number of components. In the right one these are
# multiplied by the `_signs`.
_left_half: dict[int, list[list[float]]] = {
    1: [[1 / 2]],
    2: [[1 / 4, 0], [-1 / 8, 1 / math.sqrt(48)]],
    3: [
        [1 / 4, 0, 0],
        [-1 / 8, 1 / math.sqrt(768), 0],
        [0, -1 / math.sqrt(3072), 1 / math.sqrt(2880)],
    ],
}
_signs = np.array([[-1, 0, 0], [1, -1, 0], [0, 1, -1]])


class Increment(eqx.Module):
    """The components of an interval of length `dt`, stacked along the first axis of
    each array. In single precision at least, as those of long intervals are sums.
    """

    dt: Float[Array, ""]
    components: PyTree[Array]


def sample(
    key: Key[Array, ""],
    dt: Float[Array, ""],
    like: PyTree[jax.ShapeDtypeStruct],
    rows: Rows | None,
) -> Increment:
    """An interval of length `dt`, of which nothing else is known."""

    def scale(z):
        std = jnp.sqrt(dt) * jnp.asarray(stds[: len(z)], dt.dtype)
        return z * std.reshape(-1, *(1,) * (z.ndim - 1)).astype(z.dtype)

    return Increment(dt, jtu.tree_map(scale, draw(key, like, rows)))


def join(left: Increment, right: Increment) -> Increment:
    """The union of two adjacent intervals."""
    dt = left.dt + right.dt
    fraction = left.dt / jnp.where(dt > 0, dt, 1)

    def join_leaf(x, y):
        if len(x) == 1:
            return x + y
        a = fraction.astype(x.dtype)
        contributions = zip(
            embed(list(x), a / 2, a), embed(list(y), (1 + a) / 2, 1 - a), strict=True
        )
        return jnp.stack([x + y for x, y in contributions])

    return Increment(dt, jtu.tree_map(join_leaf, left.components, right.components))


def add_constant(inc: Increment, constant: PyTree[Inexact[Array, "..."]]) -> Increment:
    """A path whose white noise is larger by a constant: its `W` is, by the constant
    times `dt`, and the kernels of `H` and `K` have mean zero.
    """

    def add_leaf(x, c):
        return x.at[0].add(inc.dt.astype(x.dtype) * c)

    return Increment(inc.dt, jtu.tree_map(add_leaf, inc.components, constant))


def reverse_if(pred: Bool[Array, ""], inc: Increment) -> Increment:
    """If `pred`, the interval gone through from right to left: `dW` changes its sign,
    and so do `W` and `K`, but not `H`, whose kernel does as well.
    """
    sign = jnp.where(pred, -1.0, 1.0)

    def reverse_leaf(x):
        signs = jnp.where(np.arange(len(x)) == 1, 1.0, sign).astype(x.dtype)
        return x * signs.reshape(-1, *(1,) * (x.ndim - 1))

    dt = inc.dt * sign.astype(inc.dt.dtype)
    return Increment(dt, jtu.tree_map(reverse_leaf, inc.components))


def halve(
    whole: Increment, numbers: PyTree[Array], is_right: Bool[Array, ""]
) -> Increment:
    """The left or the right half of an interval, given the interval and as many
    standard normal numbers as there are components.
    """

    def halve_leaf(x, z):
        dtype = x.dtype
        left, right = halves(len(x))
        coefs = jnp.where(is_right, right, left).astype(dtype)
        coefs = coefs * jnp.sqrt(whole.dt).astype(dtype)
        mid = jnp.where(is_right, 0.75, 0.25).astype(dtype)
        new = [sum(c * y for c, y in zip(row, z, strict=True)) for row in coefs]
        mean = restrict(list(x), mid, 0.5)
        return jnp.stack([x + y for x, y in zip(mean, new, strict=True)])

    components = jtu.tree_map(halve_leaf, whole.components, numbers)
    return Increment(whole.dt / 2, components)


def embed(part: list[Any], mid: Any, width: Any) -> list[Any]:
    """What a part of an interval contributes to the components of the interval.

    `mid` and `width` are the midpoint and the width of the part, in units of the
    interval.
    """
    y = mid - 0.5
    w, h, k = [*part, None, None][:3]
    out = [w]
    if h is not None:
        out.append(width * h - y * w)
    if k is not None:
        curvature = 0.5 * (y**2 + (width**2 - 1) / 12)
        out.append(width**2 * k - width * y * h + curvature * w)
    return out


def restrict(whole: list[Any], mid: Any, width: Any) -> list[Any]:
    """The mean of the components of a part, given those of the interval.

    Arguments are as for `embed`.
    """
    y = mid - 0.5
    w, h, k = [*whole, None, None][:3]
    if k is not None:
        w = w + (360 * y**2 + 30 * (width**2 - 1)) * k
    if h is not None:
        w = w - 12 * y * h
    out = [width * w]
    if h is not None:
        out.append(width**2 * (h if k is None else h - 60 * y * k))
    if k is not None:
        out.append(width**3 * k)
    return out


def halves(num: int) -> Float[np.ndarray, "halves num num"]:
    """What is new in the halves of an interval of length one: the coefficients of `num`
    standard normal numbers (last axis) in `num` components (second axis).
    """
    left = np.array(_left_half[num])
    return np.stack([left, left * _signs[:num, :num]])
