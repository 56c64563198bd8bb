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
    rows: _Rows,
    *,
    index: Callable[[_Carry], IntScalarLike],
    length: int | None,
    buffers: Callable[[_Carry], PyTree[Array]] = lambda carry: (),
) -> tuple[_Carry, _Rows]:
    """`body_fun`, which takes and returns what is carried, and a row that is written to
    `rows`: as long as `cond_fun` holds, row `index` of what is carried. If it is known
    that rows `0`, ..., `length - 1` are all that is written, and there are no others,
    the loop is a `lax.scan`: with `jax.vmap`, this keeps the rows of a batch together,
    where other loops keep those of an element. Of what is carried, `buffers` are
    written in place.
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
        (init, rows),
        buffers=lambda val: (buffers(val[0]), val[1]),
        kind="lax",
    )


def set_row(rows: _Rows, i: IntScalarLike, row: _Rows) -> _Rows:
    """`rows`, with `row` written to row `i`."""
    # The new tree goes first, as buffers are trees themselves.
    return jtu.tree_map(lambda x, xs: xs.at[i].set(x), row, rows)
