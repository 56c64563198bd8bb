"""Loops that write a row of arrays in each iteration."""

from collections.abc import Callable
from typing import TypeVar

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._compat import IntScalarLike, while_loop


_Carry = TypeVar("_Carry")
_Rows = TypeVar("_Rows", bound=PyTree[Array | None])


def loop_over_rows(
    cond_fun: Callable[[_Carry], Bool[Array, ""]],
    body_fun: Callable[[_Carry], tuple[_Carry, _Rows]],
    init: _Carry,
    empty: Callable[[], _Rows],
    *,
    index: Callable[[_Carry], IntScalarLike],
    length: int | None,
    buffers: Callable[[_Carry], PyTree[Array]] = lambda carry: (),
) -> tuple[_Carry, _Rows]:
    """Calls `body_fun` while `cond_fun` holds, both of what is carried. `body_fun` also
    returns a row, which is written to row `index` of arrays that are `empty` at first.
    Of what is carried, `buffers` are written in place.

    If it is known that rows `0`, ..., `length - 1` are written, and there are no
    others, none of the rest is used. The loop is then a `lax.scan`, which with
    `jax.vmap` keeps a row of all elements together. Other loops keep all rows of an
    element together, and write a row in as many pieces as there are elements.
    """
    if length is not None:
        init = jtu.tree_map(jnp.asarray, init)
        return lax.scan(lambda carry, _: body_fun(carry), init, length=length)

    def write_row(val):
        carry, rows = val
        i = index(carry)
        carry, row = body_fun(carry)
        return carry, set_row(rows, i, row)

    return while_loop(
        lambda val: cond_fun(val[0]),
        write_row,
        (init, empty()),
        buffers=lambda val: (buffers(val[0]), val[1]),
        kind="lax",
    )


def set_row(rows: _Rows, i: IntScalarLike, row: _Rows) -> _Rows:
    """`rows`, with `row` written to row `i`."""
    # The new tree goes first, as buffers are trees themselves.
    return jtu.tree_map(lambda x, xs: xs.at[i].set(x), row, rows)


def repeated(row: _Rows, num: int) -> _Rows:
    """Rows that are all `row`."""
    return jtu.tree_map(lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), row)
