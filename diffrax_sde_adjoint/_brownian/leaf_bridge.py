"""Splitting an interval anywhere: what is new at a point, given the whole interval.

Given the components of the interval, a leaf of a cell, what is new is a path `R` that
is zero at both ends, as are its integrals `R_1 = int R` and `R_2 = int R_1`, as far as
these are known. Only the law at single points is needed, as one query has at most one
end in the leaf if it is longer than the resolution of the path. So `R` can be made of
as many normal numbers as there are components, where Brownian motion needs infinitely
many.

There is a smooth such path. With `f` in `[0, 1]`, `p = f (1 - f)` and
`u = log(f / (1 - f))`, in an interval of length one,

    [W]:        R   = p^(1/2) z_1
    [W, H]:     R_1 = p^(3/2) Re(e^(i omega u) (z_1 - i z_2)) / sqrt(3),
                omega^2 = 3/4
    [W, H, K]:  R_2 = p^(5/2) (sqrt(16/345) z_1
                               + sqrt(1/276) Re(e^(i omega u) (z_2 - i z_3))),
                omega^2 = 23/4

and the others are derivatives of these, by `d/df p^k e^(i omega u) =
p^(k - 1) (k (1 - 2 f) + i omega) e^(i omega u)`. They have the covariance of Brownian
motion at each `f`. (The exponents and `omega` follow from scaling. Near the left end,
`R_n` is a sum of terms `f^(n + 1/2) cos(omega log f)`, and its variances have to be
those of integrals of Brownian motion, 1, 1/3 and 1/20 times powers of `f`: with `k =
1/2, 3/2, 5/2` as unknown, `sum_j a_j^2 / (k^2 + omega_j^2) = 1 / (2 k)` is a polynomial
whose roots are given. The map `f -> f / (1 - f)` then takes the half line to the
interval, as `(1 - f)^(2 n + 1) B_n(f / (1 - f))` is `n`-fold integrated Brownian motion
`B_n` that is pinned at `f = 1`.)

Any other rotation of the normal numbers, as a function of the point, has the right law
at each point too. But then what is between two points in the interval is not the
increment of any path, and has an `H` and `K` that grow as the points get closer. Here
they are those of a smooth path.
"""

import functools as ft
import math

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


# For each number of components, the terms of the highest integral: amplitude and
# frequency. A term of frequency zero takes one normal number, others two.
_terms: dict[int, list[tuple[float, float]]] = {
    1: [(1.0, 0.0)],
    2: [(math.sqrt(1 / 3), math.sqrt(3 / 4))],
    3: [(math.sqrt(16 / 345), 0.0), (math.sqrt(1 / 276), math.sqrt(23 / 4))],
}
_points, _weights = np.polynomial.legendre.leggauss(8)
_points, _weights = (_points + 1) / 2, _weights / 2


def bridge(
    a: Float[Array, "*batch"], b: Float[Array, "*batch"], num: int
) -> list[Float[Array, "*batch num"]]:
    """What is new in `[a, b]`, a part of `[0, 1]`, given the components of `[0, 1]`.

    Returns the components over `[a, b]`: of each, the coefficients of `num` independent
    standard normal numbers.
    """
    a, b = a[..., None], b[..., None]
    h = b - a
    at_a, at_b = _integrals(a, num), _integrals(b, num)
    # The integrals of ((b - t) / h)^n / n! times the white noise at t.
    inverse = 1 / jnp.where(h > 0, h, 1)
    w = at_b[0] - at_a[0]
    if num == 1:
        return [w]
    first = (at_b[1] - at_a[1]) * inverse - at_a[0]
    differences = [w, first - w / 2]
    if num == 3:
        second = ((at_b[2] - at_a[2]) * inverse - at_a[1]) * inverse - at_a[0] / 2
        differences.append(second - first / 2 + w / 12)

    # Differences cancel if `h` is small, but then the white noise is a polynomial, up
    # to rounding. This needs many more values, and is rarely needed.
    is_small = h <= 0.5 * jnp.minimum(a, 1 - b)

    def integrate():
        x = jnp.asarray(_points, h.dtype)
        f = a[..., None] + h[..., None] * x[:, None]
        path = lambda f: _integrals(f, num)[0]
        _, noise = jax.jvp(path, (f,), (jnp.ones_like(f),))
        kernels = [jnp.ones_like(x), 0.5 - x, 1 / 12 - 0.5 * x * (1 - x)][:num]
        weights = jnp.stack(kernels) * jnp.asarray(_weights, h.dtype)
        integrals = [h * jnp.sum(w[:, None] * noise, axis=-2) for w in weights]
        return list(map(ft.partial(jnp.where, is_small), integrals, differences))

    return lax.cond(jnp.any(is_small), integrate, lambda: differences)


def _integrals(
    f: Float[Array, "*batch 1"], num: int
) -> list[Float[Array, "*batch num"]]:
    """The new path at `f`, and its integrals up to there."""
    p = f * (1 - f)
    v = 1 - 2 * f
    tiny = jnp.finfo(f.dtype).tiny
    root = jnp.where(p > tiny, jnp.sqrt(jnp.maximum(p, tiny)), 0)
    log_ratio = jnp.log(jnp.maximum(f, tiny)) - jnp.log(jnp.maximum(1 - f, tiny))

    out = [[] for _ in range(num)]
    for amplitude, omega in _terms[num]:
        if omega == 0:
            highest = (jnp.ones_like(f), jnp.zeros_like(f))
        else:
            highest = (jnp.cos(omega * log_ratio), jnp.sin(omega * log_ratio))
        # Real and imaginary part of the highest integral over its power of `p`, then
        # those of its derivatives.
        factors = [highest]
        if num > 1:
            factors.append(_times(highest, (num - 0.5) * v, omega))
        if num > 2:
            re, im = _times(factors[1], (num - 1.5) * v, omega)
            inner = (2 * num - 1) * p
            factors.append((re - inner * highest[0], im - inner * highest[1]))
        for n, parts in enumerate(reversed(factors)):
            power = amplitude * root ** (2 * n + 1)
            # Without an oscillation there is no imaginary part.
            out[n] += [power * x for x in (parts if omega else parts[:1])]
    return [jnp.concatenate(x, axis=-1) for x in out]


def _times(
    z: tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]],
    re: Float[Array, "*batch 1"],
    im: float,
) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """The product of the complex numbers `z` and `re + i im`."""
    return z[0] * re - z[1] * im, z[0] * im + z[1] * re
