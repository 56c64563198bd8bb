"""Terms as they are on the way from right to left: a solver that is asked for a step
from `t1` to `t0` with these goes back along the path that it came on.
"""

import dataclasses
from typing import Any

import diffrax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import Args, RealScalarLike, Y
from .base import AbstractForwardingTerm, is_single_term


def reversed_control(control: PyTree[Any]) -> PyTree[Any]:
    r"""The control over an interval, for going through it from right to left.

    An increment changes its sign, and so does the length of the interval. Of the Lévy
    areas of Brownian motion $W$ over $[s, t]$, with $h = t - s$, both are integrals of
    the bridge $B_r = W_r - W_s - \frac{r - s}{h} (W_t - W_s)$,

    $H = \frac{1}{h} \int_s^t B_r\,\mathrm{d}r, \qquad
    K = \frac{1}{h^2} \int_s^t B_r \left(\frac{s + t}{2} - r\right) \mathrm{d}r$.

    The bridge is the same from right to left, as it is zero at both ends. So $H$ stays
    as it is, and $K$ changes its sign.
    """
    is_noise = lambda x: isinstance(x, diffrax.AbstractBrownianIncrement)

    def reverse(x):
        if not is_noise(x):
            return -x
        names = {field.name for field in dataclasses.fields(x)}
        if not names <= {"dt", "W", "H", "K"}:
            raise ValueError(
                f"It is not known what becomes of `{type(x).__name__}` when a solve is "
                "gone through from right to left. Use a Brownian path whose "
                "`levy_area` is `diffrax.BrownianIncrement`, "
                "`diffrax.SpaceTimeLevyArea` or `diffrax.SpaceTimeTimeLevyArea`."
            )
        changes = {
            name: jtu.tree_map(lambda leaf: -leaf, getattr(x, name))
            for name in names - {"H"}
        }
        return dataclasses.replace(x, **changes)

    return jtu.tree_map(reverse, control, is_leaf=is_noise)


class _Reversed(AbstractForwardingTerm):
    """A term, whose control from `t1` to `t0` is that from `t0` to `t1`, reversed."""

    term: diffrax.AbstractTerm

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> PyTree:
        return reversed_control(self.term.contr(t1, t0, **kwargs))

    def is_vf_expensive(
        self, t0: RealScalarLike, t1: RealScalarLike, y: Y, args: Args
    ) -> bool:
        return self.term.is_vf_expensive(t1, t0, y, args)


def reversed_terms(terms: PyTree[diffrax.AbstractTerm]) -> PyTree[diffrax.AbstractTerm]:
    """`terms`, for a step from `t1` to `t0`."""
    return jtu.tree_map(_Reversed, terms, is_leaf=is_single_term)
