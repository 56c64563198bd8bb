"""Energy scores have no bias, are least for equal laws, and have right gradients."""

import itertools
from inspect import unwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
import scipy.stats
from helpers import by_default_unless

from diffrax_sde_adjoint import WindowedEnergyScore, energy_score
from diffrax_sde_adjoint._score import random_window


def is_mean(found, expected, tol=0.0):
    """Whether the mean is as expected, up to its standard error."""
    found = np.asarray(found, float)
    return abs(found.mean() - expected) < 4 * scipy.stats.sem(found) + tol


def mean_distance(mean, std):
    """The mean of `|mean + std z|`, for a standard normal `z`."""
    norm = jax.scipy.stats.norm
    return 2 * std * norm.pdf(mean / std) + mean * (2 * norm.cdf(mean / std) - 1)


def by_hand(x, y, mask=None):
    """The score, from the distance of each pair."""
    score = 0
    pairs = list(itertools.permutations(range(len(y)), 2))
    for i in range(len(x)):
        known = slice(None) if mask is None else mask[i]
        length = lambda z, known=known: jnp.linalg.norm(z[known].ravel())
        score += sum(length(x[i] - y[j]) for j in range(len(y))) / len(y)
        score -= sum(length(y[j] - y[k]) for j, k in pairs) / (2 * len(pairs))
    return score / len(x)


@pytest.mark.parametrize(
    "dtype", (jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.slow))
)
def test_of_normal_laws(dtype):
    """Of data N(0, 1), and samples N(m, s^2): value and gradient, without bias."""
    mean, std = 0.7, 1.5

    @jax.jit
    @jax.vmap
    def score(key):
        x_key, y_key = jr.split(key)
        x, z = jr.normal(x_key, (6,), dtype), jr.normal(y_key, (5,), dtype)
        of = lambda mean, std: energy_score(x, mean + std * z)
        args = jnp.array(mean, dtype), jnp.array(std, dtype)
        return of(*args), *jax.grad(of, argnums=(0, 1))(*args)

    found = score(jr.split(jr.key(0), 100_000))
    exact = lambda mean, std: (
        mean_distance(mean, jnp.sqrt(1 + std**2)) - std / np.sqrt(np.pi)
    )
    value, grads = jax.value_and_grad(exact, argnums=(0, 1))(mean, std)
    for x, expected in zip(found, (value, *grads), strict=True):
        assert x.dtype == dtype
        assert is_mean(x, expected)


def test_of_equal_laws():
    """It is half the distance of two of the data, and its gradient is zero."""
    dim = 12

    @jax.jit
    @jax.vmap
    def score(key):
        x, y = jr.normal(key, (2, 8, 3, 4))
        return jax.value_and_grad(lambda scale: energy_score(x, scale * y))(1.0)

    value, grad = score(jr.split(jr.key(0), 20_000))
    gamma = scipy.special.gamma
    expected = gamma((dim + 1) / 2) / gamma(dim / 2)
    assert is_mean(value, expected)
    assert is_mean(grad, 0)


@pytest.mark.parametrize(
    "dtype", (jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.slow))
)
def test_equals_all_pairs(dtype):
    x = jr.normal(jr.key(0), (2, 3, 5, 2), dtype)
    y = 0.5 + jr.normal(jr.key(1), (2, 4, 5, 2), dtype)
    both = lambda score: jax.value_and_grad(score, argnums=(0, 1))
    found = jax.jit(jax.vmap(both(energy_score)))(x, y)
    tol = 100 * float(jnp.finfo(dtype).eps)
    for i in range(2):
        expected = both(by_hand)(x[i], y[i])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a[i], b, atol=tol)
    # Far from zero, only the data are rounded.
    far = energy_score(x[0] + 1000, y[0] + 1000)
    assert abs(far - energy_score(x[0], y[0])) < 1e3 * tol


@pytest.mark.slow
def test_distances_of_zero():
    x = jnp.arange(6.0).reshape(3, 2)
    value, (of_x, of_y) = jax.value_and_grad(energy_score, argnums=(0, 1))(x, x)
    distances = jnp.sqrt(8.0) * jnp.array([0.0, 1, 2, 1, 0, 1, 2, 1, 0])
    np.testing.assert_allclose(value, distances.mean() - distances.sum() / 12)
    assert jnp.all(jnp.isfinite(of_x)) and jnp.all(jnp.isfinite(of_y))
    same = jnp.ones((3, 2))
    value, grad = jax.value_and_grad(energy_score, argnums=1)(same, same)
    assert value == 0 and jnp.all(grad == 0)
    mask = same > 0
    value, grad = jax.value_and_grad(energy_score, argnums=1)(same, same, mask)
    assert value == 0 and jnp.all(grad == 0)


def test_what_is_not_a_number():
    """A generator that has diverged does not have a good score."""
    x = jr.normal(jr.key(0), (4, 3), jnp.float32)
    for bad in (jnp.nan, jnp.inf, 1e25):
        y = x.at[2, 1].set(bad)
        for mask in (None, jnp.ones_like(x, bool)):
            assert not jnp.isfinite(energy_score(x, y, mask))
            assert not jnp.isfinite(energy_score(y, x, mask))
    # One that is far off does not hide what the others have.
    far = x.at[2, 1].set(1e6)
    _, grad = jax.value_and_grad(energy_score, argnums=1)(x, far)
    assert jnp.all(jnp.abs(grad[:2]) > 1e-3)


def test_mask():
    """Each of the data takes some of all pairs: here, alike ones take them all."""
    y = jr.normal(jr.key(0), (4, 5))
    x = jnp.repeat(jr.normal(jr.key(1), (2, 5)), 3, axis=0)
    mask = jnp.array([[True, False, True, True, False], [False] * 4 + [True]])
    mask = jnp.repeat(mask, 3, axis=0)
    both = lambda score: jax.value_and_grad(score, argnums=1)
    expected = both(by_hand)(x, y, np.asarray(mask))
    found = jax.jit(both(energy_score))(jnp.where(mask, x, jnp.nan), y, mask)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    # What is not known of any has no part.
    assert jnp.all(found[1][:, 1] == 0)

    whole = energy_score(x, y, jnp.ones_like(mask))
    np.testing.assert_allclose(whole, energy_score(x, y), atol=1e-12)


def walks(key, num, dtype=jnp.float64):
    """Two channels, of which the second is larger, and smooth."""
    steps = jr.normal(key, (num, 20, 2), dtype) * jnp.array([0.1, 1], dtype)
    walk = jnp.cumsum(steps, axis=1)
    return walk.at[..., 1].set(jnp.cumsum(walk[..., 1], axis=1) + 50)


def test_windows():
    times, window = 20, 4
    indices = jax.vmap(lambda key: random_window(key, times, window))
    found = np.asarray(jax.jit(indices)(jr.split(jr.key(0), 40_000)))
    assert found.min() == 0 and found.max() == times - 1
    strides = np.diff(found, axis=1)
    assert np.all(strides == strides[:, :1])
    assert set(strides[:, 0]) == {1, 2, 3, 4, 5, 6}
    share = np.mean(strides[:, 0] == 1)
    assert abs(share - np.log(2) / np.log(7)) < 0.01
    counts = np.bincount(found.ravel(), minlength=times) / found.size * times
    assert np.all((0.5 < counts) & (counts < 1.6))
    assert np.all(np.asarray(random_window(jr.key(0), 5, 5)) == np.arange(5))


@pytest.mark.slow
def test_whitened_windows():
    """The score does not depend on the unit of a channel, nor on its zero."""
    data, other = walks(jr.key(0), 500), walks(jr.key(1), 60)
    masks = (None, jr.bernoulli(jr.key(2), 0.7, data.shape))
    settings = dict(num_windows=2)

    @jax.jit
    def both(factor, shift):
        changed = lambda x: factor * x + shift
        scores = (
            WindowedEnergyScore(changed(data), mask, **settings)(
                changed(data[:50]),
                changed(other),
                jr.key(3),
                None if mask is None else mask[:50],
            )
            for mask in masks
        )
        return jnp.stack(list(scores))

    found = both(jnp.ones(2), jnp.zeros(2))
    of_changed = both(jnp.array([3.0, 0.01]), jnp.array([-7.0, 7.0]))
    np.testing.assert_allclose(of_changed, found, rtol=1e-6)

    # The covariance of the data, and that of what is known of them.
    size = 8
    score = WindowedEnergyScore(data, window=4, num_windows=1, weight_of_whole=0.0)
    times = random_window(jr.split(jr.key(3), 1)[0], 20, 4)
    values = np.asarray(data[:, times]).reshape(-1, size)
    added = np.diag(1e-4 * np.tile(np.var(np.asarray(data), axis=(0, 1)), 4))
    covariance = np.cov(values.T, bias=True) + added
    y = np.asarray(other[:4, times]).reshape(4, size)
    for mask in (None, np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)):
        known = np.ones(size, bool) if mask is None else mask
        whiten = np.linalg.inv(np.linalg.cholesky(covariance[np.ix_(known, known)]))
        x, white_y = (z[:, known] @ whiten.T for z in (values[:2], y))
        distance = lambda a, b: np.linalg.norm(a[:, None] - b, axis=-1)
        expected = distance(x, white_y).mean() - distance(white_y, white_y).sum() / 24
        all_pairs = jnp.repeat(data[:2], 3, axis=0)
        full = None
        if mask is not None:
            at_times = jnp.ones((20, 2), bool).at[times].set(mask.reshape(4, 2))
            full = jnp.broadcast_to(at_times, all_pairs.shape)
        found = eqx.filter_jit(score)(all_pairs, other[:4], jr.key(3), full)
        np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize(
    "with_mask", by_default_unless(lambda _: True, (False, True), long=(True,))
)
def test_least_for_equal_laws(with_mask):
    """Among series that are scaled, moved, or have rougher changes."""
    f32 = jnp.float32
    data = walks(jr.key(0), 1000, f32)
    mask = jr.bernoulli(jr.key(1), 0.7, data.shape) if with_mask else None
    score = WindowedEnergyScore(data, mask, num_windows=8)
    std = jnp.array([0.1, 1.0], f32)

    def of_changed(factor, shift, rough, key):
        keys = jr.split(key, 4)
        noise = jr.normal(keys[0], (60, 20, 2), f32)
        y = factor * walks(keys[1], 60, f32) + std * (shift + rough * noise)
        index = jr.choice(keys[2], len(data), (60,))
        part = None if mask is None else mask[index]
        return score(data[index], y, keys[3], part)

    grads = jax.grad(of_changed, argnums=(0, 1, 2))

    @jax.jit
    def at(*changes):
        changes = [jnp.asarray(x, f32) for x in changes]
        keys = jr.split(jr.key(3), 200)
        return jax.lax.map(lambda key: grads(*changes, key), keys)

    for found in at(1.0, 0.0, 0.0):
        assert is_mean(found, 0, tol=5e-3)
    surely = lambda found: found.mean() / scipy.stats.sem(found)
    assert surely(at(0.7, 0.0, 0.0)[0]) < -10
    assert surely(at(1.3, 0.0, 0.0)[0]) > 10
    assert surely(at(1.0, 0.5, 0.0)[1]) > 10
    assert surely(at(1.0, 0.0, 0.3)[2]) > 10


def test_errors():
    x = jnp.ones((4, 6, 2))
    error = lambda match: pytest.raises(ValueError, match=match)
    with error("of one shape but for the first"):
        energy_score(x, x[:, :5])
    with error("of one dtype"):
        energy_score(x, x.astype(jnp.float32))
    with error("two of `generated`"):
        energy_score(x, x[:1])
    with error("floating point"):
        unwrap(energy_score)(x.astype(int), x.astype(int))
    with error("array of booleans"):
        unwrap(energy_score)(x, x, x)
    data = jr.normal(jr.key(0), x.shape)
    score = WindowedEnergyScore(data, window=3)
    with error("was made with series of shape"):
        score(data[:, :5], data[:, :5], jr.key(0))
    with error(r"data\[..., None\]"):
        WindowedEnergyScore(data[..., 0])
    with error("of the shape of `data`"):
        WindowedEnergyScore(data, data[:, :2] > 0)
    for window in (1, 7):
        with error("at least two, and at most"):
            WindowedEnergyScore(data, window=window)
    with error("not both zero"):
        WindowedEnergyScore(data, num_windows=0, weight_of_whole=0.0)
    with error("positive `regularisation`"):
        WindowedEnergyScore(data, window=3, regularisation=0.0)
    for constant in (1.0, 0.1):
        with pytest.raises(RuntimeError, match="no channel that is constant"):
            same = jnp.full_like(x, constant, jnp.float32)
            WindowedEnergyScore(same, window=3)
    with pytest.raises(RuntimeError, match="in which both are known"):
        WindowedEnergyScore(data, jnp.ones_like(x, bool).at[:, 2].set(False), window=3)
