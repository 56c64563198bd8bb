"""A warning, with numbers, where a path is not made for the steps of a solve."""

import warnings

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import make_terms

from diffrax_sde_adjoint import BrownianInterval, StochasticAdjoint


def warnings_of(grid, *, end=1.0, levels=None, **kwargs):
    """Those of a solve, which is traced but not run."""
    settings = dict(t0=0.0, t1=1.0, dt0=0.01) | kwargs

    def solve(y0, key):
        path = BrownianInterval(0.0, end, (), key, levels=levels, **grid)
        terms = make_terms(lambda t, y, args: -y, lambda t, y, args: 0.1, path)
        return diffrax.diffeqsolve(
            terms, diffrax.Heun(), y0=y0, adjoint=StochasticAdjoint(), **settings
        ).ys

    with (
        warnings.catch_warnings(record=True) as caught,
        jax.numpy_dtype_promotion("standard"),
    ):
        warnings.simplefilter("always")
        jax.eval_shape(jax.vmap(solve, (None, 0)), jnp.array(1.0), jr.split(jr.key(0)))
    return [str(x.message) for x in caught]


step_to = lambda num: dict(
    dt0=None, stepsize_controller=diffrax.StepTo(jnp.linspace(0, 1, num + 1))
)
ts = lambda num: dict(ts=jnp.linspace(0, 1, num + 1))
quiet = {
    "cells": (dict(dt=0.01), {}),
    "cells, backwards": (dict(dt=0.01), dict(t0=1.0, t1=0.0, dt0=-0.01)),
    "cells that end early": (dict(dt=0.03), dict(dt0=0.03)),
    "a part of the path": (dict(dt=0.01), dict(end=2.0, t0=0.5, t1=1.5)),
    "two cells": (dict(dt=0.005), {}),
    "half a cell": (dict(dt=0.02), {}),
    "a power of two": ({}, dict(dt0=1 / 128)),
    "one step": ({}, dict(dt0=1.0)),
    "listed cells": (ts(10), step_to(10)),
    "half a listed cell": (ts(10), step_to(20)),
    "adaptive": (
        dict(dt=0.3),
        dict(stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2)),
    ),
    # Where it cannot be known, there is no warning.
    "times that are arrays": (dict(dt=0.013), dict(dt0=jnp.array(0.01))),
}
loud = {
    "another step": (
        dict(dt=0.013),
        {},
        r"`BrownianInterval\(..., dt=0.013\)` .* of 0.01\. .* 24 times .*dt0`",
    ),
    "no step": (
        {},
        {},
        r"without `dt` .* constant, of 0.01\. .* 44 times .*dt=dt0",
    ),
    "a third of a cell": (dict(dt=0.03), {}, "dt=0.03.* which are of 0.01"),
    "off the cells": (dict(dt=0.01), dict(end=2.0, t0=0.505, t1=1.505), "dt=0.01"),
    "backwards, uneven": (
        dict(dt=0.03),
        dict(t0=1.0, t1=0.0, dt0=-0.03),
        "`dt` does not divide the interval",
    ),
    "listed steps": ({}, step_to(10), "makes 10 steps, but the path has 1 cell, "),
    "other listed cells": (ts(7), step_to(10), "10 steps, but the path has 7 cells"),
    "many cells": (dict(dt=1e-4), {}, r"of 0.01, draws the 100 cells .* `dt=dt0`"),
    "resolution": (dict(dt=0.013), dict(levels=3), "10 times the numbers"),
}


@pytest.mark.parametrize("name", quiet)
def test_quiet(name):
    grid, kwargs = quiet[name]
    assert warnings_of(grid, **kwargs) == []


@pytest.mark.skipif(
    jax.__version_info__ < (0, 7),
    reason="JAX 0.6 does not keep what a traced array was computed from.",
)
@pytest.mark.parametrize("name", loud)
def test_loud(name):
    grid, kwargs, match = loud[name]
    with pytest.warns(UserWarning, match=match):
        for message in warnings_of(grid, **kwargs):
            warnings.warn(message, stacklevel=1)


def test_programs_are_not_compiled_anew():
    """For paths that differ in what the warning knows of them."""
    num_traces = 0

    @jax.jit
    def increment(path):
        nonlocal num_traces
        num_traces += 1
        return path.evaluate(path.t0, path.t1)

    for i in range(3):
        increment(BrownianInterval(float(i), i + 1.0, (), jr.key(0), dt=0.5))
    assert num_traces == 1
