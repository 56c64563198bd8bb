"""A neural SDE, the same in diffrax and in torchsde.

The drift and the (diagonal) diffusion are perceptrons with one hidden layer, of the
state and the time. The time interval is [0, 1], and the loss is the mean square of the
final state. All numbers are float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from hand_written import Loss, Model
from jaxtyping import Array, Float, PRNGKeyArray
from ou import number

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


Params: TypeAlias = dict[str, dict[str, Float[Array, "..."]]]
Y: TypeAlias = Float[Array, "batch dim"]


class Size(NamedTuple):
    batch: int = 256
    dim: int = 16
    width: int = 64
    num_steps: int = 100

    @property
    def dt(self) -> float:
        return 1 / self.num_steps


def initial(size: Size) -> tuple[Params, Y]:
    def network(key):
        key0, key1 = jr.split(key)
        normal = lambda key, n, m: jr.normal(key, (n, m), jnp.float32) / n**0.5
        return {
            "weight0": normal(key0, size.dim + 1, size.width),
            "bias0": jnp.zeros(size.width, jnp.float32),
            "weight1": normal(key1, size.width, size.dim),
            "bias1": jnp.zeros(size.dim, jnp.float32),
        }

    key0, key1, key2 = jr.split(jr.key(0), 3)
    y0 = jr.normal(key2, (size.batch, size.dim), jnp.float32)
    return {"drift": network(key0), "diffusion": network(key1)}, y0


def _network(t, y, params):
    x = jnp.append(y, t)
    x = jnp.tanh(x @ params["weight0"] + params["bias0"])
    return jnp.tanh(x @ params["weight1"] + params["bias1"])


def _model(network) -> Model:
    return Model(
        lambda t, y, params: network(t, y, params["drift"]),
        lambda t, y, params: network(t, y, params["diffusion"]),
        lambda y1: jnp.mean(y1**2),
    )


# The whole batch is one state, and the networks are mapped over it.
batched = _model(jax.vmap(_network, in_axes=(None, 0, None)))
single = _model(_network)

MakePath: TypeAlias = Callable[
    [Size, jax.ShapeDtypeStruct, PRNGKeyArray], diffrax.AbstractBrownianPath
]


def diffrax_loss(
    size: Size,
    vmapped: bool,
    make_path: MakePath,
    solver: diffrax.AbstractSolver,
    adjoint: diffrax.AbstractAdjoint,
) -> Loss:
    """One solve for the whole batch, or the `vmap` of one for an element."""

    def solve(model, params, y0, key):
        struct = jax.ShapeDtypeStruct(y0.shape, jnp.float32)
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(model.drift),
                diffrax.ControlTerm(
                    lambda *args: lx.DiagonalLinearOperator(model.diffusion(*args)),
                    make_path(size, struct, key),
                ),
            ),
            solver,
            t0=number(0, jnp.float32),
            t1=number(1, jnp.float32),
            dt0=number(size.dt, jnp.float32),
            y0=y0,
            args=params,
            adjoint=adjoint,
            max_steps=size.num_steps,
        )
        assert sol.ys is not None
        return model.loss_of_final(sol.ys[-1])

    if not vmapped:
        return lambda *args: solve(batched, *args)

    def loss(params, y0, key):
        solves = jax.vmap(lambda y0, key: solve(single, params, y0, key))
        return jnp.mean(solves(y0, jr.split(key, size.batch)))

    return loss


def _brownian_interval(
    size: Size, struct: jax.ShapeDtypeStruct, key: PRNGKeyArray
) -> BrownianInterval:
    zero, one, dt = (number(x, jnp.float32) for x in (0, 1, size.dt))
    return BrownianInterval(zero, one, struct, key, dt=dt)


def _virtual_brownian_tree(
    size: Size, struct: jax.ShapeDtypeStruct, key: PRNGKeyArray
) -> diffrax.VirtualBrownianTree:
    zero, one = number(0, jnp.float32), number(1, jnp.float32)
    return diffrax.VirtualBrownianTree(zero, one, size.dt / 2, struct, key)


def ours(
    size: Size,
    vmapped: bool,
    solver: diffrax.AbstractSolver | None = None,
    **kwargs: Any,
) -> Loss:
    solver = ReversibleHeun() if solver is None else solver
    adjoint = StochasticAdjoint(**kwargs)
    return diffrax_loss(size, vmapped, _brownian_interval, solver, adjoint)


def default(size: Size, vmapped: bool, solver: diffrax.AbstractSolver) -> Loss:
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    return diffrax_loss(size, vmapped, _virtual_brownian_tree, solver, adjoint)


def checkpointed(size: Size, vmapped: bool) -> Loss:
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    return diffrax_loss(
        size, vmapped, _brownian_interval, diffrax.ReversibleHeun(), adjoint
    )


def torchsde_gradient(size: Size, device: str = "cpu") -> Callable[[], Any]:
    """torchsde's gradient of the same loss, by its adjoint for this solver."""
    import torch
    import torchsde

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(size.dim + 1, size.width),
                torch.nn.Tanh(),
                torch.nn.Linear(size.width, size.dim),
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

    sde = SDE().to(device)
    y0 = torch.randn(size.batch, size.dim, device=device, requires_grad=True)
    ts = torch.tensor([0.0, 1.0], device=device)

    def gradient():
        # Made anew, as it remembers what it was asked. Without `dt`, which a solve does
        # not pass if it makes its own path, queries take several times longer.
        path = torchsde.BrownianInterval(
            0.0, 1.0, size=(size.batch, size.dim), dt=size.dt, device=device
        )
        ys = torchsde.sdeint_adjoint(
            sde,
            y0,
            ts,
            bm=path,
            dt=size.dt,
            method="reversible_heun",
            adjoint_method="adjoint_reversible_heun",
        )
        assert isinstance(ys, torch.Tensor)
        return torch.autograd.grad((ys[-1] ** 2).mean(), [y0, *sde.parameters()])

    return gradient
