"""The cost of the noise of one step: a query of a Brownian path over one of its cells.

The limit is one draw of normal numbers from a key of the step's own, without which
there is no path that can be drawn again.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from timing import interleaved_minima

from diffrax_sde_adjoint import BrownianInterval


_num_cells = 1000
_dt = 1 / _num_cells
# From a shape to the number of queries that are timed together: enough for starting the
# compiled program not to matter.
_num_queries: dict[tuple[int, ...], int] = {
    (): 1000,
    (64,): 1000,
    (1024,): 200,
    (256, 128): 10,
}

# From a step's index, start and end to its noise.
_Query = Callable[[Int[Array, ""], Float[Array, ""], Float[Array, ""]], PyTree[Any]]


def _sum_of_queries(
    make_query: Callable[[PRNGKeyArray, tuple[int, ...]], _Query],
    shape: tuple[int, ...],
) -> Callable[[PRNGKeyArray], Float[Array, "..."]]:
    """Queries step after step, and uses the results. All paths are given this one loop,
    which has the times of a step at hand, as the loop of a solve does.
    """

    # Not a scan over an array of times: if a loop touches an array of more than 512
    # bytes, XLA schedules its body asynchronously on the CPU, which takes longer than a
    # draw of a single number. That would be unfair to the keyed draw.
    @jax.jit
    def run(key):
        query = make_query(key, shape)

        def step(i, carry):
            t0, total = carry
            t1 = (i + 1).astype(jnp.float32) / jnp.float32(_num_cells)
            return t1, total + query(i, t0, t1)

        init = (jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32))
        return lax.fori_loop(0, _num_queries[shape], step, init)

    return run


def _brownian_interval(key: PRNGKeyArray, shape: tuple[int, ...]) -> _Query:
    path = BrownianInterval(
        jnp.float32(0),
        jnp.float32(1),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        key,
        dt=jnp.float32(_dt),
    )
    return lambda i, t0, t1: path.evaluate(t0, t1)


def _virtual_brownian_tree(key: PRNGKeyArray, shape: tuple[int, ...]) -> _Query:
    path = diffrax.VirtualBrownianTree(
        jnp.float32(0),
        jnp.float32(1),
        tol=_dt / 2,
        shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        key=key,
    )
    return lambda i, t0, t1: path.evaluate(t0, t1)


def _keyed_draw(key: PRNGKeyArray, shape: tuple[int, ...]) -> _Query:
    std = jnp.sqrt(jnp.float32(_dt))
    return lambda i, t0, t1: jr.normal(jr.fold_in(key, i), shape, jnp.float32) * std


def _torchsde_queries(shape: tuple[int, ...]) -> Callable[[], Any] | None:
    try:
        import torch
        import torchsde
    except ImportError:
        return None

    def run():
        # Made anew, as it remembers what it was asked.
        path = torchsde.BrownianInterval(
            0.0, 1.0, size=shape, dtype=torch.float32, dt=_dt
        )
        total = torch.zeros(shape, dtype=torch.float32)
        for i in range(_num_queries[shape]):
            increment = path(i / _num_cells, (i + 1) / _num_cells)
            assert isinstance(increment, torch.Tensor)
            total += increment
        return total

    return run


@pytest.mark.parametrize("shape", _num_queries, ids=str)
def test_on_grid_query(shape, record_row):
    key = jr.key(0)

    def timed(make_path):
        run = _sum_of_queries(make_path, shape)
        return lambda: run(key)

    functions = {
        "BrownianInterval": timed(_brownian_interval),
        "keyed draw": timed(_keyed_draw),
        "VirtualBrownianTree": timed(_virtual_brownian_tree),
    }
    if (torchsde_queries := _torchsde_queries(shape)) is not None:
        functions["torchsde"] = torchsde_queries
    times = interleaved_minima(functions)

    ours = times["BrownianInterval"]
    over_draw = ours / times["keyed draw"]
    tree_over_ours = times["VirtualBrownianTree"] / ours
    microseconds = {
        f"{k}, µs": f"{1e6 * t / _num_queries[shape]:.2f}" for k, t in times.items()
    }
    record_row(
        "Noise of one step, float32",
        {
            "shape": str(shape),
            **microseconds,
            "BrownianInterval / draw": f"{over_draw:.2f}",
            "VirtualBrownianTree / BrownianInterval": f"{tree_over_ours:.1f}",
        },
    )
    assert over_draw <= 1.3
    assert tree_over_ours >= 20
