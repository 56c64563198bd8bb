"""`BrownianInterval`: its purity, its grids, its shapes and its errors.

The law of the path is in `test_brownian_law.py`.
"""

import itertools
import math
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest
from helpers import by_default_unless, keys, struct

from diffrax_sde_adjoint import BrownianInterval
from diffrax_sde_adjoint._brownian import refine
from diffrax_sde_adjoint._brownian.query import draw_cell
from diffrax_sde_adjoint._term.reversed import reversed_control


f64 = jnp.float64

# Uniform cells; cells of which the first ends early, as `dt` does not divide; listed
# cells, very uneven; and one cell.
grids = {
    "dt": dict(dt=0.25),
    "dt that does not divide": dict(dt=0.7),
    "ts": dict(ts=jnp.array([0.5, 0.5001, 1.0, 2.0, 2.5])),
    "none": dict(),
}
t0, t1 = 0.5, 2.5
levy_areas = {
    "W": diffrax.BrownianIncrement,
    "H": diffrax.SpaceTimeLevyArea,
    "K": diffrax.SpaceTimeTimeLevyArea,
}


def edges(grid: dict) -> list[float]:
    if "ts" in grid:
        return grid["ts"].tolist()
    if "dt" in grid:
        return steps_of_constant_solve(t0, t1, grid["dt"])
    return [t0, t1]


def steps_of_constant_solve(t0, t1, dt0, dtype=f64) -> list[float]:
    """The very times that diffrax steps to, as floats."""
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y),
        diffrax.Euler(),
        jnp.array(t0, dtype),
        jnp.array(t1, dtype),
        jnp.array(dt0, dtype),
        jnp.array(0, dtype),
        saveat=diffrax.SaveAt(t0=True, steps=True),
    )
    assert sol.ts is not None
    return sol.ts[jnp.isfinite(sol.ts)].tolist()


def make_path(key, shape=(), **grid) -> BrownianInterval:
    return BrownianInterval(t0, t1, shape, key, **grid)


@pytest.mark.parametrize(
    "grid,levy_area",
    by_default_unless(
        lambda grid, levy_area: levy_area == "W",
        (*((grid, "W") for grid in grids), ("none", "K")),
    ),
)
def test_pure(grid, levy_area):
    """Equal queries have equal values: in any order, under `jit` and `vmap`, and for a
    path built again.
    """
    grid, levy_area = grids[grid], levy_areas[levy_area]
    make = lambda key: make_path(key, (3,), levy_area=levy_area, **grid)
    evaluate = lambda s, t: make(jr.key(2)).evaluate(s, t, use_levy=True)
    path = make(jr.key(2))
    times = edges(grid)
    # Cells, unions of cells, parts of cells, and across edges.
    queries = list(itertools.pairwise(times))
    queries += [(times[0], times[-1]), (0.6, 0.7), (0.6, times[-1]), (0.9, 1.7)]
    starts, ends = jnp.array(queries).T
    eager = [path.evaluate(*query, use_levy=True) for query in queries]
    in_reverse = [path.evaluate(*query, use_levy=True) for query in queries[::-1]]
    assert eqx.tree_equal(eager, in_reverse[::-1])

    eager = jtu.tree_map(lambda *x: jnp.stack(x), *eager)
    in_map = jax.jit(lambda s, t: jax.lax.map(lambda q: evaluate(*q), (s, t)))
    # XLA compiles a batch with other roundings.
    close = dict(rtol=1e-12, atol=1e-14)
    for out in (
        in_map(starts, ends),
        jax.vmap(evaluate)(starts, ends),
    ):
        jtu.tree_map(partial(np.testing.assert_allclose, **close), out, eager)

    other_key = make(jr.key(3)).evaluate(t0, t1)
    assert not np.any(np.isclose(other_key, path.evaluate(t0, t1)))


@pytest.mark.parametrize("grid", grids.values(), ids=grids)
def test_value_is_increment_from_the_start(grid):
    path = make_path(jr.key(1), (3,), **grid)
    for t in [*edges(grid), 0.8, 1.234]:
        np.testing.assert_array_equal(path.evaluate(t), path.evaluate(t0, t))


# What is tried by default; the others are slow.
few = {
    "dt that does not divide": ("W", f64),
    "none": ("H", jnp.float32),
}


@pytest.mark.parametrize(
    "grid,levy_area,dtype",
    by_default_unless(
        lambda grid, *others: others != few.get(grid),
        itertools.product(grids, levy_areas, (f64, jnp.float32)),
        long=lambda grid, levy_area, dtype: dtype == jnp.float32,
    ),
)
def test_simple_queries_are_like_others(grid, levy_area, dtype, monkeypatch):
    """Cells, parts of them, unions of them, all others, also a bit off: what they cost
    does not change their values. In a batch of all of these, and one by one.
    """
    times = np.array(edges(grids[grid]))
    cells = [*itertools.pairwise(times)]
    parts = [
        (a + (b - a) * k / n, a + (b - a) * (k + 1) / n)
        for a, b in cells
        if b - a > 0.1
        for k, n in ((0, 2), (1, 2), (2, 4), (3, 4), (11, 32))
    ]
    unions = [(times[0], b) for b in times[2:]]
    others = [(0.6, 0.7), (times[0], 0.8), (0.9, times[-1]), (1.1, 1.1), (0.9, 1.7)]
    exact = np.array([*cells, *parts, *unions, *others])
    eps = float(jnp.finfo(dtype).eps)
    shifts = [
        0,
        *np.random.default_rng(0).uniform(-4 * eps, 4 * eps, (2, *exact.shape)),
    ]
    queries = np.concatenate([np.clip(exact + shift, t0, t1) for shift in shifts])
    starts, ends = jnp.array(np.sort(queries, axis=1).T, dtype)

    def evaluate(s, t):
        path = BrownianInterval(
            jnp.array(t0, dtype),
            jnp.array(t1, dtype),
            struct((3,), dtype),
            jr.key(0),
            levy_area=levy_areas[levy_area],
            **{k: jnp.asarray(v, dtype) for k, v in grids[grid].items()},
        )
        return path.evaluate(s, t, use_levy=True)

    in_map = lambda s, t: jax.lax.map(lambda ts: evaluate(*ts), (s, t))
    one_by_one = jax.jit(in_map)(starts, ends)
    in_batch = jax.jit(jax.vmap(evaluate))(starts, ends)
    monkeypatch.setattr(refine, "interval_between", lambda ends, levels: jnp.int32(0))
    jax.clear_caches()
    general = jax.jit(in_map)(starts, ends)
    jax.clear_caches()
    close = partial(np.testing.assert_allclose, rtol=0, atol=20 * eps)
    jtu.tree_map(close, one_by_one, general)
    jtu.tree_map(close, in_batch, general)


def test_vmap_over_keys_equals_a_loop():
    sample = lambda key: make_path(key, (2,), dt=0.5).evaluate(0.5, 2.0)
    looped = jnp.stack([sample(key) for key in keys(5)])
    np.testing.assert_array_equal(jax.vmap(sample)(keys(5)), looped)


def test_typed_and_legacy_keys_agree():
    typed = make_path(jr.key(5), (2,), dt=0.5).evaluate(0.5, 1.5)
    legacy = make_path(jr.PRNGKey(5), (2,), dt=0.5).evaluate(0.5, 1.5)
    np.testing.assert_array_equal(typed, legacy)


@jax.jit
def steps_and_cells(start, end, dt, first, last, step):
    """The increments of a solve from `first` to `last`, their number, and the values
    in the cells of the path.
    """
    dtype = start.dtype
    path = BrownianInterval(start, end, struct((), dtype), jr.key(0), dt=dt)
    sol = diffrax.diffeqsolve(
        diffrax.ControlTerm(lambda t, y, args: jnp.ones((), dtype), path),
        diffrax.Euler(),
        first,
        last,
        step,
        jnp.zeros((), dtype),
        saveat=diffrax.SaveAt(t1=True, steps=True),
        max_steps=4096,
    )
    draw = lambda i: draw_cell(path._source, i, path._cells.length(i)).components[0]
    cells = jax.vmap(draw)(jnp.arange(4096, dtype=jnp.int32))
    assert sol.ys is not None
    return jnp.diff(sol.ys, prepend=0), sol.stats["num_steps"], cells


@pytest.mark.parametrize("dtype", (f64, jnp.float32))
@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize(
    "start,end,dt", ((0.5, 2.5, 1e-3), (-3.0, 7.0, 0.1), (100.0, 101.0, 2**-7))
)
def test_steps_of_a_solve_are_cells(start, end, dt, backward, dtype):
    """Each step of a solve is one cell, drawn as such, however it was rounded."""
    start, end, dt = (jnp.array(x, dtype) for x in (start, end, dt))
    times = (end, start, -dt) if backward else (start, end, dt)
    increments, num_steps, cells = steps_and_cells(start, end, dt, *times)
    num = round(float((end - start) / dt))
    assert num_steps == num
    increments = increments[:num]
    if backward:
        increments = -increments[::-1]
    tol = 100 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(increments, cells[:num], rtol=0, atol=tol)


@pytest.mark.parametrize("dt", (0.3, 0.7, 0.99, 1.0, 0.1))
def test_dt_need_not_divide(dt):
    """The cells are the steps of diffrax, whose first two meet at `t0 + dt`."""
    times = steps_of_constant_solve(0.0, 1.0, dt)
    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=dt)
    i = jnp.arange(len(times), dtype=jnp.int32)
    np.testing.assert_allclose(jax.vmap(path._cells.edge)(i), times, rtol=1e-15)
    lengths = jax.vmap(path._cells.length)(i[:-1])
    np.testing.assert_allclose(lengths, np.diff(times), rtol=1e-12)


def test_length_of_tiny_cells():
    """Cells of a few units of rounding still have increments of the right size: their
    lengths are not differences of rounded times.
    """
    start, end, dt = (jnp.array(x, jnp.float32) for x in (10.0, 10.001, 1e-5))
    path = BrownianInterval(start, end, (), jr.key(0), dt=dt)
    lengths = jax.vmap(path._cells.length)(jnp.arange(2, 99, dtype=jnp.int32))
    expected = float(end - start) / int(path._cells.count)
    np.testing.assert_allclose(lengths, expected, rtol=1e-6)


def test_too_tiny_cells():
    with pytest.raises(ValueError, match="two units of rounding"):
        make = lambda dt: BrownianInterval(100.0, 101.0, (), jr.key(0), dt=dt)
        make(1e-14)


def test_queries_of_tiny_cells():
    """Cells a few units of rounding wide: queries are still of the cells that their
    ends are nearest to, so variances add up.
    """
    f32 = jnp.float32
    start, end, dt = f32(2020), f32(2020.1), f32(1 / 1460)

    @jax.jit
    @jax.vmap
    def sample(key):
        path = BrownianInterval(start, end, struct((), f32), key, dt=dt)
        edge = lambda i: path._cells.edge(jnp.array(i, jnp.int32))
        return jnp.stack(
            [
                path.evaluate(edge(3), edge(3)),
                path.evaluate(edge(3), edge(4)),
                path.evaluate(edge(3), edge(5)),
                path.evaluate(start, end),
            ]
        )

    num = 20_000
    none, one, two, whole = np.var(np.asarray(sample(keys(num)), np.float64), axis=0)
    assert none == 0
    # The standard error of a variance, relative to it, is sqrt(2 / num) = 0.01.
    np.testing.assert_allclose([one, two], [1 / 1460, 2 / 1460], rtol=0.06)
    np.testing.assert_allclose(whole, float(end - start), rtol=0.06)


@pytest.mark.slow
def test_query_in_another_dtype():
    """A float32 solve on a float64 path, and the other way round."""
    path64 = BrownianInterval(0.0, 1.0, (2,), jr.key(0), dt=0.1)
    third = jnp.array(0.1, jnp.float32) * 3
    np.testing.assert_array_equal(path64.evaluate(third), path64.evaluate(0.3))
    end, dt = (jnp.array(x, jnp.float32) for x in (1.0, 0.1))
    path32 = BrownianInterval(0 * end, end, (2,), jr.key(0), dt=dt)
    np.testing.assert_array_equal(path32.evaluate(third), path32.evaluate(0.3))


def test_integer_times():
    floats = BrownianInterval(0.0, 4.0, (2,), jr.key(0), ts=jnp.arange(5.0))
    ints = BrownianInterval(0, 4, (2,), jr.key(0), ts=[0, 1, 2, 3, 4])
    np.testing.assert_array_equal(ints.evaluate(1, 3), floats.evaluate(1.0, 3.0))


@pytest.mark.parametrize(
    "dtype",
    (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64),
    ids=lambda x: x.__name__,
)
def test_dtypes(dtype):
    sample = lambda key: make_path(key, struct((2,), dtype), dt=0.5).evaluate(0.5, 2.5)
    samples = jax.vmap(sample)(keys(20_000))
    assert samples.dtype == dtype
    samples = np.asarray(samples, np.complex128)
    assert np.all(np.abs(np.mean(samples, axis=0)) < 6 * math.sqrt(2 / 20_000))
    variance = np.mean(np.abs(samples) ** 2)
    # Of 40 000 entries, at 6 standard errors; half precision rounds by up to 0.4% more.
    tol = 6 * math.sqrt(2 / 40_000) + float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(variance, 2.0, rtol=tol)


@pytest.mark.slow
def test_half_precision_over_many_cells():
    """What is summed is so in single precision."""

    @jax.jit
    def run(key):
        path = make_path(
            key,
            struct((20_000,), jnp.bfloat16),
            dt=2e-3,
            levy_area=diffrax.SpaceTimeTimeLevyArea,
        )
        return path.evaluate(t0, t1, use_levy=True)

    out = run(jr.key(0))
    for x, exact in ((out.W, 2), (out.H, 2 / 12), (out.K, 2 / 720)):
        x = np.asarray(x, np.float64)
        assert np.isclose(np.var(x), exact, rtol=0.06)
        # A bias of a cell's numbers would add up.
        assert abs(np.mean(x)) < 6 * math.sqrt(exact / x.size)


@pytest.mark.parametrize(
    "shape",
    (
        struct((), f64),
        (struct((2,), f64), struct((), jnp.float32)),
        {"a": [struct((2, 1), jnp.float16)], "b": None},
        {"empty": struct((0, 3), f64)},
        (),
    ),
    ids=str,
)
@pytest.mark.parametrize(
    "levy_area",
    [
        pytest.param(x, id=name, marks=() if name == "W" else pytest.mark.slow)
        for name, x in levy_areas.items()
    ],
)
def test_pytree_shapes(shape, levy_area):
    expected = struct((), f64) if shape == () else shape

    def evaluate(start, end, use_levy):
        path = make_path(jr.key(0), shape, dt=0.5, levy_area=levy_area)
        assert path.shape == expected
        return path.evaluate(start, end, use_levy=use_levy)

    with_areas = jax.jit(lambda start, end: evaluate(start, end, True))
    without_areas = jax.jit(lambda start, end: evaluate(start, end, False))
    # A cell, nothing, and parts of three cells.
    for query in ((0.5, 1.0), (1.0, 1.0), (0.7, 1.6)):
        increment = with_areas(*query)
        assert type(increment) is levy_area
        for x in (getattr(increment, x) for x in "WHK" if hasattr(increment, x)):
            assert jax.eval_shape(lambda x=x: x) == expected
        assert jtu.tree_structure(increment.dt) == jtu.tree_structure(expected)
        for dt in jtu.tree_leaves(increment.dt):
            np.testing.assert_allclose(dt, query[1] - query[0], rtol=1e-3)
        plain = without_areas(*query)
        assert jax.eval_shape(lambda plain=plain: plain) == expected
        assert eqx.tree_equal(plain, increment.W)


bad_arguments = {
    "t1 < t0": (dict(t1=0.0), "t0 < t1"),
    "t1 == t0": (dict(t1=t0), "t0 < t1"),
    "t1 infinite": (dict(t1=math.inf), "finite"),
    "t0 NaN": (dict(t0=math.nan), "finite"),
    "dt zero": (dict(dt=0.0), r"`BrownianInterval\(dt=...\)` must be positive"),
    "dt negative": (dict(dt=-0.1), r"`BrownianInterval\(dt=...\)` must be positive"),
    "dt NaN": (dict(dt=math.nan), r"`BrownianInterval\(dt=...\)` must be positive"),
    "dt too large": (dict(dt=2.1), r"`BrownianInterval\(dt=...\)` must be at most"),
    "ts unsorted": (dict(ts=[t0, 2.0, 1.0, t1]), r"\(ts=...\)` must be strictly incre"),
    "ts repeated": (dict(ts=[t0, 1.0, 1.0, t1]), r"\(ts=...\)` must be strictly incre"),
    "ts NaN": (dict(ts=[t0, math.nan, t1]), r"\(ts=...\)` must be strictly incre"),
    "ts too short": (dict(ts=[t0]), r"\(ts=...\)` must be one-dimensional"),
    "ts a matrix": (dict(ts=jnp.ones((2, 2))), r"\(ts=...\)` must be one-dimensional"),
    "ts starts late": (dict(ts=[1.0, t1]), r"\(ts=...\)` must start with `t0`"),
    "ts ends early": (dict(ts=[t0, 1.0]), r"\(ts=...\)` must start with `t0`"),
    "dt and ts": (dict(dt=0.1, ts=[t0, t1]), "either `dt` or `ts`, not both"),
    "dt tiny": (dict(dt=1e-10), r"\(dt=...\)` must be such that there are at most"),
    "rbg": (
        dict(key=jr.key(0, impl="rbg")),
        r"\(key=...\)` must be a key of JAX's default kind",
    ),
    "no leaves": (dict(shape={}), r"\(shape=...\)` has no leaves"),
    "levels negative": (dict(levels=-1), r"\(levels=...\)` must be an integer from 0"),
    "levels too many": (dict(levels=30), r"\(levels=...\)` must be an integer from 0"),
    "integer dtype": (dict(shape=struct((), jnp.int32)), r"\(shape=...\)` .* int32"),
}


@pytest.mark.parametrize("jit", (False, True), ids=("eager", "jit"))
@pytest.mark.parametrize("bad,match", bad_arguments.values(), ids=bad_arguments)
def test_bad_arguments(bad, match, jit):
    arguments = dict(t0=t0, t1=t1, shape=(), key=jr.key(0)) | bad
    # Known values are checked when tracing, so this is the same with and without `jit`.
    make = lambda: BrownianInterval(**arguments)
    with pytest.raises(ValueError, match=match):
        (eqx.filter_jit(make) if jit else make)()


@pytest.mark.parametrize(
    "bad,match",
    (
        (dict(shape=3), r"\(shape=...\)` must be a tuple"),
        (dict(shape=jnp.zeros(3)), r"\(shape=...\)` must be a tuple"),
        (dict(dt=jnp.array([0.1, 0.2])), r"\(dt=...\)` must be a scalar"),
        (dict(key=keys(2)), r"\(key=...\)` must be a single key"),
        (dict(key=0), r"\(key=...\)` must be a JAX random key"),
        (dict(levels=10.0), r"\(levels=...\)` must be an integer from 0"),
        (dict(levy_area=float), r"\(levy_area=...\)` must be one of"),
    ),
    ids=(
        "shape a number",
        "shape an array",
        "dt an array",
        "keys",
        "a seed for a key",
        "levels",
        "levy_area",
    ),
)
def test_bad_types(bad, match, monkeypatch):
    """Users do not have the type checks that the tests have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=match):
        BrownianInterval(**dict(t0=t0, t1=t1, shape=(), key=jr.key(0)) | bad)


@pytest.mark.parametrize(
    "bad,match",
    (
        (dict(t1=0.0), "t0 < t1"),
        (dict(dt=-0.1), "must be positive"),
        (dict(dt=2.1), "must be at most"),
        (dict(ts=jnp.array([t0, 2.0, 1.0, t1])), "strictly increasing"),
        (dict(ts=jnp.array([t0, 1.0])), "must start with"),
    ),
)
def test_bad_traced_arguments(bad, match):
    (name,) = bad

    @eqx.filter_jit
    def evaluate(x):
        arguments = dict(t0=t0, t1=t1, shape=(), key=jr.key(0)) | {name: x}
        return BrownianInterval(**arguments).evaluate(t0, t1)

    with pytest.raises(RuntimeError, match=match):
        evaluate(jnp.asarray(bad[name]))


@pytest.mark.parametrize(
    "query",
    (
        (0.0, 1.0),
        (1.0, 0.0),
        (0.4999, 1.0),
        (0.5, 3.0),
        (0.7, 2.501),
        (2.6, 3.0),
        (math.nan, 1.0),
        (0.5, math.nan),
    ),
    ids=str,
)
@pytest.mark.parametrize("grid", grids.values(), ids=grids)
def test_bad_queries(query, grid):
    path = make_path(jr.key(0), **grid)
    message = "was called from {:g} to {:g}, but the path is from 0.5 to 2.5"
    with pytest.raises(RuntimeError, match=message.format(*query)):
        path.evaluate(*query)
    with pytest.raises(RuntimeError, match=message.format(*query)):
        eqx.filter_vmap(path.evaluate)(
            jnp.array([0.5, query[0]]), jnp.array([1.0, query[1]])
        )


@pytest.mark.parametrize("levy_area", levy_areas.values(), ids=levy_areas)
@pytest.mark.parametrize("grid", grids.values(), ids=grids)
def test_from_right_to_left(grid, levy_area):
    """As a solver goes through it, see `_term/reversed.py`."""
    path = make_path(jr.key(0), levy_area=levy_area, **grid)
    for query in ((0.5, 0.75), (0.6, 1.7), (1.0, 1.0)):
        expected = reversed_control(path.evaluate(*query, use_levy=True))
        actual = path.evaluate(*query[::-1], use_levy=True)
        assert eqx.tree_equal(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_complex_levy_areas():
    dtype = jnp.complex128
    path = make_path(
        jr.key(0), struct((2,), dtype), dt=0.25, levy_area=diffrax.SpaceTimeTimeLevyArea
    )
    whole = path.evaluate(0.5, 1.5, use_levy=True)
    parts = [path.evaluate(*x) for x in ((0.5, 0.7), (0.7, 1.0), (1.0, 1.5))]
    np.testing.assert_allclose(whole.W, sum(parts), rtol=1e-12)
    assert whole.H.dtype == whole.K.dtype == dtype


def test_tolerance_of_a_tree():
    with pytest.raises(ValueError, match=r"has no `tol`.*by `levels`.* `dt=dt0`"):
        BrownianInterval(0.0, 1.0, (), jr.key(0), tol=1e-3)


@pytest.mark.parametrize(
    "solver,levy_area,needed",
    [
        (diffrax.SPaRK(), "BrownianIncrement", "SpaceTimeLevyArea"),
        (diffrax.ShARK(), "BrownianIncrement", "SpaceTimeLevyArea"),
        (diffrax.SPaRK(), "SpaceTimeTimeLevyArea", None),
        (diffrax.Heun(), "BrownianIncrement", None),
    ],
    ids=str,
)
def test_levy_area_of_a_solver(solver, levy_area, needed):
    area = getattr(diffrax, levy_area)
    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=0.5, levy_area=area)
    noise = diffrax.ControlTerm(lambda t, y, args: jnp.array(1.0), path)
    terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: -y), noise)
    solve = lambda: diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.5, jnp.array(1.0))
    if needed is None:
        solve()
        return
    match = f"made with `levy_area=diffrax.{levy_area}`. Pass .*diffrax.{needed}"
    with pytest.raises(ValueError, match=match):
        solve()
    # Whoever asks for all that there is gets it.
    assert isinstance(path.evaluate(0.0, 0.5, use_levy=True), area)


def test_derivatives_are_errors():
    path = make_path(jr.key(0), dt=0.5)
    with pytest.raises(RuntimeError, match="times of a Brownian increment"):
        jax.grad(lambda t: path.evaluate(0.5, t))(1.0)
    with pytest.raises(RuntimeError, match="`dt`"):
        jax.grad(lambda dt: make_path(jr.key(0), dt=dt).evaluate(0.5, 1.0))(0.5)
    # The path itself may be a part of what is differentiated.
    grads = eqx.filter_grad(lambda path: path.evaluate(0.5, 1.0))(path)
    assert all(np.all(x == 0) for x in jtu.tree_leaves(grads))


@pytest.mark.parametrize(
    "dtype", (jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow))
)
@pytest.mark.parametrize("size", (40, 60, 100, 200))
def test_sizes(size, dtype):
    """By which numbers are drawn all at once, in parts, or in a loop of parts."""
    array = lambda *x: jnp.array(x, dtype)
    t0, t1, dt = array(0, 1, 0.1)
    path = BrownianInterval(t0, t1, struct((size,), dtype), jr.key(0), dt=dt)
    starts, ends = array(0.03, 0.07, 0.03), array(0.07, 0.33, 0.33)
    first, second, both = jax.jit(jax.vmap(path.evaluate))(starts, ends)
    np.testing.assert_allclose(
        first + second, both, atol=20 * float(jnp.finfo(dtype).eps)
    )
    assert both.dtype == dtype
    assert 0.2 < jnp.std(both) < 0.9


@pytest.mark.parametrize("dt", by_default_unless((0.25,), (0.3, 0.25)))
def test_solves_in_both_directions_see_one_path(dt):
    """Also where `dt` does not divide the interval, so that steps backwards are not
    those forwards.
    """
    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=dt)
    terms = diffrax.ControlTerm(lambda t, y, args: jnp.ones(()), path)
    solve = lambda t0, t1, dt0: diffrax.diffeqsolve(
        terms, diffrax.Heun(), t0, t1, dt0, jnp.zeros(())
    )
    forwards, backwards = solve(0.0, 1.0, dt).ys[-1], solve(1.0, 0.0, -dt).ys[-1]
    assert np.isclose(forwards, path.evaluate(0.0, 1.0), rtol=1e-12)
    assert np.isclose(backwards, -forwards, rtol=1e-12)


def test_dtypes_that_jax_would_make_narrower():
    jax.config.update("jax_enable_x64", False)
    try:
        for dtype in ("float64", "complex128"):
            shape = jax.ShapeDtypeStruct((2,), dtype)
            with pytest.raises(ValueError, match="jax_enable_x64"):
                BrownianInterval(0.0, 1.0, shape, jr.key(0))
    finally:
        jax.config.update("jax_enable_x64", True)
