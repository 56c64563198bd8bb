"""Arithmetic in twice the precision of a floating-point number.

A number is the sum of two, the rounded one and a small one. Products are of halves of
the digits, and so exact whether or not a compiler fuses them with a sum.
"""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float


def divide_differences(
    t: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`(t - a) / (b - a)`, rounded, and what it is more than that."""
    x, x_error = _subtract(t, a)
    y, y_error = _subtract(b, a)
    quotient = x / y
    # `x - quotient * y`, exactly.
    (q0, q1), (y0, y1) = _halve_digits(quotient), _halve_digits(y)
    remainder = (((x - q0 * y0) - q0 * y1) - q1 * y0) - q1 * y1
    return quotient, (remainder + (x_error - quotient * y_error)) / y


def _subtract(
    a: Float[Array, "..."], b: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`a - b`, rounded, and the error of rounding."""
    difference = a - b
    rounded_b = a - difference
    return difference, (a - (difference + rounded_b)) + (rounded_b - b)


def _halve_digits(
    x: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`x` as a sum of two numbers with half as many binary digits."""
    info = jnp.finfo(x.dtype)
    upper = lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)
    return upper, x - upper
