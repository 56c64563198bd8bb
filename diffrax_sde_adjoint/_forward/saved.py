"""What a solve has saved, as it is in the state of its loop."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int

from .._compat import SaveState, State


def get_subs(saveat: diffrax.SaveAt) -> list[diffrax.SubSaveAt]:
    """All that there is to be saved, in the order of `get_save_states`."""
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
    return jtu.tree_leaves(saveat.subs, is_leaf=is_sub)


def get_save_states(state: State) -> list[SaveState]:
    is_save_state = lambda x: isinstance(x, SaveState)
    leaves = jtu.tree_leaves(state.save_state, is_leaf=is_save_state)
    return [x for x in leaves if is_save_state(x)]


class Position(eqx.Module):
    """How far a `SubSaveAt` had come: the number of its `ts`, and that of all of its
    outputs, which were saved before the end of a step.
    """

    ts_index: Int[Array, ""]
    save_index: Int[Array, ""]


def get_positions(state: State) -> list[Position]:
    return [
        Position(jnp.asarray(x.saveat_ts_index), jnp.asarray(x.save_index))
        for x in get_save_states(state)
    ]


def get_saved(state: State) -> tuple[list[tuple[Any, Any]], Any]:
    """What there may be of it before the first step."""
    return [(x.ys, x.ts) for x in get_save_states(state)], state.dense_ts


def cotangents_of_earlier(
    num_saved: list[Any], final_state: State, grad_final_state: State
) -> tuple[list[tuple[Any, Any]], Any]:
    """The cotangents of `get_saved` of the initial state, when each `SubSaveAt` had
    saved `num_saved`. What was saved within the steps is dealt with elsewhere.
    """

    def is_kept(grad, first, end):
        index = jnp.arange(len(grad)).reshape((-1,) + (1,) * (grad.ndim - 1))
        return (index < first) | (index >= end)

    grad_saved, grad_dense_ts = get_saved(grad_final_state)
    grad_saved = [
        jtu.tree_map(
            lambda g, i=i, x=x: jnp.where(is_kept(g, i, x.save_index), g, 0), grad
        )
        for grad, i, x in zip(
            grad_saved, num_saved, get_save_states(final_state), strict=True
        )
    ]
    num_steps = final_state.dense_save_index
    if grad_dense_ts is not None and num_steps is not None:
        is_start = is_kept(grad_dense_ts, 1, num_steps + 1)
        grad_dense_ts = jnp.where(is_start, grad_dense_ts, 0)
    return grad_saved, grad_dense_ts
