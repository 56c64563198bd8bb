"""How many numbers `BrownianInterval` draws for a query."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import struct
from test_brownian_interval import (
    grids,
    levy_areas,
    make_path,
    steps_of_constant_solve,
)

from diffrax_sde_adjoint import BrownianInterval
from diffrax_sde_adjoint._brownian import draws


@pytest.fixture(scope="module")
def count():
    """The number of draws of a function, which counts what it draws if it is traced
    in a test of this file.
    """
    to_normal = draws._to_normal
    drawn = []

    def counted(hashed, like):
        jax.debug.callback(lambda _: drawn.append(like.shape), hashed)
        return to_normal(hashed, like)

    def count(fn, *args):
        drawn.clear()
        jax.block_until_ready(fn(*args))
        jax.effects_barrier()
        return len(drawn)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(draws, "_to_normal", counted)
        jax.clear_caches()
        yield count
    jax.clear_caches()


# Of each grid: queries, and their draws.
costs = {
    "dt": {
        "cell": ((0.75, 1.0), 1),
        "left half": ((0.75, 0.875), 2),
        "right half": ((0.875, 1.0), 2),
        "eighth": ((1.34375, 1.375), 4),
        "cells": ((0.75, 1.5), 3),
        # Each end draws its cell, ten or twenty levels, and a leaf.
        "anything": ((0.6, 0.7), 1 + 2 * 12),
        "anything, over cells": ((0.6, 1.3), 1 + 2 * 12 + 2),
        "not aligned": ((0.8125, 0.9375), 1 + 2 * 12),
    },
    "dt that does not divide": {
        "half of the second cell": ((1.2, 1.2 + 0.95 / 3), 2),
    },
    "ts": {
        "all cells": ((0.5, 2.5), 4),
        "half of a listed cell": ((1.5, 2.0), 2),
    },
    "none": {
        "one cell": ((0.5, 2.5), 1),
        "quarter of one cell": ((1.5, 2.0), 3),
        "anything in one cell": ((0.6, 0.7), 2 * 22),
    },
}


@pytest.mark.parametrize("levy_area", ("W", "K"))
@pytest.mark.parametrize("grid", costs)
def test_draws_of_a_query(grid, levy_area, count):
    shape = struct((3,), jnp.float32)
    path = make_path(jr.key(0), shape, levy_area=levy_areas[levy_area], **grids[grid])
    evaluate = jax.jit(lambda *query: path.evaluate(*query, use_levy=True))
    found = {name: count(evaluate, *query) for name, (query, _) in costs[grid].items()}
    assert found == {name: num for name, (_, num) in costs[grid].items()}


@jax.jit
def total(times, num, t1, dt):
    """Over `num` adjacent queries."""
    path = BrownianInterval(
        jnp.zeros_like(t1), t1, struct((), jnp.float32), jr.key(0), dt=dt
    )
    add = lambda i, total: total + path.evaluate(times[i], times[i + 1])
    return lax.fori_loop(0, num, add, jnp.zeros((), jnp.float32))


@pytest.mark.parametrize(
    "dtype,backward",
    (
        (jnp.float64, True),
        (jnp.float32, False),
        pytest.param(jnp.float64, False, marks=pytest.mark.slow),
        pytest.param(jnp.float32, True, marks=pytest.mark.slow),
    ),
)
def test_draws_of_a_solve(dtype, backward, count):
    """However they were rounded, steps that are dyadic parts of cells or several whole
    ones are drawn as such.
    """
    for t1, dt, step, num in (
        (1.0, 0.02, 0.01, 2),
        (10.0, 0.02, 0.01, 2),
        (10.0, 0.02, 0.005, 3),
        (1.0, 0.01, 0.02, 2),
        (10.0, 0.01, 0.05, 5),
        (7.7, None, 7.7 / 128, 8),
    ):
        start, end = (-t1, 0.0) if backward else (0.0, t1)
        times = steps_of_constant_solve(start, end, step, dtype)
        if backward:
            times = [-t for t in reversed(times)]
        num_steps = len(times) - 1
        padded = jnp.array((times + [t1] * 2001)[:2001], dtype)
        to_dtype = lambda x: None if x is None else jnp.array(x, dtype)
        found = count(total, padded, num_steps, to_dtype(t1), to_dtype(dt))
        assert found == num * num_steps, (t1, dt, step)
