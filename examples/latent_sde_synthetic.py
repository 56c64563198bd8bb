"""Latent SDEs that learn a stochastic Lorenz attractor, or geometric Brownian motion.

The two synthetic experiments of Li, Wong, Chen and Duvenaud, "Scalable gradients for
stochastic differential equations" (2020), https://arxiv.org/abs/2001.01328: the model
sees 1 024 noisy series, and its prior is to generate more of them. How alike those are
to held-out ones is measured by the energy distance, of whole series.

    python examples/latent_sde_synthetic.py --process lorenz
    python examples/latent_sde_synthetic.py --process gbm

The model is the paper's: a latent Itô SDE of dimension 4 with diagonal noise, networks
with one hidden layer of 100 softplus units, and a GRU that reads each series from its
end. With `--observed 0.3`, series are seen at irregular times: each
observation with that probability.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from common import (
    coordinatewise,
    loss_scores,
    normal_kl,
    plot_quantiles,
    report,
    train,
    update,
)
from devices import Rows, make_step, normal, save_figure, say, take, value_and_grad
from diffrax import (
    ControlTerm,
    Euler,
    Heun,
    LinearInterpolation,
    MultiTerm,
    ODETerm,
    SaveAt,
    diffeqsolve,
)
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.spatial.distance import cdist

from diffrax_sde_adjoint import BrownianInterval, StochasticAdjoint, path_kl


SERIES, LATENT, HIDDEN, CONTEXT, NOISE = 1024, 4, 100, 1, 0.01
SUBSTEPS = 2  # of the solver, between two observations
float32 = jnp.float32


def _geometric_brownian_motion(num: int, times: int, key: PRNGKeyArray):
    """dy = y dt + 0.5 y dW, of which the solution is known."""
    start_key, path_key = jr.split(key)
    start = 0.1 + 0.03 * jr.normal(start_key, (num, 1), float32)
    gap = 1 / (times - 1)
    steps = gap**0.5 * jr.normal(path_key, (num, times - 1), float32)
    w = jnp.pad(jnp.cumsum(steps, axis=1), ((0, 0), (1, 0)))
    ts = jnp.linspace(0, 1, times, dtype=float32)
    return (start * jnp.exp((1 - 0.5 * 0.5**2) * ts + 0.5 * w))[..., None]


def _lorenz_drift(t, y, args):
    x, y, z = y[:, 0], y[:, 1], y[:, 2]
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)


def _lorenz(num: int, times: int, key: PRNGKeyArray):
    """The attractor with a diffusion of 0.15, from a normal distribution."""
    start_key, path_key = jr.split(key)
    y0 = jr.normal(start_key, (num, 3), float32)
    dt0 = 1 / (16 * (times - 1))
    struct = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
    path = BrownianInterval(0.0, 1.0, struct, path_key, dt=dt0)
    noise = lambda t, y, args: lx.DiagonalLinearOperator(jnp.full_like(y, 0.15))
    terms = MultiTerm(ODETerm(_lorenz_drift), ControlTerm(noise, path))
    ts = jnp.linspace(0, 1, times, dtype=float32)
    sol = diffeqsolve(terms, Heun(), 0.0, 1.0, dt0, y0, saveat=SaveAt(ts=ts))
    assert sol.ys is not None
    return jnp.swapaxes(sol.ys, 0, 1)


class Process(NamedTuple):
    """What to learn: series over the time from 0 to 1, of some dimension."""

    sample: Callable[[int, int, PRNGKeyArray], Float[Array, "num times dim"]]
    times: int
    dim: int
    is_normalised: bool  # by the mean and standard deviation of all series


PROCESSES = dict(
    lorenz=Process(_lorenz, 41, 3, True),
    gbm=Process(_geometric_brownian_motion, 51, 1, False),
)


def mlp(num_in: int, num_out: int, key: PRNGKeyArray) -> eqx.nn.MLP:
    return eqx.nn.MLP(
        num_in, num_out, HIDDEN, 1, jax.nn.softplus, dtype=float32, key=key
    )


def linear(num_in: int, num_out: int, key: PRNGKeyArray) -> eqx.nn.Linear:
    return eqx.nn.Linear(num_in, num_out, dtype=float32, key=key)


class LatentSDE(eqx.Module):
    """dz = f dt + g dW, with a prior `f(z)` and a posterior `f(z, context(t))`."""

    encoder: eqx.nn.GRUCell
    to_context: eqx.nn.Linear
    to_initial: eqx.nn.Linear
    posterior: eqx.nn.MLP
    prior: eqx.nn.MLP
    diffusion: eqx.nn.MLP  # one for each latent coordinate, stacked
    decoder: eqx.nn.Linear
    mean: Float[Array, " latent"]
    log_std: Float[Array, " latent"]

    def __init__(self, dim: int, key: PRNGKeyArray):
        keys = jr.split(key, 7)
        self.encoder = eqx.nn.GRUCell(dim + 1, HIDDEN, dtype=float32, key=keys[0])
        self.to_context = linear(HIDDEN, CONTEXT, keys[1])
        self.to_initial = linear(HIDDEN, 2 * LATENT, keys[2])
        self.posterior = mlp(LATENT + CONTEXT, LATENT, keys[3])
        self.prior = mlp(LATENT, LATENT, keys[4])
        self.diffusion = eqx.filter_vmap(lambda key: mlp(1, 1, key))(
            jr.split(keys[5], LATENT)
        )
        self.decoder = linear(LATENT, dim, keys[6])
        self.mean = jnp.zeros(LATENT, float32)
        self.log_std = jnp.zeros(LATENT, float32)

    def encode(
        self,
        series: Float[Array, "batch times dim"],
        seen: Float[Array, "batch times 1"],
    ) -> tuple[Float[Array, "times batch context"], Float[Array, "batch 2*latent"]]:
        """At each time, a summary of what is seen from there on; and the posterior of
        the initial state, as mean and log standard deviation.
        """
        inputs = jnp.concatenate([series * seen, seen], axis=-1)

        def step(hidden, inputs):
            hidden = jax.vmap(self.encoder)(inputs, hidden)
            return hidden, jax.vmap(self.to_context)(hidden)

        hidden = jnp.zeros((len(series), HIDDEN), float32)
        hidden, context = jax.lax.scan(
            step, hidden, jnp.swapaxes(inputs, 0, 1), reverse=True
        )
        return context, jax.vmap(self.to_initial)(hidden)

    def decode(self, z: Float[Array, "times batch latent"]):
        return jnp.swapaxes(jax.vmap(jax.vmap(self.decoder))(z), 0, 1)


def posterior_drift(t, z, args):
    model, context = args
    inputs = jnp.concatenate([z, context.evaluate(t)], axis=-1)
    return jax.vmap(model.posterior)(inputs)


def prior_drift(t, z, args):
    model, _ = args
    return jax.vmap(model.prior)(z)


def diffusion(t, z, args):
    """Coordinate `i` depends on that of `z` only."""
    model, _ = args
    raw = coordinatewise(model.diffusion, z)
    return lx.DiagonalLinearOperator(jax.nn.sigmoid(raw))


def solve(
    drift,
    times: int,
    y0,
    args,
    key: PRNGKeyArray,
    make_terms=lambda x: x,
    rows: Rows = None,
):
    """The SDE with some drift, at the times of observations."""
    t0, t1, dt0 = jnp.array([0, 1, 1 / (SUBSTEPS * (times - 1))], float32)
    z0 = jax.tree.leaves(y0)[0]
    struct = jax.ShapeDtypeStruct(z0.shape, z0.dtype)
    path = BrownianInterval(t0, t1, struct, key, dt=dt0, rows=rows)
    sol = diffeqsolve(
        make_terms(MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))),
        Euler(),
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=SaveAt(ts=jnp.linspace(0, 1, times, dtype=float32)),
        adjoint=StochasticAdjoint(store_all=True),
        max_steps=SUBSTEPS * times,
    )
    assert sol.ys is not None
    return sol.ys


def posterior(model: LatentSDE, series, seen, key: PRNGKeyArray, rows: Rows = None):
    """Series without their noise, and their divergence from the prior."""
    start_key, path_key = jr.split(key)
    context, initial = model.encode(series, seen)
    mean, log_std = jnp.split(initial, 2, axis=-1)
    z0 = mean + jnp.exp(log_std) * normal(start_key, mean.shape, rows)
    initial_kl = normal_kl(mean, log_std, model.mean, model.log_std)
    times = series.shape[1]
    ts = jnp.linspace(0, 1, times, dtype=float32)
    z, along_path = solve(
        posterior_drift,
        times,
        (z0, initial_kl),
        (model, LinearInterpolation(ts, context)),
        path_key,
        lambda terms: path_kl(terms, prior_drift),
        rows,
    )
    return model.decode(z), along_path[-1]


def loss_fn(model: LatentSDE, series, seen, kl_weight, key: PRNGKeyArray, rows: Rows):
    """Minus the evidence lower bound, but for a constant."""
    decoded, divergence = posterior(model, series, seen, key, rows)
    error = jnp.sum(seen * ((series - decoded) / NOISE) ** 2)
    return 0.5 * error + kl_weight * jnp.sum(divergence)


def make_optimiser(learning_rate: float, decay: float) -> optax.GradientTransformation:
    schedule = optax.exponential_decay(learning_rate, 1, decay)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


def train_step(
    state,
    data,
    i,
    rows: Rows,
    batch: int,
    kl_annealing: int,
    optimiser: optax.GradientTransformation,
):
    """Increases the evidence lower bound of some series, per observed number."""
    series, seen, key = data
    data_key, path_key = jr.split(jr.fold_in(key, i))
    index = jr.choice(data_key, SERIES, (batch,), replace=False)
    size = jnp.sum(seen[index]) * series.shape[-1]
    index = take(index, rows)
    kl_weight = jnp.minimum(1.0, (i + 1).astype(float32) / kl_annealing)

    def loss(model):
        total = loss_fn(model, series[index], seen[index], kl_weight, path_key, rows)
        return total / size

    model, opt_state = state
    value, grads = value_and_grad(loss, rows)(model)
    return update(optimiser, model, opt_state, grads), value


@eqx.filter_jit
def sample_prior(model: LatentSDE, num: int, times: int, key: PRNGKeyArray):
    """Series, without noise."""
    start_key, path_key = jr.split(key)
    std = jnp.exp(model.log_std)
    z0 = model.mean + std * jr.normal(start_key, (num, LATENT), float32)
    return model.decode(solve(prior_drift, times, z0, (model, None), path_key))


def energy_distance(
    x: Float[np.ndarray, "num ..."], y: Float[np.ndarray, "num ..."]
) -> tuple[float, float]:
    """The energy distance of two samples, without bias; and what it is at most in 95 of
    100 cases if both are of one distribution, by permutations.

    It is `2 E|x - y| - E|x - x'| - E|y - y'|`, see Székely and Rizzo, "Energy
    statistics" (2013): zero for equal distributions, and for those only.
    """
    num = len(x)
    pooled = np.concatenate([a.reshape(num, -1) for a in (x, y)])
    distances = cdist(pooled, pooled)
    rng = np.random.default_rng((0, 1))
    shuffled = [rng.permutation(2 * num) < num for _ in range(200)]
    first = np.stack([np.arange(2 * num) < num, *shuffled], axis=1).astype(float)
    second = 1 - first
    within = sum(np.sum(s * (distances @ s), axis=0) for s in (first, second))
    between = np.sum(first * (distances @ second), axis=0)
    values = 2 * between / num**2 - within / (num * (num - 1))
    return float(values[0]), float(np.quantile(values[1:], 0.95))


def main(
    *,
    process: Literal["lorenz", "gbm"] = "lorenz",
    steps: int = 3000,
    batch: int = 128,
    observed: float = 1.0,
    kl_annealing: int = 50,
    learning_rate: float = 0.01,
    decay: float = 0.999,
    devices: int = 1,
    seed: int = 0,
    out: Path = Path("latent_sde_synthetic"),
    resume: Path | None = None,
) -> dict[str, float]:
    """Train on series of a process, and compare samples of the prior with others.

    Args:
        process: Lorenz attractors with noise, or geometric Brownian motions.
        steps: of the optimiser.
        batch: series in each step.
        observed: the share of the observations that the model sees, at random.
        kl_annealing: steps until the divergence has its whole weight.
        learning_rate: at first.
        decay: of the learning rate, in each step.
        devices: that share each batch.
        seed: of the data, weights, batches and paths.
        out: where the figure and the checkpoints go.
        resume: a checkpoint of a run with the same settings, to continue.
    """
    if not 0 < observed <= 1:
        raise ValueError(f"`observed` is a share in (0, 1], but is {observed}.")
    settings = dict(locals())
    for name in ("devices", "out", "resume"):
        del settings[name]
    out.mkdir(parents=True, exist_ok=True)
    keys = jr.split(jr.key(seed), 8)
    sample, times, dim, is_normalised = PROCESSES[process]
    clean = jax.jit(sample, static_argnums=(0, 1))(3 * SERIES, times, keys[0])
    if is_normalised:
        clean = (clean - clean.mean(axis=(0, 1))) / clean.std(axis=(0, 1))
    noisy = clean + NOISE * jr.normal(keys[1], clean.shape, float32)
    series, held_out, another = jnp.split(noisy, 3)
    seen = jr.bernoulli(keys[2], observed, (2 * SERIES, times, 1)).astype(float32)
    seen, seen_later = jnp.split(seen, 2)

    model = eqx.filter_jit(LatentSDE)(dim, keys[3])
    optimiser = make_optimiser(learning_rate, decay)
    state = (model, optimiser.init(eqx.filter(model, eqx.is_array)))
    step = make_step(train_step, (series, seen, keys[4]), batch, devices)
    one_step = lambda state, i: step(state, i, batch, kl_annealing, optimiser)
    (model, _), losses = train(one_step, state, steps, settings, out, resume)

    scores = loss_scores(losses)
    noise = NOISE * jr.normal(keys[6], clean[:SERIES].shape, float32)
    prior = sample_prior(model, SERIES, times, keys[5]) + noise
    flat = np.asarray(series).reshape(SERIES, -1)
    normal = np.random.default_rng(seed).multivariate_normal(
        flat.mean(axis=0), np.cov(flat.T), SERIES
    )
    for name, x in (
        ("prior", prior),
        ("normal distribution with the moments of the data", normal),
        ("another sample of the process", another),
    ):
        distance, bound = energy_distance(np.asarray(x), np.asarray(held_out))
        scores[f"energy distance: {name}"] = distance
        scores[f"95% of permutations: {name}"] = bound
    scores = report(scores)

    fitted, _ = eqx.filter_jit(posterior)(model, held_out, seen_later, keys[7])
    path = out / f"{process}.png"
    arrays = (held_out, seen_later, prior, fitted)
    plot(path, *(np.asarray(x) for x in arrays))
    say(f"Figure and checkpoints are in {out}/.")
    return scores


def plot(path: Path, held_out, seen, prior, fitted):
    """Series of the data and of the prior, their distributions, and posteriors."""
    blue, orange, grey = "#0072B2", "#D55E00", "0.45"
    times, dim = held_out.shape[1:]
    t = np.linspace(0, 1, times)
    columns = max(dim, 3)
    fig = plt.figure(figsize=(4 * columns, 7.5), layout="constrained")
    axes = fig.subplots(2, columns)
    for ax in axes.flat:
        ax.set(xlabel="time")

    samples = (
        ("Held-out series", held_out, grey),
        ("Series of the prior", prior, blue),
    )
    for i, (title, x, colour) in enumerate(samples):
        ax = axes[0, i]
        if dim == 3:
            ax.remove()
            ax = fig.add_subplot(2, columns, i + 1, projection="3d")
            ax.set(xlabel="$y_1$", ylabel="$y_2$", zlabel="$y_3$")
            for series in x[:30]:
                ax.plot(*series.T, color=colour, lw=0.7, alpha=0.8)
        else:
            ax.plot(t, x[:40, :, 0].T, color=colour, lw=0.7, alpha=0.8)
            ax.set(ylim=(0, np.quantile(held_out, 0.9995)))
        ax.set(title=title)
    ax = axes[0, 2]
    for i, shade in zip(range(4), (blue, orange, "#009E73", "#CC79A7"), strict=True):
        dots = seen[i, :, 0] > 0
        ax.plot(t[dots], held_out[i, dots, 0], ".", color=shade, ms=4)
        ax.plot(t, fitted[i, :, 0], color=shade, lw=1.2)
    ax.set(title="Held-out series (dots) and posterior paths", ylabel="$y_1$")

    for i in range(dim):
        ax = axes[1, i]
        plot_quantiles(ax, t, held_out[..., i], prior[..., i], blue, "prior")
        ax.set(title=f"Quantiles of $y_{i + 1}$: 5, 25, 50, 75, 95%")
    axes[1, 0].legend(frameon=False)
    if dim == 1:
        ax = axes[1, 1]
        for x, colour, label in ((held_out, grey, "held out"), (prior, blue, "prior")):
            ax.hist(
                x[:, -1, 0],
                60,
                density=True,
                histtype="step",
                color=colour,
                lw=2,
                label=label,
            )
        ax.set(title="Density at time 1", xlabel="$y_1$")
        ax.legend(frameon=False)
        ax = axes[1, 2]
        for x, colour, label in ((held_out, grey, "held out"), (prior, blue, "prior")):
            change = np.diff(x[..., 0], axis=1)
            level = x[:, :-1, 0]
            edges = np.quantile(held_out[:, :-1, 0], np.linspace(0, 1, 13))
            index = np.digitize(level, edges[1:-1])
            middle = [level[index == k].mean() for k in range(12)]
            spread = [change[index == k].std() for k in range(12)]
            ax.plot(middle, spread, "o-", color=colour, label=label)
        ax.set(title="Standard deviation of changes", xlabel="$y_1$")
        ax.legend(frameon=False)
    save_figure(fig, path)


if __name__ == "__main__":
    tyro.cli(main)
