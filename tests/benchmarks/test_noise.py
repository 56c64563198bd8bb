"""The cost of a query of a Brownian path: over one of its cells, and over any interval.

The limit of the former is one draw of normal numbers from a key of the step's own,
without which there is no path that can be drawn again. Beside the cost, how right the
variance of tiny steps in single precision is.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from timing import interleaved_minima

from diffrax_sde_adjoint import BrownianInterval


_num_cells = 1000
_dt = 1 / _num_cells
# From a shape to the number of queries that are timed together: enough for starting the
# compiled program not to matter.
_num_queries: dict[tuple[int, ...], int] = {
    (): 900,
    (64,): 900,
    (1024,): 200,
    (256, 128): 10,
}

_LevyArea: TypeAlias = type[diffrax.BrownianIncrement | diffrax.SpaceTimeLevyArea]
_levy_areas: dict[str, _LevyArea] = {
    "W": diffrax.BrownianIncrement,
    "W, H": diffrax.SpaceTimeLevyArea,
}
# From a step's index, start and end to its noise.
_Query: TypeAlias = Callable[
    [Int[Array, ""], Float[Array, ""], Float[Array, ""]], PyTree[Any]
]
_MakeQuery: TypeAlias = Callable[[PRNGKeyArray, jax.ShapeDtypeStruct], _Query]


def _time_queries(
    makers: dict[str, _MakeQuery],
    shape: tuple[int, ...],
    *,
    dt: float = _dt,
    offset: float = 0.0,
    others: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, float]:
    """The time of a query in microseconds: of steps of length `dt` from `offset` on.

    Queries step after step, and uses the results. All paths are given this one loop,
    which has the times of a step at hand, as the loop of a solve does.
    """
    # As many at a time as there is time, and then over again.
    num_at_a_time = min(_num_queries[shape], round(0.9 / dt))
    num_times = _num_queries[shape] // num_at_a_time

    # Not a scan over an array of times: if a loop touches an array of more than 512
    # bytes, XLA schedules its body asynchronously on the CPU, which takes longer than a
    # draw of a single number. That would be unfair to the keyed draw.
    def sum_of_queries(make_query):
        @jax.jit
        def run(key):
            query = make_query(key, jax.ShapeDtypeStruct(shape, jnp.float32))
            time = lambda i: i.astype(jnp.float32) * jnp.float32(dt) + offset

            def step(i, carry):
                t0, total = carry
                t1 = time(i + 1)
                return t1, jtu.tree_map(jnp.add, total, query(i, t0, t1))

            def steps(_, total):
                return lax.fori_loop(0, num_at_a_time, step, (time(zero), total))[1]

            zero = jnp.zeros((), jnp.int32)
            out = jax.eval_shape(lambda: query(zero, time(zero), time(zero + 1)))
            total = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), out)
            return lax.fori_loop(0, num_times, steps, total)

        return lambda: run(jr.key(0))

    functions = {name: sum_of_queries(make) for name, make in makers.items()}
    times = interleaved_minima(functions | (others or {}))
    num = num_at_a_time * num_times
    return {name: 1e6 * time / num for name, time in times.items()}


def _brownian_interval(levy_area: _LevyArea, dt: float = _dt) -> _MakeQuery:
    def make_query(key, struct):
        path = BrownianInterval(
            jnp.float32(0),
            jnp.float32(1),
            struct,
            key,
            dt=jnp.float32(dt),
            levy_area=levy_area,
        )
        use_levy = levy_area is not diffrax.BrownianIncrement
        return lambda i, t0, t1: path.evaluate(t0, t1, use_levy=use_levy)

    return make_query


def _virtual_brownian_tree(levy_area: _LevyArea, tol: float) -> _MakeQuery:
    def make_query(key, struct):
        path = diffrax.VirtualBrownianTree(
            jnp.float32(0), jnp.float32(1), tol, struct, key, levy_area=levy_area
        )
        use_levy = levy_area is not diffrax.BrownianIncrement
        return lambda i, t0, t1: path.evaluate(t0, t1, use_levy=use_levy)

    return make_query


def _keyed_draw(levy_area: _LevyArea) -> _MakeQuery:
    num = list(_levy_areas.values()).index(levy_area) + 1
    std = jnp.sqrt(jnp.float32(_dt))

    def make_query(key, struct):
        # As many numbers as the increment has.
        shape = struct.shape if num == 1 else (num, *struct.shape)
        return lambda i, t0, t1: (
            jr.normal(jr.fold_in(key, i), shape, struct.dtype) * std
        )

    return make_query


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


@pytest.mark.parametrize("levy_area", _levy_areas.values(), ids=_levy_areas)
@pytest.mark.parametrize("shape", _num_queries, ids=str)
def test_on_grid_query(shape, levy_area, record_row):
    only_w = levy_area is diffrax.BrownianIncrement
    torchsde_queries = _torchsde_queries(shape) if only_w else None
    times = _time_queries(
        {
            "BrownianInterval": _brownian_interval(levy_area),
            "keyed draw": _keyed_draw(levy_area),
            "VirtualBrownianTree": _virtual_brownian_tree(levy_area, _dt / 2),
        },
        shape,
        others={"torchsde": torchsde_queries} if torchsde_queries else {},
    )
    ours = times["BrownianInterval"]
    over_draw = ours / times["keyed draw"]
    tree_over_ours = times["VirtualBrownianTree"] / ours
    record_row(
        "Noise of one step of the grid, float32"
        + ("" if only_w else ", with space-time Lévy area"),
        {
            "shape": str(shape),
            **{f"{k}, µs": f"{t:.2f}" for k, t in times.items()},
            "BrownianInterval / draw": f"{over_draw:.2f}",
            "VirtualBrownianTree / BrownianInterval": f"{tree_over_ours:.1f}",
        },
    )
    assert over_draw <= 1.3 or not only_w
    assert tree_over_ours >= 20


@pytest.mark.parametrize("levy_area", _levy_areas.values(), ids=_levy_areas)
@pytest.mark.parametrize("resolution", (1e-5, 1e-6), ids=str)
@pytest.mark.parametrize("shape", _num_queries, ids=str)
def test_off_grid_query(shape, resolution, levy_area, record_row):
    """At equal resolution, with cells as long as the queries, and shifted."""
    # The resolution of `BrownianInterval` is `dt / 2**10`.
    dt = 1e3 * resolution
    times = _time_queries(
        {
            "BrownianInterval": _brownian_interval(levy_area, dt),
            "VirtualBrownianTree": _virtual_brownian_tree(levy_area, resolution),
        },
        shape,
        dt=dt,
        offset=0.37 * dt,
    )
    tree_over_ours = times["VirtualBrownianTree"] / times["BrownianInterval"]
    only_w = levy_area is diffrax.BrownianIncrement
    record_row(
        "Noise of a step off the grid, float32"
        + ("" if only_w else ", with space-time Lévy area"),
        {
            "shape": str(shape),
            "resolution": str(resolution),
            **{f"{k}, µs": f"{t:.2f}" for k, t in times.items()},
            "VirtualBrownianTree / BrownianInterval": f"{tree_over_ours:.1f}",
        },
    )
    assert tree_over_ours >= (8 if shape == () else 3)


def test_variance_of_tiny_steps(record_row):
    """Steps of ten units of rounding, at time 10 of 20, in single precision."""
    f32 = jnp.float32
    t0, t1 = f32(10), f32(10) + f32(1e-5)
    struct = jax.ShapeDtypeStruct((1000,), f32)
    paths = {
        "BrownianInterval(dt=0.1, levels=16)": lambda key: BrownianInterval(
            f32(0), f32(20), struct, key, dt=f32(0.1), levels=16
        ),
        "BrownianInterval(levels=24)": lambda key: BrownianInterval(
            f32(0), f32(20), struct, key, levels=24
        ),
        "VirtualBrownianTree(tol=1e-6)": lambda key: diffrax.VirtualBrownianTree(
            f32(0), f32(20), 1e-6, struct, key
        ),
    }
    errors = {}
    for name, make_path in paths.items():
        evaluate = lambda key, make_path=make_path: make_path(key).evaluate(t0, t1)
        increments = jax.jit(jax.vmap(evaluate))(jr.split(jr.key(0), 500))
        variance = np.mean(np.asarray(increments, np.float64) ** 2)
        errors[name] = variance / (float(t1) - float(t0)) - 1
        record_row(
            "Variance of a step of 1e-5 at time 10 of [0, 20], float32",
            {"path": name, "relative error": f"{errors[name]:+.1%}"},
        )
    # The standard error is 0.2%.
    assert all(
        abs(error) < 0.01 for name, error in errors.items() if "Interval" in name
    )
