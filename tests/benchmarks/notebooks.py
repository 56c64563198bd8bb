"""The solves of diffrax's notebooks, with networks of their sizes: a neural controlled
differential equation and a latent ODE. All numbers are float32.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float


Loss: TypeAlias = Callable[[Any], Float[Array, ""]]
Example: TypeAlias = Callable[[diffrax.AbstractAdjoint], tuple[Loss, Any]]


def neural_cde(adjoint: diffrax.AbstractAdjoint) -> tuple[Loss, Any]:
    """Spirals of 100 points, in batches of 32, with an adaptive solver."""
    batch, length, channels, hidden = 32, 100, 3, 8
    network = eqx.nn.MLP(
        hidden,
        hidden * channels,
        128,
        1,
        activation=jax.nn.softplus,
        final_activation=jnp.tanh,
        dtype=jnp.float32,
        key=jr.key(0),
    )
    ts = jnp.linspace(0, 4 * jnp.pi, length, dtype=jnp.float32)
    phases = jnp.linspace(0, 1, batch, dtype=jnp.float32)[:, None]
    series = jnp.stack(
        [ts + 0 * phases, jnp.cos(ts + phases), jnp.sin(ts + phases)], axis=-1
    )
    vector_field = lambda t, y, network: network(y).reshape(hidden, channels)

    def solve(network, series):
        coeffs = diffrax.backward_hermite_coefficients(ts, series)
        control = diffrax.CubicInterpolation(ts, coeffs)
        sol = diffrax.diffeqsolve(
            diffrax.ControlTerm(vector_field, control).to_ode(),
            diffrax.Tsit5(),
            t0=ts[0],
            t1=ts[-1],
            dt0=None,
            y0=jnp.full(hidden, 0.1, jnp.float32),
            args=network,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            adjoint=adjoint,
            max_steps=512,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys**2)

    def loss(inputs):
        return jnp.mean(jax.vmap(solve, in_axes=(None, 0))(*inputs))

    return loss, (network, series)


def latent_ode(adjoint: diffrax.AbstractAdjoint) -> tuple[Loss, Any]:
    """20 observations, in batches of 256, with constant steps."""
    batch, hidden = 256, 16
    network = eqx.nn.MLP(
        hidden,
        hidden,
        16,
        2,
        activation=jax.nn.softplus,
        dtype=jnp.float32,
        key=jr.key(0),
    )
    ts = jnp.linspace(0, 3, 20, dtype=jnp.float32)
    y0 = 0.1 * jr.normal(jr.key(1), (batch, hidden), jnp.float32)

    def solve(network, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, network: jnp.tanh(network(y))),
            diffrax.Tsit5(),
            t0=ts[0],
            t1=ts[-1],
            dt0=jnp.float32(0.4),
            y0=y0,
            args=network,
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=adjoint,
            max_steps=16,
        )
        return jnp.sum(sol.ys**2)

    def loss(inputs):
        return jnp.mean(jax.vmap(solve, in_axes=(None, 0))(*inputs))

    return loss, (network, y0)
