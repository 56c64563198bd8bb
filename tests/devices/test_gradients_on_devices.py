"""Gradients of a batch do not depend on the number of devices that share it, which add
them up once.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from collectives import collectives
from diffrax import ControlTerm, MultiTerm, ODETerm, SaveAt, diffeqsolve
from jax.sharding import Mesh, PartitionSpec

from diffrax_sde_adjoint import (
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    path_kl,
)


BATCH, DIM = 8, 2
TIMES = 0.0, 1.0, 0.25  # of the start, the end, and a step


class Model(eqx.Module):
    drift: eqx.nn.MLP
    diffusion: eqx.nn.MLP
    prior: eqx.nn.MLP

    def __init__(self, dtype):
        keys = jr.split(jr.key(0), 3)
        mlp = lambda key: eqx.nn.MLP(DIM, DIM, 4, 1, jnp.tanh, dtype=dtype, key=key)
        self.drift, self.diffusion, self.prior = map(mlp, keys)


def drift(t, y, model):
    return model.drift(y)


def prior(t, y, model):
    return model.prior(y)


def diffusion(t, y, model):
    return lx.DiagonalLinearOperator(0.5 + jax.nn.sigmoid(model.diffusion(y)))


def of_batch(field):
    """A vector field of a batch in one state."""

    def batched(t, y, model):
        out = jax.vmap(field, in_axes=(None, 0, None))(t, y, model)
        if isinstance(out, lx.DiagonalLinearOperator):
            return lx.DiagonalLinearOperator(out.diagonal)
        return out

    return batched


def terms_of(y0, key, rows):
    struct = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
    t0, t1, dt = jnp.asarray(TIMES, y0.dtype)
    path = BrownianInterval(t0, t1, struct, key, dt=dt, rows=rows)
    return MultiTerm(ODETerm(of_batch(drift)), ControlTerm(of_batch(diffusion), path))


def solve(terms, solver, y0, model, **kwargs):
    t0, t1, dt = jnp.asarray(TIMES, jax.tree.leaves(y0)[0].dtype)
    kwargs["adjoint"] = StochasticAdjoint()
    return diffeqsolve(terms, solver, t0, t1, dt, y0, model, **kwargs).ys


# Each is of some rows of a batch, and adds up to that of the whole; and returns the
# numbers of steps, if there are more than one.


def reverse(model, y0, key, rows):
    ys = solve(terms_of(y0, key, rows), ReversibleHeun(), y0, model)
    return jnp.sum(ys**2), ()


def replay(model, y0, key, rows):
    terms = terms_of(y0, key, rows)
    saveat = SaveAt(ts=jnp.asarray([0.3, 0.5, 0.9], y0.dtype))
    return jnp.sum(solve(terms, diffrax.Heun(), y0, model, saveat=saveat) ** 2), ()


def divergence(model, y0, key, rows):
    terms = path_kl(terms_of(y0, key, rows), of_batch(prior))
    y0 = (y0, jnp.zeros(len(y0), y0.dtype))
    return jnp.sum(solve(terms, ReversibleHeun(), y0, model)[1]), ()


def adaptive(model, y0, key, rows):
    """Each element in steps of its own."""
    first = 0 if rows is None else rows[0]
    index = first + jnp.arange(len(y0), dtype=jnp.int32)

    def one(y0, i):
        struct = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
        t0, t1, dt = jnp.asarray(TIMES, y0.dtype)
        path = BrownianInterval(t0, t1, struct, jr.fold_in(key, i), dt=dt, levels=4)
        # The later, the harder.
        scaled = lambda t, y, model: i.astype(y.dtype) / 4 * drift(t, y, model)
        return diffeqsolve(
            MultiTerm(ODETerm(scaled), ControlTerm(diffusion, path)),
            diffrax.Heun(),
            t0,
            t1,
            dt,
            y0,
            model,
            stepsize_controller=diffrax.PIDController(rtol=0.02, atol=0.02),
            adjoint=StochasticAdjoint(),
            max_steps=64,
        )

    sol = jax.vmap(one)(y0, index)
    return jnp.sum(sol.ys**2), sol.stats["num_accepted_steps"]


def on_devices(value_and_grad, num, params, y0, key):
    """The compiled program, and what it returns."""
    spec = PartitionSpec

    def part(params, y0, key):
        rows = (jax.lax.axis_index("devices") * len(y0), BATCH)
        (value, num_steps), grads = value_and_grad(params, y0, key, rows)
        return jax.lax.psum((value, grads), "devices"), num_steps

    sharded = jax.shard_map(
        part,
        mesh=Mesh(np.array(jax.devices()[:num]), ("devices",)),
        in_specs=(spec(), spec("devices"), spec()),
        out_specs=(spec(), spec("devices")),
        check_vma=False,
    )
    compiled = jax.jit(sharded).lower(params, y0, key).compile()
    return compiled, *compiled(params, y0, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn, nums, dtype",
    [
        (reverse, (2, 4, 8), jnp.float32),
        (reverse, (8,), jnp.float64),
        (replay, (4,), jnp.float32),
        (divergence, (8,), jnp.float32),
        (adaptive, (4,), jnp.float64),
    ],
)
def test_gradients_do_not_depend_on_the_number_of_devices(fn, nums, dtype):
    tol = {jnp.float32: 1e-6, jnp.float64: 1e-12}[dtype]
    params, static = eqx.partition(Model(dtype), eqx.is_array)
    args = params, jr.normal(jr.key(1), (BATCH, DIM), dtype), jr.key(2)

    def value_and_grad(params, *args):
        of = lambda params: fn(eqx.combine(params, static), *args)
        return jax.value_and_grad(of, has_aux=True)(params)

    (value, num_steps), grads = jax.jit(value_and_grad)(*args, None)
    expected = (value, grads)
    scale = max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(expected))
    if fn is adaptive:
        assert len(set(num_steps.tolist())) > 1
    for num in nums:
        compiled, got, steps = on_devices(value_and_grad, num, *args)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=float(tol * scale))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, steps, num_steps))
        in_loops, others = collectives(compiled.as_text())
        assert in_loops == []
        assert others == ["all-reduce"]
