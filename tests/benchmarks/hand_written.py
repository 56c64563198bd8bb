"""SDEs with diagonal noise in plain JAX: what a gradient costs when nothing is general.

Like `StochasticAdjoint`, `sweep` makes reversible Heun steps with one keyed draw of
noise each and goes back by undoing them, and `nested_scans` makes the steps of any
solver, and makes them again. Unlike it, they know that steps are equal and that only
the final value matters, and check nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree


Params: TypeAlias = PyTree[Float[Array, "..."]]
Y: TypeAlias = Float[Array, "..."]
Loss: TypeAlias = Callable[[Any, Y, PRNGKeyArray], Float[Array, ""]]


class Model(NamedTuple):
    drift: Callable[[Any, Y, Any], Y]
    diffusion: Callable[[Any, Y, Any], Y]
    loss_of_final: Callable[[Y], Float[Array, ""]]


_VF: TypeAlias = tuple[Y, Y]
_State: TypeAlias = tuple[Y, Y, _VF]  # y, yhat, vf
_Control: TypeAlias = tuple[Float[Array, ""], Y]  # dt, dW


def _prod(vf: _VF, control: _Control) -> Y:
    return vf[0] * control[0] + vf[1] * control[1]


def _mean_prod(vf0: _VF, vf1: _VF, control: _Control) -> Y:
    return 0.5 * _prod((vf0[0] + vf1[0], vf0[1] + vf1[1]), control)


def _control(key: PRNGKeyArray, i: Int[Array, ""], num_steps: int, y: Y) -> _Control:
    dt = jnp.asarray(1 / num_steps, y.dtype)
    return dt, jr.normal(jr.fold_in(key, i), y.shape, y.dtype) * jnp.sqrt(dt)


def _time(i: Int[Array, ""], num_steps: int, y: Y) -> Float[Array, ""]:
    return i.astype(y.dtype) / jnp.asarray(num_steps, y.dtype)


class _ReversibleHeun(NamedTuple):
    model: Model

    def vf(self, t: Array, y: Y, params: Any) -> _VF:
        return self.model.drift(t, y, params), self.model.diffusion(t, y, params)

    def init(self, y0: Y, params: Any) -> _State:
        return y0, y0, self.vf(jnp.zeros((), y0.dtype), y0, params)

    def step(self, state: _State, t1: Array, params: Any, control: _Control) -> _State:
        y0, yhat0, vf0 = state
        yhat1 = 2 * y0 - yhat0 + _prod(vf0, control)
        vf1 = self.vf(t1, yhat1, params)
        return y0 + _mean_prod(vf0, vf1, control), yhat1, vf1

    def backward_step(
        self, state: _State, t0: Array, params: Any, control: _Control
    ) -> _State:
        y1, yhat1, vf1 = state
        yhat0 = 2 * y1 - yhat1 - _prod(vf1, control)
        vf0 = self.vf(t0, yhat0, params)
        return y1 - _mean_prod(vf0, vf1, control), yhat0, vf0


def sweep(model: Model, num_steps: int) -> Loss:
    """Backwards, undoes a step and pulls back through it, in turns."""
    solver = _ReversibleHeun(model)

    def forward(params, y0, key):
        # Not a scan over the steps' numbers: XLA runs that several times slower.
        def body(i, state):
            control = _control(key, i, num_steps, y0)
            return solver.step(state, _time(i + 1, num_steps, y0), params, control)

        return lax.fori_loop(0, num_steps, body, solver.init(y0, params))

    def loss(params, y0, key):
        return model.loss_of_final(forward(params, y0, key)[0])

    def loss_fwd(params, y0, key):
        state = forward(params, y0, key)
        return model.loss_of_final(state[0]), (params, y0, key, state)

    def loss_bwd(residuals, grad_loss):
        params, y0, key, state = residuals

        def body(k, carry):
            state, grad_state, grad_params = carry
            i = num_steps - 1 - k
            control = _control(key, i, num_steps, y0)
            state = solver.backward_step(
                state, _time(i, num_steps, y0), params, control
            )
            t1 = _time(i + 1, num_steps, y0)
            _, pullback = jax.vjp(
                lambda *x: solver.step(x[0], t1, x[1], control), state, params
            )
            grad_state, grad_params_step = pullback(grad_state)
            grad_params = jtu.tree_map(jnp.add, grad_params, grad_params_step)
            return state, grad_state, grad_params

        _, pullback = jax.vjp(lambda state: model.loss_of_final(state[0]), state)
        (grad_state,) = pullback(grad_loss)
        grad_params = jtu.tree_map(jnp.zeros_like, params)
        _, grad_state, grad_params = lax.fori_loop(
            0, num_steps, body, (state, grad_state, grad_params)
        )
        _, pullback = jax.vjp(solver.init, y0, params)
        grad_y0, grad_params_init = pullback(grad_state)
        return jtu.tree_map(jnp.add, grad_params, grad_params_init), grad_y0, None

    loss_and_rule = jax.custom_vjp(loss)
    loss_and_rule.defvjp(loss_fwd, loss_bwd)
    return loss_and_rule


def _heun(model, t0, t1, y0, params, control):
    vf = lambda t, y: (model.drift(t, y, params), model.diffusion(t, y, params))
    vf0 = vf(t0, y0)
    vf1 = vf(t1, y0 + _prod(vf0, control))
    return y0 + _mean_prod(vf0, vf1, control)


def nested_scans(model: Model, num_steps: int) -> Loss:
    """Heun steps, to be differentiated by JAX, which keeps every so-manieth state, and
    what it needs of as many steps.
    """
    length = round(num_steps**0.5)
    assert length**2 == num_steps
    return _scan_of_heun(model, num_steps, length)


def scan_of_heun(model: Model, num_steps: int) -> Loss:
    """Heun steps, to be differentiated by JAX, which keeps what it needs of each."""
    return _scan_of_heun(model, num_steps, None)


def _scan_of_heun(model: Model, num_steps: int, length: int | None) -> Loss:
    def loss(params, y0, key):
        def step(y, i):
            control = _control(key, i, num_steps, y0)
            t0, t1 = (_time(j, num_steps, y0) for j in (i, i + 1))
            return _heun(model, t0, t1, y, params, control), None

        indices = jnp.arange(num_steps)
        if length is None:
            y, _ = lax.scan(step, y0, indices)
        else:
            segment = jax.checkpoint(lambda y, indices: lax.scan(step, y, indices))
            y, _ = lax.scan(segment, y0, indices.reshape(length, length))
        return model.loss_of_final(y)

    return loss


def scan(model: Model, num_steps: int) -> Loss:
    """Reversible Heun, to be differentiated by JAX, which stores every step."""
    solver = _ReversibleHeun(model)

    def loss(params, y0, key):
        def body(state, i):
            control = _control(key, i, num_steps, y0)
            t1 = _time(i + 1, num_steps, y0)
            return solver.step(state, t1, params, control), None

        init = solver.init(y0, params)
        (y1, _, _), _ = lax.scan(body, init, jnp.arange(num_steps))
        return model.loss_of_final(y1)

    return loss


def scan_of_steps(
    solver: diffrax.AbstractSolver,
    make_terms: Callable[[PRNGKeyArray], PyTree[diffrax.AbstractTerm]],
    num_steps: int,
) -> Loss:
    """Steps of a solver of diffrax's in [0, 1], to be differentiated by JAX. If a step
    begins with the vector field that the one before ended with, it is evaluated before
    the first one.
    """
    is_method = isinstance(solver, diffrax.AbstractRungeKutta)
    if is_method:
        solver = eqx.tree_at(
            lambda x: x.scan_kind, solver, "bounded", is_leaf=lambda x: x is None
        )

    def loss(params, y0, key):
        terms, dt = make_terms(key), jnp.asarray(1 / num_steps, y0.dtype)
        state = solver.init(terms, jnp.zeros_like(dt), dt, y0, params)
        has_vf = is_method and state is not None
        if has_vf:
            state = solver.func(terms, jnp.zeros_like(dt), y0, params)

        def body(carry, i):
            t0, t1 = (_time(j, num_steps, y0) for j in (i, i + 1))
            y, state = carry
            state = (False, state) if has_vf else state
            y, *_, state, _ = solver.step(terms, t0, t1, y, params, state, False)
            return (y, state[1] if has_vf else state), None

        (y1, _), _ = lax.scan(body, (y0, state), jnp.arange(num_steps))
        return jnp.mean(y1**2)

    return loss
