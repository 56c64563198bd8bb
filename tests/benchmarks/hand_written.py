"""The OU process in plain JAX: what a gradient costs when nothing is general.

Like `ou.ours`, these make reversible Heun steps with one keyed draw of noise each, and
`sweep` goes back by undoing steps. Unlike it, they know that steps are equal and that
only the final value matters, and check nothing.
"""

from typing import TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ou import Loss, Params, Y, diffusion, drift, loss_of_final


_VF: TypeAlias = tuple[Y, Y]
_State: TypeAlias = tuple[Y, Y, _VF]  # y, yhat, vf
_Control: TypeAlias = tuple[Float[Array, ""], Y]  # dt, dW


def _vf(t: Float[Array, ""], y: Y, params: Params) -> _VF:
    return drift(t, y, params), diffusion(t, y, params)


def _prod(vf: _VF, control: _Control) -> Y:
    return vf[0] * control[0] + vf[1] * control[1]


def _mean_prod(vf0: _VF, vf1: _VF, control: _Control) -> Y:
    return 0.5 * _prod((vf0[0] + vf1[0], vf0[1] + vf1[1]), control)


def _init(y0: Y, params: Params) -> _State:
    return y0, y0, _vf(jnp.zeros((), y0.dtype), y0, params)


def _step(
    state: _State, t1: Float[Array, ""], params: Params, control: _Control
) -> _State:
    y0, yhat0, vf0 = state
    yhat1 = 2 * y0 - yhat0 + _prod(vf0, control)
    vf1 = _vf(t1, yhat1, params)
    return y0 + _mean_prod(vf0, vf1, control), yhat1, vf1


def _backward_step(
    state: _State, t0: Float[Array, ""], params: Params, control: _Control
) -> _State:
    y1, yhat1, vf1 = state
    yhat0 = 2 * y1 - yhat1 - _prod(vf1, control)
    vf0 = _vf(t0, yhat0, params)
    return y1 - _mean_prod(vf0, vf1, control), yhat0, vf0


def _control(key: PRNGKeyArray, i: Int[Array, ""], num_steps: int, y: Y) -> _Control:
    dt = jnp.asarray(1 / num_steps, y.dtype)
    return dt, jr.normal(jr.fold_in(key, i), y.shape, y.dtype) * jnp.sqrt(dt)


def _time(i: Int[Array, ""], num_steps: int, y: Y) -> Float[Array, ""]:
    return i.astype(y.dtype) / jnp.asarray(num_steps, y.dtype)


def sweep(num_steps: int) -> Loss:
    """Backwards, undoes a step and pulls back through it, in turns."""

    def forward(params, y0, key):
        # Not a scan over the steps' numbers: XLA runs that several times slower.
        def body(i, state):
            control = _control(key, i, num_steps, y0)
            return _step(state, _time(i + 1, num_steps, y0), params, control)

        return lax.fori_loop(0, num_steps, body, _init(y0, params))

    def loss(params, y0, key):
        return loss_of_final(forward(params, y0, key)[0])

    def loss_fwd(params, y0, key):
        state = forward(params, y0, key)
        return loss_of_final(state[0]), (params, y0, key, state)

    def loss_bwd(residuals, grad_loss):
        params, y0, key, state = residuals

        def body(k, carry):
            state, grad_state, grad_params = carry
            i = num_steps - 1 - k
            control = _control(key, i, num_steps, y0)
            state = _backward_step(state, _time(i, num_steps, y0), params, control)
            t1 = _time(i + 1, num_steps, y0)
            _, pullback = jax.vjp(
                lambda state, params: _step(state, t1, params, control), state, params
            )
            grad_state, grad_params_step = pullback(grad_state)
            grad_params = jtu.tree_map(jnp.add, grad_params, grad_params_step)
            return state, grad_state, grad_params

        _, pullback = jax.vjp(lambda state: loss_of_final(state[0]), state)
        (grad_state,) = pullback(grad_loss)
        grad_params = jtu.tree_map(jnp.zeros_like, params)
        _, grad_state, grad_params = lax.fori_loop(
            0, num_steps, body, (state, grad_state, grad_params)
        )
        _, pullback = jax.vjp(_init, y0, params)
        grad_y0, grad_params_init = pullback(grad_state)
        return jtu.tree_map(jnp.add, grad_params, grad_params_init), grad_y0, None

    loss_and_rule = jax.custom_vjp(loss)
    loss_and_rule.defvjp(loss_fwd, loss_bwd)
    return loss_and_rule


def scan(num_steps: int) -> Loss:
    """To be differentiated by JAX, which stores every step."""

    def loss(params, y0, key):
        def body(state, i):
            control = _control(key, i, num_steps, y0)
            return _step(state, _time(i + 1, num_steps, y0), params, control), None

        state, _ = lax.scan(body, _init(y0, params), jnp.arange(num_steps))
        return loss_of_final(state[0])

    return loss
