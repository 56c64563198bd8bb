"""Motion capture with a latent SDE of 11 605 parameters, or the latent ODE in it.

The experiment of section 7.3 of Li, Wong, Chen and Duvenaud, "Scalable gradients for
stochastic differential equations" (2020), https://arxiv.org/abs/2001.01328: 50 joint
angles of a walking person. A model reads the first three frames of a sequence of 300
and predicts the other 297. The networks are the paper's. How they are trained, and what
they are given, is not, but for the recipe of that name.

    python examples/latent_sde_mocap.py --data mocap35.mat recipe:ours
    python examples/latent_sde_mocap.py --data mocap35.mat recipe:ours --recipe.kind ode
    python examples/latent_sde_mocap.py --data mocap35.mat recipe:paper

The data are the sequences of subject 35 of the CMU motion capture database, split and
centred as in the literature: `data/mocap/mocap35.mat` of the repository
https://github.com/uncbiag/neuro_shooting. Every choice was made by `--held-out
cross-validation`, over the sequences for training.
"""

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.io
import scipy.stats
import tyro
from common import (
    coordinatewise,
    last_checkpoint,
    loss_scores,
    normal_kl,
    report,
    train,
    update,
)
from diffrax import ControlTerm, Euler, MultiTerm, ODETerm, SaveAt, diffeqsolve
from jaxtyping import Array, Float, PRNGKeyArray

from diffrax_sde_adjoint import BrownianInterval, StochasticAdjoint, path_kl


SHA256 = "105484f138487f10209cce883d26e2e030d10a6df6f10159f4e6e253f9b03b8d"
FRAMES, GIVEN, LATENT, CONTEXT, ANGLES, WIDTH = 300, 3, 6, 3, 50, 30
FOLDS, SAMPLES = 4, 50
float32 = jnp.float32


class Recipe(NamedTuple):
    """How a model is trained, and what it sees."""

    # Steps, each with so many consecutive frames of every sequence.
    windows: tuple[tuple[int, int], ...] = ((1500, 60), (1500, 150), (1000, 270))
    # A window starts anywhere, and is played faster or slower by up to this share.
    warp: float = 0.07
    # The encoder reads the frames as position, velocity and acceleration.
    derivatives: bool = True
    # The unit of what networks read and return, in degrees.
    unit: float = 6.0
    # Of the divergence from the prior.
    kl_weight: float = 0.01
    # Steps until it has its whole weight.
    kl_annealing: int = 200
    # Of Adam.
    learning_rate: float = 0.01
    # Of the learning rate, in each step; if none, it goes to zero as a cosine.
    decay: float | None = None
    # The norm that gradients are clipped to.
    clip: float = 10.0
    # The model that is kept is a moving average over about 1 / (1 - average) steps.
    average: float = 0.995
    # What the diffusion is at least, so that the divergence is finite.
    floor: float = 0.0
    # The time of the SDE between two frames.
    gap: float = 0.1
    # Of the solver, between two frames.
    substeps: int = 1
    # A latent ODE is one without noise, and without a prior for its path.
    kind: Literal["sde", "ode"] = "sde"


OURS = Recipe()
PAPER = Recipe(
    windows=((400, FRAMES),),
    warp=0.0,
    derivatives=False,
    unit=1.0,
    kl_weight=0.1,
    decay=0.999,
    clip=math.inf,
    average=0.0,
    floor=1e-7,
    gap=0.02,
    substeps=5,
)


def load(path: Path) -> dict[str, Float[np.ndarray, "sequences 300 50"]]:
    """The sequences for training, validation and test, in degrees."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"`data`: {path} is not `mocap35.mat`; its SHA-256 is {digest}."
        )
    data = scipy.io.loadmat(path)
    names = {"train": "Xtr", "validation": "Xval", "test": "Xtest"}
    return {name: data[key].astype(np.float32) for name, key in names.items()}


def mlp(num_in: int, num_out: int, depth: int, key: PRNGKeyArray) -> eqx.nn.MLP:
    return eqx.nn.MLP(
        num_in, num_out, WIDTH, depth, jax.nn.softplus, dtype=float32, key=key
    )


class LatentSDE(eqx.Module):
    """dz = f dt + g dW, with a prior `f(z)` and a posterior `f(z, context)`."""

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP
    posterior: eqx.nn.MLP
    prior: eqx.nn.MLP
    diffusion: eqx.nn.MLP  # one for each latent coordinate, stacked
    mean: Float[Array, " latent"]
    log_std: Float[Array, " latent"]

    def __init__(self, key: PRNGKeyArray):
        keys = jr.split(key, 5)
        self.encoder = mlp(GIVEN * ANGLES, 2 * LATENT + CONTEXT, 2, keys[0])
        self.decoder = mlp(LATENT, 2 * ANGLES, 2, keys[1])
        self.posterior = mlp(LATENT + CONTEXT, LATENT, 1, keys[2])
        self.prior = mlp(LATENT, LATENT, 1, keys[3])
        self.diffusion = eqx.filter_vmap(lambda key: mlp(1, 1, 1, key))(
            jr.split(keys[4], LATENT)
        )
        self.mean = jnp.zeros(LATENT, float32)
        self.log_std = jnp.zeros(LATENT, float32)


def posterior_drift(t, z, args):
    model, context, _ = args
    return jax.vmap(model.posterior)(jnp.concatenate([z, context], axis=-1))


def prior_drift(t, z, args):
    model, _, _ = args
    return jax.vmap(model.prior)(z)


def diffusion(t, z, args):
    """Coordinate `i` depends on that of `z` only."""
    model, _, floor = args
    raw = coordinatewise(model.diffusion, z)
    return lx.DiagonalLinearOperator(jnp.maximum(jax.nn.sigmoid(raw), floor))


def infer(
    model: LatentSDE,
    given: Float[Array, "batch 3 50"],
    num_frames: int,
    recipe: Recipe,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "batch time 50"], Float[Array, "batch time 50"], Array]:
    """A sample of the posterior given the first frames, as mean and log standard
    deviation of each angle; and its divergence from the prior.
    """
    start_key, path_key = jr.split(key)
    given = given / recipe.unit
    if recipe.derivatives:
        x0, x1, x2 = (given[:, i] for i in range(GIVEN))
        # As if frames were 0.1 apart; the second difference is small, and kept so.
        given = jnp.stack([x1, 5 * (x2 - x0), x2 - 2 * x1 + x0], axis=1)
    code = jax.vmap(model.encoder)(given.reshape(len(given), -1))
    mean, log_std, context = jnp.split(code, [LATENT, 2 * LATENT], axis=-1)
    z0 = mean + jnp.exp(log_std) * jr.normal(start_key, mean.shape, float32)
    divergence = normal_kl(mean, log_std, model.mean, model.log_std)

    ts = recipe.gap * jnp.arange(num_frames, dtype=float32)
    t0, t1, dt0 = ts[0], ts[-1], jnp.array(recipe.gap / recipe.substeps, float32)
    if recipe.kind == "ode":
        terms, y0 = ODETerm(posterior_drift), z0
    else:
        struct = jax.ShapeDtypeStruct(z0.shape, z0.dtype)
        path = BrownianInterval(t0, t1, struct, path_key, dt=dt0)
        terms = MultiTerm(ODETerm(posterior_drift), ControlTerm(diffusion, path))
        terms, y0 = path_kl(terms, prior_drift), (z0, divergence)
    sol = diffeqsolve(
        terms,
        Euler(),
        t0,
        t1,
        dt0,
        y0,
        args=(model, context, recipe.floor),
        saveat=SaveAt(ts=ts),
        adjoint=StochasticAdjoint(store_all=True),
        max_steps=recipe.substeps * num_frames,
    )
    assert sol.ys is not None
    if recipe.kind == "ode":
        z = sol.ys
    else:
        z, divergences = sol.ys
        divergence = divergences[-1]
    decoded = jax.vmap(jax.vmap(model.decoder))(jnp.swapaxes(z, 0, 1))
    mean, log_std = jnp.split(decoded, 2, axis=-1)
    return recipe.unit * mean, log_std + math.log(recipe.unit), divergence


def window(
    sequences: Float[Array, "batch 300 50"],
    num_frames: int,
    warp: float,
    key: PRNGKeyArray,
) -> Float[Array, "batch time 50"]:
    """A part of each sequence, played faster or slower."""
    last = sequences.shape[1] - 1
    if num_frames > last + 1:
        raise ValueError(f"`windows`: there are {last + 1} frames, not {num_frames}.")
    speed_key, start_key = jr.split(key)
    shape = (len(sequences), 1)
    fastest = min(1 + warp, last / (num_frames - 1))
    speed = jr.uniform(speed_key, shape, float32, 1 - warp, fastest)
    length = speed * (num_frames - 1)
    start = jr.uniform(start_key, shape, float32) * (last - length)
    at = start + speed * jnp.arange(num_frames, dtype=float32)
    index = jnp.clip(at.astype(jnp.int32), 0, last - 1)
    part = (at - index.astype(float32))[..., None]
    take = jax.vmap(lambda x, i: x[i])
    return (1 - part) * take(sequences, index) + part * take(sequences, index + 1)


def loss_fn(model, x: Float[Array, "batch time 50"], kl_weight, recipe: Recipe, key):
    """Minus the log likelihood and the weighted divergence, per frame and angle."""
    mean, log_std, divergence = infer(model, x[:, :GIVEN], x.shape[1], recipe, key)
    error = (x - mean) * jnp.exp(-log_std)
    log_likelihood = jnp.sum(-0.5 * error**2 - log_std, axis=(1, 2))
    return jnp.mean(kl_weight * divergence - log_likelihood) / (x.shape[1] * ANGLES)


def adam(recipe: Recipe) -> optax.GradientTransformation:
    if recipe.decay is None:
        steps = sum(num for num, _ in recipe.windows)
        schedule = optax.cosine_decay_schedule(recipe.learning_rate, steps)
    else:
        schedule = optax.exponential_decay(recipe.learning_rate, 1, recipe.decay)
    if math.isinf(recipe.clip):
        return optax.adam(schedule)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), optax.adam(schedule))


@eqx.filter_jit
def train_step(state, sequences, i, num_frames: int, recipe: Recipe, key):
    """Of the model, its optimiser, and its average."""
    model, opt_state, average = state
    window_key, path_key = jr.split(jr.fold_in(key, i))
    x = window(sequences, num_frames, recipe.warp, window_key)
    done = (i + 1).astype(float32)
    kl_weight = recipe.kl_weight * jnp.minimum(1, done / recipe.kl_annealing)
    loss, grads = eqx.filter_value_and_grad(loss_fn)(
        model, x, kl_weight, recipe, path_key
    )
    model, opt_state = update(adam(recipe), model, opt_state, grads)
    rate = jnp.maximum(1 - recipe.average, 1 / done)
    average = jax.tree.map(
        lambda old, new: old + rate * (new - old) if eqx.is_array(old) else old,
        average,
        model,
    )
    return (model, opt_state, average), loss


def train_model(
    sequences: Float[Array, "batch 300 50"],
    recipe: Recipe,
    key: PRNGKeyArray,
    settings: dict[str, Any],
    out: Path,
    resume: bool,
) -> tuple[LatentSDE, np.ndarray]:
    """The average of the model over the last steps, and the losses."""
    model_key, key = jr.split(key)
    model = eqx.filter_jit(LatentSDE)(model_key)
    state = (model, adam(recipe).init(eqx.filter(model, eqx.is_array)), model)
    frames = [num for steps, num in recipe.windows for _ in range(steps)]
    step = lambda state, i: train_step(
        state, sequences, jnp.asarray(i), frames[i], recipe, key
    )
    name = settings["name"]
    last = last_checkpoint(out, name) if resume else None
    state, losses = train(step, state, len(frames), settings, out, last, name)
    return state[2], losses


@eqx.filter_jit
def predict(
    model: LatentSDE,
    sequences: Float[Array, "batch 300 50"],
    recipe: Recipe,
    key: PRNGKeyArray,
) -> Float[Array, "samples batch 300 50"]:
    """Samples of the posterior given the first frames, without observation noise."""
    given, num_frames = sequences[:, :GIVEN], sequences.shape[1]
    one = lambda key: infer(model, given, num_frames, recipe, key)[0]
    return jax.lax.map(one, jr.split(key, SAMPLES))


def interval(values: Float[np.ndarray, " num"]) -> tuple[float, float]:
    """The mean and half of its 95% interval, by Student's t distribution."""
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return values.mean(), quantile * scipy.stats.sem(values)


def main(
    recipe: (
        Annotated[Recipe, tyro.conf.subcommand("ours", default=OURS)]
        | Annotated[Recipe, tyro.conf.subcommand("paper", default=PAPER)]
    ) = OURS,
    *,
    data: Path,
    held_out: Literal["cross-validation", "validation", "test"] = "cross-validation",
    seeds: tuple[int, ...] = (0,),
    out: Path = Path("latent_sde_mocap"),
    resume: bool = False,
) -> dict[str, float]:
    """Train a model with each seed, and predict sequences that it has not seen.

    Args:
        recipe: how to train.
        data: `mocap35.mat`.
        held_out: what to predict. By cross-validation, each model is four, which
            predict a quarter of the sequences for training each, from the others.
        seeds: of the weights, windows and paths.
        out: where the figure and the checkpoints go, in the place of earlier ones.
        resume: continue from the checkpoints in `out`, of a run with the same recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    sequences = load(data)
    known = sequences["train"]
    if held_out == "cross-validation":
        truth = known
        fold = np.arange(len(known)) % FOLDS
        splits = [(known[fold != i], np.flatnonzero(fold == i)) for i in range(FOLDS)]
    else:
        truth = sequences[held_out]
        splits = [(known, np.arange(len(truth)))]

    if len(seeds) == 0:
        raise ValueError("`seeds` is empty.")
    scores, errors, all_losses = {}, [], []
    predicted = np.empty((SAMPLES, *truth.shape), np.float32)
    for seed in seeds:
        for i, (seen, unseen) in enumerate(splits):
            train_key, predict_key = jr.split(jr.fold_in(jr.key(seed), i))
            name = f"seed_{seed}_split_{i}"
            settings = dict(recipe._asdict(), held_out=held_out, name=name)
            model, losses = train_model(
                jnp.asarray(seen), recipe, train_key, settings, out, resume
            )
            samples = predict(model, jnp.asarray(truth[unseen]), recipe, predict_key)
            predicted[:, unseen] = samples
            all_losses.append(losses)
        # The error of each sample and sequence.
        error = np.mean((predicted - truth)[:, :, GIVEN:] ** 2, axis=(2, 3))
        mean, half = interval(error.mean(axis=1))
        scores[f"MSE: seed {seed}"] = mean
        scores[f"MSE: seed {seed}: +- over samples"] = half
        errors.append(error.mean(axis=0))
        print(f"Seed {seed}: {mean:.2f}, each: {errors[-1].round(1)}")
    losses = np.mean(all_losses, axis=0)
    scores |= loss_scores(losses)
    scores["MSE"] = np.mean(errors)
    if len(seeds) > 1:
        scores["MSE: +- over seeds"] = interval(np.mean(errors, axis=1))[1]
    scores = report(scores)

    plot(out / "latent_sde_mocap.png", truth, predicted, np.array(errors), seeds)
    print(f"Figure and checkpoints are in {out}/.")
    return scores


def plot(path: Path, truth, predicted, errors, seeds):
    """Predictions of the last seed for the four angles that change most; errors."""
    blue, orange, grey = "#0072B2", "#D55E00", "0.3"
    fig, axes = plt.subplots(3, 4, figsize=(13, 8), layout="constrained")
    angles = np.argsort(-truth.std(axis=(0, 1)))[:4]
    frame = np.arange(truth.shape[1])
    for row, sequence in zip(axes, (0, 1), strict=False):
        for ax, angle in zip(row, angles, strict=True):
            samples = predicted[:, sequence, :, angle]
            low, middle, high = np.quantile(samples, [0.025, 0.5, 0.975], axis=0)
            ax.plot(frame, truth[sequence, :, angle], color=grey, lw=1.5, label="data")
            ax.plot(frame, middle, color=orange, lw=1.2, label="predicted, median")
            label = "95% of samples"
            ax.fill_between(
                frame, low, high, color=orange, alpha=0.3, lw=0, label=label
            )
            ax.set(title=f"Sequence {sequence + 1}, angle {angle + 1}")
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, frameon=False, loc="outside upper center", ncols=3)
    for ax in axes[:2, 0]:
        ax.set(ylabel="degrees, centred")
    for ax in axes[1]:
        ax.set(xlabel="frame")
    grid = axes[2, 0].get_gridspec()
    for ax in axes[2]:
        ax.remove()
    ax = fig.add_subplot(grid[2, :2])
    by_frame = np.mean((predicted - truth) ** 2, axis=(0, 3))
    ax.plot(frame, by_frame.T, color=blue, lw=0.8, alpha=0.6)
    ax.plot(frame, by_frame.mean(axis=0), color=grey, lw=2, label="mean")
    ax.set(title=f"Error of each sequence, seed {seeds[-1]}", xlabel="frame")
    ax.set(ylabel="degrees squared", ylim=(0, None))
    ax.legend(frameon=False)
    ax = fig.add_subplot(grid[2, 2:])
    for i, error in enumerate(errors):
        ax.plot(np.full(len(error), i), error, "o", color=blue, alpha=0.5)
        ax.plot([i - 0.2, i + 0.2], [error.mean()] * 2, color=grey, lw=2)
    ax.set(title="Error of each sequence and, as lines, the mean", xlabel="seed")
    ax.set(ylabel="degrees squared", ylim=(0, None))
    ax.set(xticks=range(len(seeds)), xticklabels=seeds)
    fig.savefig(path, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    tyro.cli(main)
