"""Solves on which reversible Heun is unstable are told from those where it is not."""

import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from helpers import by_default_unless, keys, make_terms

from diffrax_sde_adjoint import (
    EES25,
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    ito_to_stratonovich,
)


def diagonal(fn):
    return lambda t, y, p: lx.DiagonalLinearOperator(fn(y, p))


def heston_drift(t, y, p):
    variance = jnp.maximum(y[1], 1e-4)
    return jnp.stack([-0.5 * variance, 2.0 * (0.04 - variance)])


def heston_diffusion(t, y, p):
    root = jnp.sqrt(jnp.maximum(y[1], 1e-4))
    correlated = p * root * jnp.array([-0.7, 0.51**0.5])
    return jnp.stack([jnp.stack([root, jnp.zeros_like(root)]), correlated])


def net(key, num, width=8):
    key0, key1 = jr.split(jr.key(key))
    first = jr.normal(key0, (width, num)) / num**0.5
    last = jr.normal(key1, (num, width)) / width**0.5
    return lambda y: last @ jnp.tanh(first @ y)


drift_net, diffusion_net = net(0, 4), net(1, 4)
call = lambda y: jnp.maximum(jnp.exp(y[0]) - 1, 0)
square = lambda y: jnp.sum(y**2)
heston = (heston_drift, heston_diffusion, (2,), jnp.array([0.0, 0.04]))
ou = (
    lambda t, y, p: -p * y,
    diagonal(lambda y, p: 0.5 + 0 * y),
    (1,),
    jnp.array([1.0]),
)
wells = (
    lambda t, y, p: p * (y - y**3),
    diagonal(lambda y, p: 0.5 + 0 * y),
    (1,),
    jnp.array([0.5]),
)
waves = (
    lambda t, y, p: jnp.sin(3 * y),
    diagonal(lambda y, p: p * jnp.cos(y)),
    (1,),
    jnp.array([0.5]),
)
# Drift, diffusion, shape of the noise and `y0`; the parameter; the loss; the time, and
# the number of steps. Those of Heston are in the sense of Itô.
bad = {
    "OU, rate times length 16": (ou, 1.0, square, 16.0, 1600),
    "OU, rate times length 15, shorter": (ou, 5.0, square, 3.0, 300),
    "OU about 1000": (
        (
            lambda t, y, p: -p * (y - 1000),
            diagonal(lambda y, p: 0.5 + 0 * y),
            (1,),
            jnp.array([1001.0]),
        ),
        8.0,
        square,
        2.0,
        200,
    ),
    "drift with several zeros": (waves, 0.3, square, 3.0, 300),
    "double well": (wells, 1.0, square, 3.0, 300),
    "Heston": (heston, 0.3, call, 1.0, 100),
    "Heston, very volatile": (heston, 0.5, call, 1.0, 100),
}
good = {
    "OU": (ou, 1.0, square, 8.0, 800),
    "double well": (wells, 1.0, square, 1.0, 100),
    "drift with several zeros": (waves, 0.3, square, 1.0, 100),
    "Heston, less volatile": (heston, 0.1, call, 1.0, 100),
    "geometric Brownian motion": (
        (
            lambda t, y, p: 0.1 * y,
            diagonal(lambda y, p: p * y),
            (1,),
            jnp.array([1.0]),
        ),
        0.5,
        square,
        2.0,
        40,
    ),
    "oscillator": (
        (
            lambda t, y, p: p * jnp.stack([y[1], -y[0]]),
            diagonal(lambda y, p: 0.1 + 0 * y),
            (2,),
            jnp.array([1.0, 0.0]),
        ),
        3.0,
        square,
        5.0,
        500,
    ),
    "networks": (
        (
            lambda t, y, p: p * drift_net(y),
            diagonal(lambda y, p: 0.5 * jnp.tanh(diffusion_net(y))),
            (4,),
            jnp.array([0.5, -1.0, 0.3, 0.0]),
        ),
        1.0,
        square,
        3.0,
        60,
    ),
    "a solution that does not move": (
        (
            lambda t, y, p: 0 * p * y,
            diagonal(lambda y, p: 0 * y),
            (1,),
            jnp.array([1.0]),
        ),
        1.0,
        square,
        1.0,
        100,
    ),
}


def gradient(case, solver, adjoint, *, num_paths=1000, throw=True, dtype=jnp.float64):
    (drift, diffusion, shape, y0), parameter, loss, t1, num_steps = case
    t0, t1 = jnp.zeros((), dtype), jnp.array(t1, dtype)
    dt = t1 / num_steps

    def solve(p, key):
        noise = jax.ShapeDtypeStruct(shape, dtype)
        path = BrownianInterval(t0, t1, noise, key, dt=dt)
        terms = make_terms(drift, diffusion, path)
        if diffusion is heston_diffusion:
            terms = ito_to_stratonovich(terms)
        y = diffrax.diffeqsolve(
            terms,
            solver,
            t0,
            t1,
            dt,
            y0.astype(dtype),
            p,
            adjoint=adjoint,
            throw=throw,
            max_steps=num_steps,
        ).ys[-1]
        return loss(y)

    def mean(p):
        return jnp.mean(jax.vmap(solve, (None, 0))(p, keys(num_paths)))

    return jax.jit(jax.grad(mean))(jnp.array(parameter, dtype))


def raises():
    return pytest.raises(RuntimeError, match="`ReversibleHeun` is not stable on this")


slow = (
    "OU, rate times length 16",
    "OU, rate times length 15, shorter",
    "drift with several zeros",
    "double well",
    "Heston, very volatile",
)


def is_slow(name, checkpoint_every):
    is_default = checkpoint_every is None
    return (
        name in slow
        or is_default != name.startswith("OU")
        or checkpoint_every == "store_all"
    )


@pytest.mark.parametrize(
    "name,checkpoint_every",
    by_default_unless(is_slow, itertools.product(bad, (None, 10, "store_all"))),
)
def test_unstable(name, checkpoint_every):
    """Also where what is kept makes the way back exact."""
    store_all = checkpoint_every == "store_all"
    adjoint = StochasticAdjoint(None if store_all else checkpoint_every, store_all)
    # Of more paths in a double well, one overflows, and the loss with it.
    num = 200 if name == "double well" else 1000
    with raises():
        gradient(bad[name], ReversibleHeun(), adjoint, num_paths=num)


@pytest.mark.slow
def test_without_an_error():
    adjoint = StochasticAdjoint(checkpoint_every=10)
    out = gradient(bad["Heston"], ReversibleHeun(), adjoint, throw=False)
    assert jnp.isnan(out)


@pytest.mark.slow
def test_wrong_gradient():
    """What the error keeps a user from: a derivative of the wrong sign."""
    case, default = bad["Heston"], diffrax.RecursiveCheckpointAdjoint()
    wrong = gradient(case, ReversibleHeun(), default)
    right = gradient(case, diffrax.Heun(), StochasticAdjoint())
    assert right < 0 < wrong


@pytest.mark.parametrize(
    "name",
    by_default_unless(
        (
            "geometric Brownian motion",
            "OU",
            "double well",
            "drift with several zeros",
            "Heston, less volatile",
            "oscillator",
            "networks",
            "a solution that does not move",
        ),
        good,
    ),
)
def test_stable(name):
    """As accurate as Heun's method."""
    # The derivative of fewer paths of Heston happens to be near zero.
    num = 4000 if name.startswith("Heston") else 1000
    adjoint = StochasticAdjoint()
    ours = gradient(good[name], ReversibleHeun(), adjoint, num_paths=num)
    if name == "networks":
        store_all = StochasticAdjoint(store_all=True)
        kept = gradient(good[name], ReversibleHeun(), store_all, num_paths=num)
        np.testing.assert_allclose(kept, ours, rtol=1e-6)
    expected = gradient(good[name], diffrax.Heun(), adjoint, num_paths=num)
    np.testing.assert_allclose(ours, expected, rtol=0.1)


@pytest.mark.slow
def test_rounding():
    """Is no sign of instability."""
    case = (ou, 0.5, square, 5.0, 10_000)
    solve = lambda dtype: gradient(
        case,
        ReversibleHeun(),
        StochasticAdjoint(checkpoint_every=200),
        num_paths=2,
        dtype=dtype,
    )
    assert jnp.isfinite(solve(jnp.float32))


def ou_loss(rate, key, *, solver=None, y0=1.0):
    """For a path, and a rate that may be too large."""
    t1, dt = 3.0, 0.01
    path = BrownianInterval(0.0, t1, (), key, dt=dt)
    terms = make_terms(
        lambda t, y, args: -rate * y, lambda t, y, args: jnp.array(0.5), path
    )
    sol = diffrax.diffeqsolve(
        terms,
        ReversibleHeun() if solver is None else solver,
        0.0,
        t1,
        dt,
        jnp.asarray(y0),
        adjoint=StochasticAdjoint(checkpoint_every=10),
        max_steps=300,
    )
    return sol.ys[-1] ** 2


@pytest.mark.slow
def test_batches():
    """What is wrong in one element is an error whichever is outside: `jax.vmap` or
    `jax.grad`; whatever the size of others; and if another one is NaN.
    """

    def total(rates, y0):
        return jnp.sum(
            jax.vmap(lambda *x: ou_loss(*x[:2], y0=x[2]))(rates, keys(4), y0)
        )

    def of_each(rates, y0):
        gradient = jax.grad(lambda rate, key, y0: ou_loss(rate, key, y0=y0))
        return jax.vmap(gradient)(rates, keys(4), y0)

    good, bad = jnp.full(4, 0.5), jnp.array([0.5, 0.5, 0.5, 6.0])
    ones = jnp.ones(4)
    of_each, of_total = jax.jit(of_each), jax.jit(jax.grad(total))
    for gradient in (of_each, of_total):
        assert jnp.all(jnp.isfinite(gradient(good, ones)))
        with raises():
            gradient(bad, ones)
        with raises():
            gradient(bad, ones.at[0].set(jnp.nan))
    with raises():
        of_each(bad, ones.at[0].set(1e4))


def test_subclass():
    class Same(ReversibleHeun):
        pass

    with raises():
        jax.jit(jax.grad(lambda rate: ou_loss(rate, jr.key(0), solver=Same())))(6.0)


# JAX raises the one or the other, by whether a function has static arguments.
failure = (RuntimeError, ValueError)


def cubic_loss(rate, y0, is_masked=False, solver=None, store_all=False):
    """Of paths, some of which may be too far out for the steps, and may be left out."""

    def end(y0, key):
        path = BrownianInterval(0.0, 20.0, (), key, dt=0.1)
        terms = make_terms(
            lambda t, y, rate: -rate * y**3, lambda t, y, args: jnp.array(0.5), path
        )
        return diffrax.diffeqsolve(
            terms,
            ReversibleHeun() if solver is None else solver,
            0.0,
            20.0,
            0.1,
            y0,
            args=rate,
            adjoint=StochasticAdjoint(store_all=store_all),
        ).ys[-1]

    ends = jax.vmap(end)(y0, keys(2)[: len(y0)])
    if is_masked:
        ends = jnp.where(jnp.isfinite(ends), ends, 0)
    return jnp.mean(jnp.abs(ends))


@pytest.mark.slow
@pytest.mark.parametrize("store_all", (False, True))
def test_overflow(store_all):
    """Is an error, though all cotangents are NaN with the loss; but for a NaN that is
    the user's.
    """
    loss = functools.partial(cubic_loss, store_all=store_all)
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    rate, near = jnp.array(0.02), jnp.array([0.5, 1.0])
    far = near.at[1].set(50.0)
    assert jnp.isfinite(gradient(rate, near, False))
    with pytest.raises(failure, match="arrives at is not finite"):
        gradient(rate, far, False)
    assert jnp.isnan(gradient(rate, near.at[1].set(jnp.nan), False))
    assert jnp.isnan(gradient(jnp.array(jnp.nan), near, False))
    # What the loss leaves out is none, but a product of zero and NaN.
    assert jnp.isnan(gradient(rate, far, True))
    of_y0 = jax.jit(jax.grad(loss, argnums=1), static_argnums=2)
    assert jnp.all(jnp.isfinite(of_y0(rate, far, True)[:1]))


@pytest.mark.slow
def test_overflow_of_the_way_back():
    """Of a solve that is fine itself."""
    gradient = jax.jit(jax.value_and_grad(cubic_loss), static_argnums=(2, 3, 4))
    args = jnp.array(3.0), jnp.ones(2), False, EES25()
    value, _ = gradient(*args, True)
    assert jnp.isfinite(value)
    with pytest.raises(failure, match="could not undo the steps"):
        gradient(*args, False)
