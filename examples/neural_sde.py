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


DIM, DT, T1 = 4, 0.25, 31 * 0.25  # of the state; between two times; the last time
rate = lambda y: jnp.array([y[1], (1 - y[0] ** 2) * y[1] - y[0], 0.0, 0.0])
VAN_DER_POL = (rate, lambda y: jnp.array([0.1, 0.5]) * jnp.eye(DIM, 2))


def generate(fields, key: PRNGKeyArray, ours=True) -> Float[Array, "times 2"]:
    start_key, path_key = jr.split(key)
    tree = dfx.VirtualBrownianTree(0.0, T1, DT / 2, (2,), path_key)
    path = dsa.BrownianInterval(0.0, T1, (2,), path_key, dt=DT) if ours else tree
    exact = dsa.StochasticAdjoint(store_all=True)
    adjoint = exact if ours else dfx.RecursiveCheckpointAdjoint()
    noise = dfx.ControlTerm(lambda t, y, _: fields[1](y).reshape(DIM, 2), path)
    terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, _: fields[0](y)), noise)
    y0 = jnp.array([2.0, 0.0, 0.0, 0.0]) + 0.3 * jr.normal(start_key, (DIM,))
    solve = (terms, dfx.Heun(), 0.0, T1, DT, y0)
    saveat = dfx.SaveAt(t0=True, steps=True)
    sol = dfx.diffeqsolve(*solve, saveat=saveat, adjoint=adjoint, max_steps=31)
    return sol.ys[:, :2]


def main(*, steps: int = 1000, batch: int = 128, seed: int = 0):
    """Fit a neural SDE to series of an oscillator, by a scoring rule.

    Args:
        steps: of the optimiser.
        batch: series in each.
        seed: of the series, weights and paths.
    """
    keys = jr.split(jr.key(seed), 9)
    sample = eqx.filter_jit(eqx.filter_vmap(generate, in_axes=(None, 0, None)))
    data, other = (sample(VAN_DER_POL, jr.split(k, 1024), True) for k in keys[:2])
    score = dsa.WindowedEnergyScore(data, weight_of_whole=1.0)
    model = [eqx.nn.MLP(DIM, n, 32, 2, key=keys[n]) for n in (DIM, 2 * DIM)]
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    choose = lambda key: jr.choice(key, data, (batch,))
    loss = lambda model, k, ours: score(choose(k[0]), sample(model, k[2:], ours), k[1])
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    k = jr.split(keys[2], (steps + 1, 2 + batch))
    for i in range(steps):
        value, grads = gradient(model, k[i], True)
        updates, state = jax.jit(optimiser.update)(grads, state)
        model = eqx.apply_updates(model, updates)
        if i % max(1, steps // 5) == 0:
            print(f"step {i}: loss {value:.3f}")
    found = sample(model, jr.split(keys[3], 1024), True)
    for name, x in dict(generated=found, other=other).items():
        value, z = score(data, x, keys[5]), x[:, 8::8, 0]
        print(f"{name}: score {value:.3f}, means {z.mean(0)}, deviations {z.std(0)}")
    run = lambda ours: jax.block_until_ready(gradient(model, k[steps], ours))
    ms = lambda ours: 1e3 * min(timeit.repeat(lambda: run(ours), number=1, repeat=9))
    print(f"a gradient: {ms(True):.0f} ms; by diffrax's default: {ms(False):.0f} ms")


if __name__ == "__main__":
    tyro.cli(main)
