"""Coupled oscillators with noise, every one coupled to every other.

    dx_i = (w_i + K / n sum_j sin(x_j - x_i)) dt + s dW_i

over [0, 1], with the gradient of the mean squared coherence at the end in the
frequencies, the coupling and the strength of the noise. All numbers are float32.
"""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from hand_written import Loss
from jaxtyping import Array, Float
from ou import number

from diffrax_sde_adjoint import BrownianInterval


class Params(NamedTuple):
    frequencies: Float[Array, " n"]
    coupling: Float[Array, ""]
    noise: Float[Array, ""]


def initial(batch: int, n: int) -> tuple[Params, Float[Array, "batch n"]]:
    frequencies = jr.normal(jr.key(0), (n,), jnp.float32)
    params = Params(frequencies, jnp.float32(2), jnp.float32(0.3))
    return params, jr.uniform(jr.key(1), (batch, n), jnp.float32, 0, 2 * jnp.pi)


def drift(t, x, params):
    del t
    pull = jnp.mean(jnp.sin(x[:, None, :] - x[:, :, None]), axis=-1)
    return params.frequencies + params.coupling * pull


def diffrax_loss(
    num_steps: int, solver: diffrax.AbstractSolver, adjoint: diffrax.AbstractAdjoint
) -> Loss:
    def diffusion(t, x, params):
        del t
        return lx.DiagonalLinearOperator(jnp.broadcast_to(params.noise, x.shape))

    def loss(params, x0, key):
        zero, one, dt = (number(x, jnp.float32) for x in (0, 1, 1 / num_steps))
        struct = jax.ShapeDtypeStruct(x0.shape, x0.dtype)
        path = BrownianInterval(zero, one, struct, key, dt=dt)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)
        )
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            zero,
            one,
            dt,
            x0,
            params,
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        x1 = sol.ys[-1]
        coherence = (
            jnp.mean(jnp.cos(x1), axis=1) ** 2 + jnp.mean(jnp.sin(x1), axis=1) ** 2
        )
        return jnp.mean(coherence)

    return loss
