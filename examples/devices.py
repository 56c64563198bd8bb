"""One program on several devices, and in several processes: data parallel training.

Each device takes some rows of every batch, and makes the solves of these. What is
learned is the same on all of them, and so are the gradients that they add up, once a
step. See `docs/many_devices.md`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from matplotlib.figure import Figure


State = TypeVar("State")
Tree = TypeVar("Tree", bound=PyTree)
# The first of a device's rows of a batch, and how many the batch has; or all of them.
Rows = tuple[Int[Array, ""], int] | None
AXIS = "devices"


def num_rows(batch: int, rows: Rows) -> int:
    """How many of a batch a device has."""
    return batch if rows is None else batch // jax.lax.psum(1, AXIS)


def take(batch: Tree, rows: Rows) -> Tree:
    """The rows of a batch that are a device's."""
    if rows is None:
        return batch
    first, total = rows
    num = num_rows(total, rows)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, num), batch)


def batch_size(x: Float[Array, "rows ..."], rows: Rows) -> int:
    """Of the whole batch, of which `x` has a device's rows."""
    return len(x) if rows is None else rows[1]


def normal(
    key: PRNGKeyArray, shape: tuple[int, ...], rows: Rows
) -> Float[Array, "rows *shape"]:
    """Independent normal numbers. Those of a row do not depend on which others there
    are on a device.
    """
    if rows is not None:
        shape = (rows[1], *shape[1:])
    return take(jax.random.normal(key, shape, jnp.float32), rows)


def gather(x: Float[Array, "rows ..."], rows: Rows) -> Float[Array, "batch ..."]:
    """The whole batch, of which `x` has a device's rows: for a loss that is no sum over
    rows, which each device computes. Its gradient on a device is that in the device's
    rows only, so the gradients of devices add up.
    """
    if rows is None:
        return x
    batch = jax.lax.all_gather(jax.lax.stop_gradient(x), AXIS, tiled=True)
    return jax.lax.dynamic_update_slice_in_dim(batch, x, rows[0], axis=0)


def sum_of_devices(tree: Tree, rows: Rows) -> Tree:
    return tree if rows is None else jax.lax.psum(tree, AXIS)


def value_and_grad(loss: Callable[..., Float[Array, ""]], rows: Rows):
    """As [`equinox.filter_value_and_grad`][], added up over devices: for a loss that is
    a sum over rows of a batch, of which each device has some.
    """

    def summed(*args):
        return sum_of_devices(eqx.filter_value_and_grad(loss)(*args), rows)

    return summed


class Step(NamedTuple):
    """A compiled step of the training: see `make_step`."""

    jitted: Any  # of `equinox.filter_jit`
    data: PyTree[Any]
    place: Callable[[PyTree[Any]], PyTree[Any]]

    def __call__(self, state: State, i: int, *static: Any) -> tuple[State, Any]:
        return self.jitted(*self._args(state, i), *static)

    def lower(self, state: PyTree[Any], i: int, *static: Any):
        """What there is to compile; see [`jax.stages.Wrapped.lower`][]."""
        return self.jitted.lower(*self._args(state, i), *static)

    def _args(self, state, i):
        return self.place(state), self.data, self.place(jnp.asarray(i))


def make_step(
    step: Callable[..., tuple[State, Float[Array, ""]]],
    data: PyTree[Any],
    batch: int,
    devices: int,
) -> Step:
    """`step`, compiled, as a function of the state, the number `i` of the step and what
    is `static`; on each of several devices for a part of the batch.

    It is called as `step(state, data, i, rows, *static)`, with the device's rows of the
    batch, and returns the next state and the loss, the same on all devices. So that
    these do not depend on how many there are, its random numbers are to be those of
    rows of the batch; and the gradients and losses of devices are to be added up, all
    at once.
    """
    if devices == 1 and jax.process_count() == 1:
        on_one = lambda state, data, i, *static: step(state, data, i, None, *static)
        return Step(eqx.filter_jit(on_one), data, lambda tree: tree)
    if not 1 <= devices <= jax.device_count():
        raise ValueError(f"`devices`: there are {jax.device_count()}, not {devices}.")
    if batch % devices != 0:
        raise ValueError(
            f"`devices`: {batch} rows are not the same number on each of {devices}."
        )
    if devices != jax.device_count() and jax.process_count() > 1:
        raise ValueError(
            f"`devices`: all {jax.device_count()} of the processes are to be used, not "
            f"{devices}."
        )
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(tree):
        return jax.tree.map(lambda x: _place(x, everywhere), tree)

    def on_all(state, data, i, *static):
        arrays, others = eqx.partition((state, data, i), eqx.is_array)

        def on_device(arrays):
            first = jax.lax.axis_index(AXIS) * (batch // devices)
            args = eqx.combine(arrays, others)
            state, loss = step(*args, (first, batch), *static)
            new = eqx.filter(state, eqx.is_array)
            # A solve that fails is not a number here, not an error: the others wait.
            leaves = jax.tree.leaves(eqx.filter(new, eqx.is_inexact_array))
            is_finite = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in leaves]))
            return new, jnp.where(is_finite, loss, jnp.nan)

        # It is not checked what is the same on all devices, as `diffeqsolve` has
        # conditionals of which only one branch depends on the device.
        new, loss = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(arrays)
        return eqx.combine(new, others[0]), loss

    return Step(eqx.filter_jit(on_all), place(data), place)


def _place(x: Any, everywhere: NamedSharding) -> Any:
    """An array, the same on all devices. Each process has one, on its own."""
    if not eqx.is_array(x) or x.sharding == everywhere:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(x), everywhere))
    values = np.asarray(x)
    return jax.make_array_from_callback(x.shape, everywhere, lambda i: values[i])


def on_one_device(tree: Tree) -> Tree:
    """Arrays that are the same on all devices, on the first of this process."""

    def to_one(x):
        if eqx.is_array(x) and len(x.sharding.device_set) > 1:
            return x.addressable_data(0)
        return x

    return jax.tree.map(to_one, tree)


def of_first_process(tree: Tree) -> Tree:
    """Arrays that the first of several processes has, for all of them."""
    if jax.process_count() == 1:
        return tree
    is_array = lambda x: eqx.is_array(x) or isinstance(x, np.ndarray)
    arrays, others = eqx.partition(tree, is_array)
    sent = multihost_utils.broadcast_one_to_all(arrays)
    # They come as arrays of NumPy.
    alike = lambda x, y: jnp.asarray(x) if eqx.is_array(y) else np.asarray(x)
    return eqx.combine(jax.tree.map(alike, sent, arrays), others)


def is_first_process() -> bool:
    """Whether this one prints, and writes files."""
    return jax.process_index() == 0


def say(text: str):
    if is_first_process():
        print(text)


def save_figure(figure: Figure, path: Path):
    if is_first_process():
        figure.savefig(path, dpi=150)
    plt.close(figure)
