"""The latent SDE of torchsde's Lorenz example, the same in diffrax, in plain JAX and in
torchsde: the solve of its posterior, with the divergence from the prior, from a context
that is indexed by time. All numbers are float32.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from ou import number

from diffrax_sde_adjoint import BrownianInterval, path_kl


_latent, _context, _width = 4, 64, 128
_t1, _dt, _num_steps = 2.0, 0.01, 200
_num_outputs = 100

# Weights and biases.
_Layers: TypeAlias = list[tuple[Float[Array, "..."], Float[Array, "..."]]]


class Inputs(NamedTuple):
    """All that is differentiated. Of `diffusion`, each entry of the state has its own
    network.
    """

    drift: _Layers
    prior_drift: _Layers
    diffusion: _Layers
    context: Float[Array, "times batch context"]
    y0: Float[Array, "batch latent"]


Loss: TypeAlias = Callable[[Inputs, PRNGKeyArray], Float[Array, ""]]


def initial(batch: int, num_times: int) -> Inputs:
    def network(key, *sizes):
        layers = []
        for n, m in itertools.pairwise(sizes):
            uniform = lambda key, *shape, n=n: (
                jr.uniform(key, shape, jnp.float32, -1, 1) / n**0.5
            )
            key, key0, key1 = jr.split(key, 3)
            layers.append((uniform(key0, n, m), uniform(key1, m)))
        return layers

    keys = jr.split(jr.key(0), 5)
    of_entry = lambda key: network(key, 1, _width, 1)
    normal = lambda key, *shape: jr.normal(key, shape, jnp.float32)
    return Inputs(
        network(keys[0], _latent + _context, _width, _width, _latent),
        network(keys[1], _latent, _width, _width, _latent),
        jax.vmap(of_entry)(jr.split(keys[2], _latent)),
        normal(keys[3], num_times, batch, _context),
        normal(keys[4], batch, _latent),
    )


def _apply(layers, x):
    *layers, (weight, bias) = layers
    for w, b in layers:
        x = jax.nn.softplus(x @ w + b)
    return x @ weight + bias


def _drift(t, y, inputs):
    num_times = len(inputs.context)
    ts = jnp.linspace(0, _t1, num_times, dtype=jnp.float32)
    index = jnp.minimum(jnp.searchsorted(ts, t, side="right"), num_times - 1)
    return _apply(inputs.drift, jnp.concatenate([y, inputs.context[index]], axis=1))


def _prior_drift(t, y, inputs):
    return _apply(inputs.prior_drift, y)


def _diffusion(t, y, inputs):
    (w0, b0), (w1, b1) = inputs.diffusion
    x = jax.nn.softplus(y[:, :, None] * w0[:, 0] + b0)
    return jax.nn.sigmoid(jnp.einsum("bij,ij->bi", x, w1[:, :, 0]) + b1[:, 0])


def _loss_of(ys, divergence):
    return jnp.mean(jnp.sum(ys**2, axis=(0, 2))) + jnp.mean(divergence)


def diffrax_loss(adjoint: diffrax.AbstractAdjoint) -> Loss:
    def loss(inputs, key):
        struct = jax.ShapeDtypeStruct(inputs.y0.shape, jnp.float32)
        zero, t1, dt = (number(x, jnp.float32) for x in (0, _t1, _dt))
        path = BrownianInterval(zero, t1, struct, key, dt=dt)
        diffusion = lambda *x: lx.DiagonalLinearOperator(_diffusion(*x))
        terms = path_kl(
            diffrax.MultiTerm(
                diffrax.ODETerm(_drift), diffrax.ControlTerm(diffusion, path)
            ),
            _prior_drift,
        )
        sol = diffrax.diffeqsolve(
            terms,
            diffrax.Euler(),
            t0=zero,
            t1=t1,
            dt0=dt,
            y0=(inputs.y0, jnp.zeros(len(inputs.y0), jnp.float32)),
            args=inputs,
            saveat=diffrax.SaveAt(ts=jnp.linspace(zero, t1, _num_outputs)),
            adjoint=adjoint,
            max_steps=_num_steps,
        )
        assert sol.ys is not None
        ys, divergence = sol.ys
        return _loss_of(ys, divergence[-1])

    return loss


def scan(length: int | None) -> Loss:
    """By hand, with outputs at half of the steps, and for a `length`, in segments of so
    many steps, of which JAX keeps the starts.
    """

    def loss(inputs, key):
        def step(carry, i):
            y, divergence = carry
            t = i.astype(jnp.float32) * _dt
            noise = jr.normal(jr.fold_in(key, i), y.shape, y.dtype) * _dt**0.5
            drift, diffusion = _drift(t, y, inputs), _diffusion(t, y, inputs)
            shift = (drift - _prior_drift(t, y, inputs)) / diffusion
            y = y + _dt * drift + diffusion * noise
            return (y, divergence + 0.5 * _dt * jnp.sum(shift**2, axis=1)), y

        carry = (inputs.y0, jnp.zeros(len(inputs.y0), jnp.float32))
        indices = jnp.arange(_num_steps)
        if length is None:
            carry, ys = lax.scan(step, carry, indices)
        else:
            segment = jax.checkpoint(lambda *x: lax.scan(step, *x))
            carry, ys = lax.scan(segment, carry, indices.reshape(-1, length))
            ys = ys.reshape(_num_steps, *ys.shape[2:])
        return _loss_of(ys[:: _num_steps // _num_outputs], carry[1])

    return loss


def torchsde_gradient(inputs: Inputs, adjoint: bool) -> Callable[[], Any]:
    """With torchsde's own term for the divergence."""
    import torch
    import torchsde

    tensor = lambda x: torch.tensor(np.asarray(x), requires_grad=True)
    inputs = jax.tree.map(tensor, inputs)
    times = torch.linspace(0, _t1, len(inputs.context))
    leaves = jax.tree.leaves(inputs)

    def apply(layers, x):
        *layers, (weight, bias) = layers
        for w, b in layers:
            x = torch.nn.functional.softplus(x @ w + b)
        return x @ weight + bias

    class SDE(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self):
            super().__init__()
            self.leaves = torch.nn.ParameterList(leaves)

        def f(self, t, y):
            index = min(torch.searchsorted(times, t, right=True), len(times) - 1)
            return apply(inputs.drift, torch.cat([y, inputs.context[index]], dim=1))

        def h(self, t, y):
            return apply(inputs.prior_drift, y)

        def g(self, t, y):
            columns = []
            for i in range(_latent):
                layers = [(w[i], b[i]) for w, b in inputs.diffusion]
                columns.append(torch.sigmoid(apply(layers, y[:, i : i + 1])))
            return torch.cat(columns, dim=1)

    sde = SDE()
    solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint
    kwargs = {"adjoint_params": leaves[:-1]} if adjoint else {}
    ts = torch.linspace(0, _t1, _num_outputs)

    def gradient():
        ys, divergence = solve(
            sde, inputs.y0, ts, dt=_dt, method="euler", logqp=True, **kwargs
        )
        loss = (ys**2).sum(dim=(0, 2)).mean() + divergence.sum(dim=0).mean()
        return torch.autograd.grad(loss, leaves)

    return gradient
