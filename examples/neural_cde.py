import timeit

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import tyro
from jaxtyping import Array, Float, PRNGKeyArray

import diffrax_sde_adjoint as dsa


NUM, SIZE, DT, T1 = 1024, 8, 0.1, 6.3  # of series; of the state; times
TS = DT * jnp.arange(64.0)


def spirals(key: PRNGKeyArray) -> tuple[Float[Array, "num times 3"], Array]:
    keys = jr.split(key, 4)
    is_clockwise = jr.bernoulli(keys[0], shape=(NUM, 1))
    angle = T1 * jr.uniform(keys[1], (NUM, 1)) + jnp.where(is_clockwise, -TS, TS)
    xy = jnp.exp(-0.3 * TS[:, None]) * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    is_seen = jr.bernoulli(keys[2], 0.3, xy.shape).at[:, jnp.array([0, -1])].set(True)
    xy = jnp.where(is_seen, xy + 0.3 * jr.normal(keys[3], xy.shape), jnp.nan)
    return jnp.dstack([jnp.broadcast_to(TS, xy.shape[:2]), xy]), is_clockwise[:, 0]


def logit(model, series: Float[Array, "times 3"], ours=True) -> Float[Array, ""]:
    path = dfx.LinearInterpolation(TS, dfx.linear_interpolation(TS, series))
    term = dfx.ControlTerm(lambda t, y, _: model[1](y).reshape(-1, 3), path)
    adjoint = dsa.StochasticAdjoint() if ours else dfx.RecursiveCheckpointAdjoint()
    y0 = model[0](series[0])
    return dfx.diffeqsolve(term, dfx.Heun(), 0.0, T1, DT, y0, adjoint=adjoint).ys[0, 0]


def main(*, steps: int = 200, batch: int = 64, seed: int = 0):
    """Classify noisy spirals with missing values, which drive a neural CDE.

    Args:
        steps: of the optimiser.
        batch: series in each.
        seed: of the series, weights and batches.
    """
    keys = jr.split(jr.key(seed), 5)
    start = eqx.nn.Linear(3, SIZE, key=keys[0])
    model = [start, eqx.nn.MLP(SIZE, 3 * SIZE, 32, 1, jnp.tanh, jnp.tanh, key=keys[1])]
    (series, label), (others, label_of_others) = spirals(keys[2]), spirals(keys[3])
    logits = eqx.filter_jit(eqx.filter_vmap(logit, in_axes=(None, 0, None)))
    entropy = lambda x, is_one: optax.sigmoid_binary_cross_entropy(x, is_one).mean()
    loss = lambda model, i, ours: entropy(logits(model, series[i], ours), label[i])
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    batches = jr.randint(keys[4], (steps, batch), 0, NUM)
    for step, batch_of_step in enumerate(batches):
        value, grads = gradient(model, batch_of_step, True)
        updates, state = jax.jit(optimiser.update)(grads, state)
        model = eqx.apply_updates(model, updates)
        if step % max(1, steps // 5) == 0:
            print(f"step {step}: loss {value:.3f}")
    is_right = (logits(model, others, True) > 0) == label_of_others
    print(f"accuracy on other series: {jnp.mean(is_right):.3f}")
    run = lambda ours: jax.block_until_ready(gradient(model, batches[0], ours))
    ms = lambda ours: 1e3 * min(timeit.repeat(lambda: run(ours), number=1, repeat=9))
    print(f"a gradient: {ms(True):.1f} ms; by diffrax's default: {ms(False):.1f} ms")


if __name__ == "__main__":
    tyro.cli(main)
