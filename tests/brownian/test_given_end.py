"""A path with a given end: a Brownian bridge. Its law is in `test_brownian_law.py`."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from diffrax import ControlTerm, MultiTerm, ODETerm, SaveAt, diffeqsolve
from helpers import by_default_unless, keys, relative_error, struct

from diffrax_sde_adjoint import (
    BackwardSDEAdjoint,
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
)


slow_grids = [dict(), dict(ts=[0.5, 0.6, 1.7, 2.5])]
grids = [dict(dt=0.07), *slow_grids]
dtypes = [jnp.float64, jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64]


@pytest.mark.parametrize("grid", by_default_unless(slow_grids, grids), ids=str)
def test_ends_there(grid):
    """On and off the grid, in parts and as a whole, forwards and backwards."""
    shape = {x.__name__: struct((2,), x) for x in dtypes}
    end = {name: jnp.array([1.5, -3], x.dtype) for name, x in shape.items()}

    @jax.jit
    def evaluate(end):
        path = BrownianInterval(0.5, 2.5, shape, jr.key(0), end=end, levels=3, **grid)
        add = lambda x, y: jax.tree.map(jnp.add, x, y)
        parts = add(path.evaluate(0.5, 1.234), path.evaluate(1.234, 2.5))
        back = path.evaluate(2.5, 0.5)
        return path.evaluate(2.5), parts, jax.tree.map(jnp.negative, back)

    for total in evaluate(end):
        for name, x in total.items():
            tol = 40 * float(jnp.finfo(x.dtype).eps)
            exact = np.asarray(end[name], np.complex128)
            error = np.abs(np.asarray(x, np.complex128) - exact)
            assert x.dtype == end[name].dtype and np.all(error <= tol)


@pytest.mark.slow
def test_only_increments_change():
    """H and K are those of the path with any end; so is the difference of two paths'
    increments, but for a straight line.
    """
    area = diffrax.SpaceTimeTimeLevyArea
    make = lambda **kwargs: BrownianInterval(
        0.0, 2.0, (3,), jr.key(1), dt=0.25, levels=2, levy_area=area, **kwargs
    )
    end = jnp.array([1.0, 0.0, -2.0])

    @jax.jit
    @jax.vmap
    def evaluate(t0, t1):
        paths = make(), make(end=end), make(end=2 * end)
        return [path.evaluate(t0, t1, use_levy=True) for path in paths]

    t0, t1 = jnp.array([[0.25, 0.0, 0.3, 1.9], [0.5, 2.0, 1.7, 0.2]])
    free, one, two = evaluate(t0, t1)
    for x in (one, two):
        np.testing.assert_array_equal(x.H, free.H)
        np.testing.assert_array_equal(x.K, free.K)
        np.testing.assert_array_equal(x.dt, free.dt)
    line = (t1 - t0)[:, None] / 2.0 * end
    np.testing.assert_allclose(two.W - one.W, line, atol=1e-14)


def solve(end, args, y0, key, *, adjoint, solver, dt=1 / 50, **kwargs):
    """The values at two times of an SDE with two noises, that do not commute."""
    path = BrownianInterval(0.0, 1.0, (2,), key, dt=dt, levels=2, end=end)
    diffusion = lambda t, y, a: a * jnp.stack([jnp.sin(y), jnp.cos(y)], axis=-1)
    terms = MultiTerm(ODETerm(lambda t, y, a: -a * y), ControlTerm(diffusion, path))
    return diffeqsolve(
        terms,
        solver,
        0.0,
        1.0,
        dt,
        y0,
        args=args,
        saveat=SaveAt(ts=jnp.array([0.3, 1.0])),
        adjoint=adjoint,
        **kwargs,
    ).ys


def gradients(adjoint, argnums, num=1, **kwargs):
    """With respect to the end, `args` and `y0`; of a batch, if `num` is above one."""
    each = lambda end, args, y0, key: jnp.mean(
        jnp.sin(solve(end, args, y0, key, adjoint=adjoint, **kwargs))
    )

    def loss(ends, args, y0):
        if num == 1:
            return each(ends[0], args, y0, jr.key(0))
        batched = jax.vmap(each, in_axes=(0, None, None, 0))
        return jnp.mean(batched(ends, args, y0, keys(num)))

    ends = jnp.array([[1.0, -0.5], [0.0, 0.0], [-2.0, 0.3]])[:num]
    return jax.jit(jax.grad(loss, argnums))(ends, jnp.array(0.7), jnp.array([1.0, 0.5]))


heun, reversible_heun = diffrax.Heun(), ReversibleHeun()


gradient_cases = {
    "batch": (StochasticAdjoint(), dict(solver=reversible_heun, num=3)),
    "replay": (StochasticAdjoint(), dict(solver=heun)),
    "store all": (StochasticAdjoint(store_all=True), dict(solver=heun)),
    "adaptive": (
        StochasticAdjoint(),
        dict(
            solver=reversible_heun,
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-3),
        ),
    ),
}


@pytest.mark.parametrize(
    "case",
    by_default_unless(("batch", "store all", "adaptive"), gradient_cases),
)
def test_gradients(case):
    """Also with respect to the end."""
    adjoint, kwargs = gradient_cases[case]
    ours = gradients(adjoint, (0, 1, 2), **kwargs)
    exact = gradients(diffrax.RecursiveCheckpointAdjoint(), (0, 1, 2), **kwargs)
    assert relative_error(ours, exact) < 1e-11


@pytest.mark.slow
def test_backward_sde():
    """Its gradients are those of the exact adjoint up to the error of its steps, but
    with respect to the end of a path there is none.
    """
    kwargs = dict(solver=heun, dt=1 / 800)
    approximate = gradients(BackwardSDEAdjoint(), (1, 2), **kwargs)
    exact = gradients(StochasticAdjoint(), (1, 2), **kwargs)
    assert relative_error(approximate, exact) < 0.03
    with pytest.raises(ValueError, match="what is in a control or a Brownian path"):
        gradients(BackwardSDEAdjoint(), (0, 1), **kwargs)


@pytest.mark.slow
def test_gradient_with_respect_to_the_end_by_differences():
    args, y0 = jnp.array(0.7), jnp.array([1.0, 0.5])

    @jax.jit
    def value(end):
        adjoint = StochasticAdjoint()
        ys = solve(end, args, y0, jr.key(3), adjoint=adjoint, solver=reversible_heun)
        return jnp.sum(ys**2)

    end, direction, eps = jnp.array([0.4, -1.0]), jnp.array([1.0, 2.0]), 1e-5
    up, down = value(end + eps * direction), value(end - eps * direction)
    slope = jax.jit(jax.grad(value))(end) @ direction
    np.testing.assert_allclose(slope, (up - down) / (2 * eps), rtol=1e-7)


@pytest.mark.slow
def test_stratified_sampling():
    """Ends that are one from each part of equal probability: the mean of a function of
    the path is the same, and that of the end is known much better.
    """
    num, repeats = 64, 200

    @jax.jit
    @jax.vmap
    def means(key):
        key, uniform_key = jr.split(key)
        probability = (jnp.arange(float(num)) + jr.uniform(uniform_key, (num,))) / num
        stratified = jax.scipy.special.ndtri(probability)

        def functionals(end, key):
            path = BrownianInterval(0.0, 1.0, (), key, dt=0.05, end=end)
            values = jax.vmap(path.evaluate)(jnp.linspace(0.05, 1.0, 20))
            # Of the end, and of the whole path.
            return jnp.cos(values[-1]), jnp.mean(values**2)

        of_free = jax.vmap(lambda key: functionals(None, key))
        of_stratified = jax.vmap(functionals)
        each = jr.split(key, num)
        outs = of_free(each), of_stratified(stratified, each)
        return jax.tree.map(lambda x: jnp.mean(x), outs)

    free, stratified = jax.tree.map(np.asarray, means(keys(repeats)))
    # E cos(W(1)), and the mean of t over the 20 times.
    exact = (np.exp(-0.5), 0.525)
    for x, expected in zip(stratified, exact, strict=True):
        std_error = np.std(x) / np.sqrt(repeats)
        assert abs(np.mean(x) - expected) < 5 * std_error
    gain = [np.var(x) / np.var(y) for x, y in zip(free, stratified, strict=True)]
    assert gain[0] > 100 and gain[1] > 1.5


@pytest.mark.slow
def test_rows():
    """Each row of a batch has its own end."""
    end = jnp.arange(8.0).reshape(4, 2)
    make = lambda num, end, rows: BrownianInterval(
        0.0, 1.0, (num, 2), jr.key(0), dt=0.25, levels=2, end=end, rows=rows
    )

    @jax.jit
    def evaluate(end):
        paths = make(4, end, None), make(2, end[1:3], (1, 4))
        return [path.evaluate(0.1, 0.75) for path in paths]

    whole, rows = evaluate(end)
    np.testing.assert_allclose(rows, whole[1:3], rtol=1e-12)


@pytest.mark.slow
def test_batch_of_grids():
    """Of different numbers of cells, in another precision than the path."""

    @jax.jit
    @jax.vmap
    def whole(dt, end):
        t0, t1 = jnp.float32(0), jnp.float32(1)
        path = BrownianInterval(
            t0, t1, struct((), jnp.float64), jr.key(0), dt=dt, end=end
        )
        return path.evaluate(t0, jnp.float32(0.3)), path.evaluate(t0, t1)

    end = jnp.array([1.0, -2.0, 0.5])
    parts, wholes = whole(jnp.float32([0.5, 0.25, 0.1]), end)
    np.testing.assert_allclose(wholes, end, atol=1e-6)
    assert len(set(np.asarray(parts).tolist())) == 3


@pytest.mark.parametrize(
    "shape, end",
    [((), jnp.zeros(2)), ((2,), 1.0), ((), {"x": 1.0}), ((), 1j)],
)
def test_ends_that_do_not_fit(shape, end, monkeypatch):
    # Users do not have the type checks that the tests have.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"`BrownianInterval\(end=...\)` must"):
        BrownianInterval(0.0, 1.0, shape, jr.key(0), end=end)
