"""A neural SDE, the same in diffrax and in torchsde.

The drift and the (diagonal) diffusion are perceptrons with one hidden layer, of the
state and the time. The time interval is [0, 1], and the loss is the mean square of the
final state. All numbers are float32.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


batch, dim, width, num_steps = 256, 16, 64, 100
_dt = 1 / num_steps

Params: TypeAlias = dict[str, dict[str, Float[Array, "..."]]]
Y: TypeAlias = Float[Array, "batch dim"]
Loss: TypeAlias = Callable[[Params, Y, PRNGKeyArray], Float[Array, ""]]


def initial() -> tuple[Params, Y]:
    def network(key):
        key0, key1 = jr.split(key)
        normal = lambda key, n, m: jr.normal(key, (n, m), jnp.float32) / n**0.5
        return {
            "weight0": normal(key0, dim + 1, width),
            "bias0": jnp.zeros(width, jnp.float32),
            "weight1": normal(key1, width, dim),
            "bias1": jnp.zeros(dim, jnp.float32),
        }

    key0, key1, key2 = jr.split(jr.key(0), 3)
    y0 = jr.normal(key2, (batch, dim), jnp.float32)
    return {"drift": network(key0), "diffusion": network(key1)}, y0


def _network(t, y, params):
    x = jnp.append(y, t)
    x = jnp.tanh(x @ params["weight0"] + params["bias0"])
    return jnp.tanh(x @ params["weight1"] + params["bias1"])


def _loss(
    make_path: Callable[[PRNGKeyArray], diffrax.AbstractBrownianPath],
    solver: diffrax.AbstractSolver,
    adjoint: diffrax.AbstractAdjoint,
) -> Loss:
    """The whole batch is one state, and the networks are mapped over it."""

    def drift(t, y, params):
        return jax.vmap(_network, in_axes=(None, 0, None))(t, y, params["drift"])

    def diffusion(t, y, params):
        out = jax.vmap(_network, in_axes=(None, 0, None))(t, y, params["diffusion"])
        return lx.DiagonalLinearOperator(out)

    def loss(params, y0, key):
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, make_path(key))
            ),
            solver,
            t0=jnp.float32(0),
            t1=jnp.float32(1),
            dt0=jnp.float32(_dt),
            y0=y0,
            args=params,
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return jnp.mean(sol.ys[-1] ** 2)

    return loss


_struct = jax.ShapeDtypeStruct((batch, dim), jnp.float32)


def _brownian_interval(key: PRNGKeyArray) -> BrownianInterval:
    zero, one, dt = (jnp.float32(x) for x in (0, 1, _dt))
    return BrownianInterval(zero, one, _struct, key, dt=dt)


def _virtual_brownian_tree(key: PRNGKeyArray) -> diffrax.VirtualBrownianTree:
    zero, one = jnp.float32(0), jnp.float32(1)
    return diffrax.VirtualBrownianTree(zero, one, _dt / 2, _struct, key)


def ours() -> Loss:
    return _loss(_brownian_interval, ReversibleHeun(), StochasticAdjoint())


def default(solver: diffrax.AbstractSolver) -> Loss:
    return _loss(_virtual_brownian_tree, solver, diffrax.RecursiveCheckpointAdjoint())


def checkpointed() -> Loss:
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    return _loss(_brownian_interval, diffrax.ReversibleHeun(), adjoint)


def torchsde_gradient() -> Callable[[], Any]:
    """torchsde's gradient of the same loss, by its adjoint for this solver."""
    import torch
    import torchsde

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(dim + 1, width),
                torch.nn.Tanh(),
                torch.nn.Linear(width, dim),
                torch.nn.Tanh(),
            )

        def forward(self, t, y):
            return self.layers(torch.cat([y, t.expand(len(y), 1)], dim=1))

    class SDE(torch.nn.Module):
        sde_type = "stratonovich"
        noise_type = "diagonal"

        def __init__(self):
            super().__init__()
            self.f = Network()
            self.g = Network()

    sde = SDE()
    y0 = torch.randn(batch, dim, requires_grad=True)
    ts = torch.tensor([0.0, 1.0])

    def gradient():
        # Made anew, as it remembers what it was asked. Without `dt`, which a solve does
        # not pass if it makes its own path, queries take several times longer.
        path = torchsde.BrownianInterval(0.0, 1.0, size=(batch, dim), dt=_dt)
        ys = torchsde.sdeint_adjoint(
            sde,
            y0,
            ts,
            bm=path,
            dt=_dt,
            method="reversible_heun",
            adjoint_method="adjoint_reversible_heun",
        )
        assert isinstance(ys, torch.Tensor)
        return torch.autograd.grad((ys[-1] ** 2).mean(), [y0, *sde.parameters()])

    return gradient
