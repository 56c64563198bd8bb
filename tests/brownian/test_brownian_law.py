"""The law of `BrownianInterval`: the joint law of queries, additivity, resolution.

Over an interval, `W`, `H` and `K` are the integrals of three kernels against white
noise. So the covariance of any of them over any two intervals is the integral of the
product of their kernels, and that is what the covariance of samples is compared with.
"""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from helpers import by_default_unless, keys, struct

from diffrax_sde_adjoint import BrownianInterval


t0, t1 = 0.5, 2.5
levy_areas = [
    diffrax.BrownianIncrement,
    diffrax.SpaceTimeLevyArea,
    diffrax.SpaceTimeTimeLevyArea,
]
# With a few queries that are unions of the cells of each, or dyadic parts of them.
grids = {
    "uniform": (
        dict(dt=0.25),
        [(0.75, 1.0), (0.75, 1.5), (0.5, 2.5), (0.75, 0.875), (0.8125, 0.875)],
    ),
    "uniform, does not divide": (
        dict(dt=0.7),
        [(0.5, 1.2), (1.2, 0.5 + 4 / 3), (1.2, 2.5), (0.85, 1.2), (0.85, 1.025)],
    ),
    "irregular": (
        dict(ts=jnp.array([0.5, 0.5001, 1.0, 1.1, 2.5])),
        [(0.5, 0.5001), (0.5001, 1.0), (1.0, 2.5), (1.1, 1.8), (1.8, 2.15)],
    ),
    "none": (dict(), [(0.5, 2.5), (0.5, 1.5), (1.0, 1.5), (1.25, 1.375)]),
}
# Nested, overlapping, adjacent and distant; in a cell and across edges; ending on what
# halves a cell and elsewhere; short and long. All are longer than the resolutions.
queries = [
    (0.6, 2.3),
    (0.6, 0.61),
    (0.61, 0.9),
    (0.605, 0.623),
    (0.605, 1.93),
    (0.9, 1.0001),
    (1.7, 1.71),
    (1.7, 1.7035),
    (0.625, 1.625),
    (0.5, 0.7),
    (2.1, 2.5),
    (1.3, 1.3),
]


def kernels(x: np.ndarray) -> list[np.ndarray]:
    return [np.ones_like(x), 1 / 2 - x, 1 / 12 - x * (1 - x) / 2]


def exact_covariance(queries: list[tuple[float, float]], num: int) -> np.ndarray:
    """Of the first `num` of W, H and K over each query."""
    points, weights = np.polynomial.legendre.leggauss(3)  # exact for degree 5
    out = np.zeros((len(queries), num, len(queries), num))
    for (i, (a, b)), (j, (c, d)) in itertools.product(enumerate(queries), repeat=2):
        start, end = max(a, c), min(b, d)
        if start < end:
            u = start + (end - start) * (points + 1) / 2
            left, right = kernels((u - a) / (b - a)), kernels((u - c) / (d - c))
            for k, m in itertools.product(range(num), repeat=2):
                product = weights * left[k] * right[m]
                out[i, k, j, m] = (end - start) / 2 * np.sum(product)
    return out.reshape(len(queries) * num, -1)


def components(increment: diffrax.AbstractBrownianIncrement) -> list:
    return [getattr(increment, x) for x in "WHK" if hasattr(increment, x)]


def sample(queries, num, dtype, num_keys, end=None, **kwargs) -> np.ndarray:
    """W, H and K over each query, for each key. `end` may be a function of the key."""
    queries = jnp.array(queries, dtype)
    times = {k: jnp.asarray(v, dtype) for k, v in kwargs.items()}

    @jax.jit
    @jax.vmap
    def run(key):
        path = BrownianInterval(
            jnp.array(t0, dtype),
            jnp.array(t1, dtype),
            struct((), dtype),
            key,
            levy_area=levy_areas[num - 1],
            end=end(key) if callable(end) else end,
            **times,
        )
        evaluate = lambda q: jnp.stack(
            components(path.evaluate(q[0], q[1], use_levy=True))
        )
        return jax.lax.map(evaluate, queries)

    return np.asarray(run(keys(num_keys)), np.float64).reshape(num_keys, -1)


def is_slow(name, areas, dtype):
    return name != "none" or (areas, dtype) != ("WHK", jnp.float64)


@pytest.mark.parametrize(
    "name,areas,dtype",
    by_default_unless(
        is_slow,
        itertools.product(grids, ("W", "WH", "WHK"), (jnp.float64, jnp.float32)),
        long=lambda name, areas, dtype: dtype == jnp.float32 and areas != "WHK",
    ),
)
def test_joint_law(name, areas, dtype):
    grid, of_grid = grids[name]
    num = len(areas)
    all_queries = queries + of_grid
    num_keys = 20_000
    samples = sample(all_queries, num, dtype, num_keys, **grid)
    check_law(samples, exact_covariance(all_queries, num), dtype)


def given_end(
    queries: list[tuple[float, float]], num: int, end: float
) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the covariance of W, H and K over each query, given the value of the
    path at its end: those of normal laws, one of which is conditioned on a part.
    """
    with_whole = exact_covariance([*queries, (t0, t1)], num)
    whole = -num  # W over [t0, t1]
    of_whole = with_whole[whole, :whole]
    covariance = with_whole[:whole, :whole] - np.outer(of_whole, of_whole) / (t1 - t0)
    # Zero, for the whole path, up to rounding.
    np.fill_diagonal(covariance, np.maximum(np.diag(covariance), 0))
    return of_whole * end / (t1 - t0), covariance


@pytest.mark.parametrize(
    "name,areas,dtype",
    by_default_unless(
        lambda name, areas, dtype: (name, areas) != ("none", "WH"),
        [
            *((name, "WHK", jnp.float64) for name in grids),
            ("uniform", "W", jnp.float32),
            ("none", "WH", jnp.float32),
        ],
    ),
)
def test_joint_law_given_the_end(name, areas, dtype):
    grid, of_grid = grids[name]
    num, end = len(areas), -1.7
    all_queries = queries + of_grid
    samples = sample(all_queries, num, dtype, 20_000, end=end, **grid)
    mean, covariance = given_end(all_queries, num, end)
    check_law(samples - mean, covariance, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("irregular", "none"))
def test_law_given_any_end(name):
    """If the end has the law of the path there, so has the path."""
    draw_end = lambda key: (t1 - t0) ** 0.5 * jr.normal(jr.fold_in(key, 2**31))
    grid, of_grid = grids[name]
    all_queries = queries + of_grid
    samples = sample(all_queries, 3, jnp.float64, 20_000, end=draw_end, **grid)
    check_law(samples, exact_covariance(all_queries, 3), jnp.float64)


def check_law(samples: np.ndarray, exact: np.ndarray, dtype) -> None:
    """That samples, one in each row, are normal, with mean zero and the covariance
    `exact`, up to chance and to rounding in `dtype`.
    """
    num = len(samples)
    eps = float(jnp.finfo(dtype).eps)
    variances = np.diag(exact)
    # The variance of an entry of the empirical covariance of normal samples, and what
    # rounding of times in float32 adds to it.
    std_error = np.sqrt((np.outer(variances, variances) + exact**2) / num)
    # What is known, such as the end of a path, is only rounded.
    is_random = variances > 1e-12
    size = np.sqrt(np.where(is_random, variances, t1 - t0))
    rounding = 20 * eps * np.outer(size, size)
    covariance = samples.T @ samples / num
    assert np.all(np.abs(covariance - exact) <= 6 * std_error + rounding)
    mean = samples.mean(axis=0)
    assert np.all(np.abs(mean) <= 6 * np.sqrt(variances / num) + 20 * eps * size)

    # Each one is normal, and so are combinations of them. At 1e-6 for each of some
    # hundred tests.
    standard = samples[:, is_random] / np.sqrt(variances[is_random])
    directions = np.random.default_rng(0).normal(size=(standard.shape[1], 10))
    combined = standard @ directions
    std = np.sqrt(variances[is_random])
    correlation = exact[np.ix_(is_random, is_random)] / np.outer(std, std)
    combined /= np.sqrt(np.sum(directions * (correlation @ directions), axis=0))
    for x in (*standard.T, *combined.T):
        assert scipy.stats.kstest(x, "norm").pvalue > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
def test_entries_and_leaves_are_independent(dtype):
    shape = (struct((3,), dtype), {"x": struct((2, 2), dtype)})

    @jax.jit
    @jax.vmap
    def run(key):
        path = BrownianInterval(
            t0, t1, shape, key, dt=0.5, levy_area=diffrax.SpaceTimeLevyArea
        )
        # A cell, and a part of two others.
        whole = path.evaluate(0.5, 1.0, use_levy=True)
        part = path.evaluate(1.2, 1.7, use_levy=True)
        scaled = [
            (x.W, jax.tree.map(lambda y: 12**0.5 * y, x.H)) for x in (whole, part)
        ]
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(scaled)])

    num = 20_000
    samples = np.asarray(run(keys(num)))
    correlation = samples.T @ samples / (0.5 * num)
    exact = np.eye(28)
    assert np.all(np.abs(correlation - exact) <= 6 * np.sqrt((1 + exact) / num))


def moments(increment: diffrax.AbstractBrownianIncrement, h: np.ndarray) -> np.ndarray:
    """The integrals of 1, x and x^2 against white noise, with `x` the time since the
    start of the query. The last axis of all arrays is one query each.
    """
    w, hh, kk = [*map(np.asarray, components(increment)), 0.0, 0.0][:3]
    # As H = W / 2 - m1 / h and K = W / 12 - m1 / (2 h) + m2 / (2 h^2).
    m1 = h * (w / 2 - hh)
    m2 = 2 * h**2 * (kk - w / 12) + h * m1
    return np.stack([w, m1, m2][: len(components(increment))])


@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32), ids=lambda x: x.__name__)
@pytest.mark.parametrize("grid", grids.values(), ids=grids)
def test_additive(grid, dtype):
    """Moments over adjacent queries add up, once their origins are the same: in a cell,
    across edges, over many cells; from the whole interval to far below the resolution,
    to rounding that is relative to the size of the query.
    """
    grid, _ = grid
    rng = np.random.default_rng(0)
    anywhere = rng.uniform(t0, t1, (40, 3))
    scales = 10.0 ** rng.uniform(-9, -1, (80, 1))
    close = rng.uniform(0.7, 2.3, (80, 1)) + scales * rng.uniform(-1, 1, (80, 3))
    edges = [(0.5, 0.75, 1.0), (0.5, 0.5, 2.5), (1.0, 2.5, 2.5), (0.5, 0.6, 2.5)]
    triples = np.sort(np.concatenate([anywhere, close, edges]), axis=1).astype(dtype)

    @jax.jit
    def evaluate(a, b):
        path = BrownianInterval(
            jnp.array(t0, dtype),
            jnp.array(t1, dtype),
            struct((), dtype),
            jr.key(1),
            levy_area=diffrax.SpaceTimeTimeLevyArea,
            **{k: jnp.asarray(v, dtype) for k, v in grid.items()},
        )
        return jax.vmap(lambda a, b: path.evaluate(a, b, use_levy=True))(a, b)

    a, b, c = triples.T
    to_double = lambda x: jax.tree.map(lambda y: np.asarray(y, np.float64), x)
    left, right, whole = map(
        to_double, (evaluate(a, b), evaluate(b, c), evaluate(a, c))
    )
    h, length = left.dt, whole.dt
    m_left, m_right, m_whole = (moments(x, x.dt) for x in (left, right, whole))
    w, m1, m2 = m_right
    joined = m_left + np.stack([w, m1 + h * w, m2 + 2 * h * m1 + h**2 * w])
    eps = float(jnp.finfo(dtype).eps)
    size = np.sqrt(length) * length ** np.arange(3)[:, None]
    assert np.all(np.abs(joined - m_whole) <= 100 * eps * size)
    assert np.all(np.abs(length - (c.astype(float) - a)) <= 4 * eps)


@pytest.mark.slow
def test_below_the_resolution():
    """The path is smooth: a short query is a straight line, with `H` and `K` near zero.
    (They are not if they are just made consistent with the longer queries.)
    """
    resolution = 2.0**-5
    starts = jnp.linspace(0.05, 0.95, 7) * resolution + 1.0

    @jax.jit
    def run(h):
        def of_key(key):
            path = BrownianInterval(
                0.0, 2.0, (), key, dt=1.0, levels=5, levy_area=levy_areas[2]
            )
            return jax.vmap(lambda s: path.evaluate(s, s + h, use_levy=True))(starts)

        return jax.vmap(of_key)(keys(1000))

    for h in (1e-2 * resolution, 1e-6 * resolution):
        out = run(h)
        w, hh, kk = (np.std(x, axis=0) for x in (out.W, out.H, out.K))
        slope = w / h * np.sqrt(resolution)
        assert np.all((slope > 1) & (slope < 10))
        assert np.all(hh <= 0.2 * np.sqrt(h / 12))
        assert np.all(kk <= 0.02 * np.sqrt(h / 720))


slow_tiny = (
    dict(t0=0.0, t1=20.0),
    dict(t0=0.1, t1=20.0),
    dict(t0=0.0, t1=20.0, dt=0.1, levels=16),
    dict(t0=0.0, t1=20.0, dt=0.3, levels=16),
    dict(t0=0.0, t1=20.0, ts=[0.0, 9.9, 10.2, 20.0], levels=16),
)
tiny = (
    *slow_tiny,
    dict(t0=10.0, t1=10 + 2**-10, dt=2**-10 / 100),
)


@pytest.mark.parametrize("grid", by_default_unless(slow_tiny, tiny), ids=str)
def test_tiny_steps_in_single_precision(grid):
    """Steps of ten units of rounding: their variance is their length, to 1%."""
    f32 = jnp.float32
    grid = {k: v if k == "levels" else jnp.asarray(v, f32) for k, v in grid.items()}
    if "dt" not in grid and "ts" not in grid:
        grid["levels"] = 24
    starts = jnp.array([10, 10 + 4e-5, 10 + 5e-4], f32)
    if grid["t0"] < 10:
        starts = jnp.concatenate([starts, jnp.array([10.0137, 10.1 - 3e-5], f32)])
    ends = starts + f32(1e-5)
    if grid["t0"] == 10:
        # The edges of cells, as a solve would step to them.
        n = np.array([0, 4, 50])
        starts, ends = (
            jnp.asarray(10 + (grid["t1"] - 10) * (k / f32(100)), f32)
            for k in (n.astype(f32), (n + 1).astype(f32))
        )

    @jax.jit
    @jax.vmap
    def run(key):
        path = BrownianInterval(shape=struct((1000,), f32), key=key, **grid)
        return jax.lax.map(lambda q: path.evaluate(*q, use_levy=True), (starts, ends))

    out = run(keys(500))
    variance = np.mean(np.asarray(out.W, np.float64) ** 2, axis=(0, 2))
    expected = np.asarray(ends, np.float64) - np.asarray(starts, np.float64)
    if grid["t0"] == 10:
        expected = np.full(3, (float(grid["t1"]) - 10) / 100)
    # The standard error is sqrt(2 / 500 000), 0.2%.
    np.testing.assert_allclose(variance, expected, rtol=0.01)
    np.testing.assert_allclose(np.asarray(out.dt)[0], expected, rtol=1e-3)
