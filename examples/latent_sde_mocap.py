"""Motion capture with a latent SDE of 11 605 parameters, or the latent ODE in it.

The experiment of section 7.3 of Li, Wong, Chen and Duvenaud, "Scalable gradients for
stochastic differential equations" (2020), https://arxiv.org/abs/2001.01328: 50 joint
angles of a walking person. A model reads the first three frames of a sequence of 300
and predicts the other 297. The networks are the paper's. How they are trained, and what
they are given, is not, but for the recipe of that name.

In the second set-up, of Ansari, Heng, Lim and Soh, "Neural continuous-discrete state
space models" (2023), https://arxiv.org/abs/2301.11308, a model reads the first 100
frames and predicts the other 200, and is trained on the first 200 frames of sequences.
There the encoder is a recurrent network.

    python examples/latent_sde_mocap.py --data mocap35.mat recipe:ours
    python examples/latent_sde_mocap.py --data mocap35.mat recipe:ours --recipe.kind ode
    python examples/latent_sde_mocap.py --data mocap35.mat recipe:energy
    python examples/latent_sde_mocap.py --data mocap35.mat recipe:second
    python examples/latent_sde_mocap.py --data mocap35.mat recipe:paper

The data are the sequences of subject 35 of the CMU motion capture database, split and
centred as in the literature: `data/mocap/mocap35.mat` of the repository
https://github.com/uncbiag/neuro_shooting. Every choice was made by `--held-out
cross-validation`, over the sequences for training; in the second set-up over a quarter
of them.
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
from devices import (
    Rows,
    batch_size,
    make_step,
    normal,
    save_figure,
    say,
    take,
    value_and_grad,
)
from diffrax import ControlTerm, Euler, MultiTerm, ODETerm, SaveAt, diffeqsolve
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffrax_sde_adjoint import (
    BrownianInterval,
    StochasticAdjoint,
    energy_score,
    path_kl,
)


SHA256 = "105484f138487f10209cce883d26e2e030d10a6df6f10159f4e6e253f9b03b8d"
FRAMES, LATENT, CONTEXT, ANGLES, WIDTH = 300, 6, 3, 50, 30
FOLDS, SAMPLES = 4, 50
PART = 10  # frames, of which samples are compared
NORMAL = 1.96  # of a normal distribution, 95% is within so many deviations
float32 = jnp.float32


class Recipe(NamedTuple):
    """How a model is trained, and what it sees."""

    # Frames at the start of a sequence that the encoder reads. It is that of the paper
    # if they are three, and else a recurrent network.
    given: int = 3
    # Frames of a sequence, from its start, that are trained on.
    known: int = FRAMES
    # Steps, each with so many consecutive frames of every sequence.
    windows: tuple[tuple[int, int], ...] = ((1500, 60), (1500, 150), (1000, 270))
    # A window starts anywhere, and is played faster or slower by up to this share.
    warp: float = 0.07
    # The encoder reads three frames as position, velocity and acceleration.
    derivatives: bool = True
    # The standard deviation of noise on what the encoder reads in training, in degrees.
    noise: float = 0.0
    # The unit of what networks read and return, in degrees.
    unit: float = 6.0
    # If there are any, so many samples of each sequence are trained by their energy
    # score, in place of the likelihood and the divergence from the prior.
    samples: int = 0
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
ENERGY = Recipe(windows=((1200, 60), (1200, 150), (800, 270)), warp=0.04, samples=4)
SECOND = Recipe(
    given=100, known=200, windows=((1500, 60), (1500, 120), (1000, 180)), noise=0.5
)
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


class Recurrent(eqx.Module):
    """Reads frames one after the other, so as many as there are."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __init__(self, num_in: int, num_out: int, key: PRNGKeyArray):
        cell_key, key = jr.split(key)
        self.cell = eqx.nn.GRUCell(num_in, WIDTH, dtype=float32, key=cell_key)
        self.last = eqx.nn.Linear(WIDTH, num_out, dtype=float32, key=key)

    def __call__(self, frames: Float[Array, "given 50"]) -> Float[Array, " code"]:
        start = jnp.zeros(WIDTH, float32)
        step = lambda state, frame: (self.cell(frame, state), None)
        state, _ = jax.lax.scan(step, start, frames)
        return self.last(state)


class LatentSDE(eqx.Module):
    """dz = f dt + g dW, with a prior `f(z)` and a posterior `f(z, context)`."""

    encoder: eqx.nn.MLP | Recurrent
    decoder: eqx.nn.MLP
    posterior: eqx.nn.MLP
    prior: eqx.nn.MLP
    diffusion: eqx.nn.MLP  # one for each latent coordinate, stacked
    mean: Float[Array, " latent"]
    log_std: Float[Array, " latent"]

    def __init__(self, given: int, key: PRNGKeyArray):
        keys = jr.split(key, 5)
        code = 2 * LATENT + CONTEXT
        if given == 3:
            self.encoder = mlp(given * ANGLES, code, 2, keys[0])
        else:
            self.encoder = Recurrent(ANGLES, code, keys[0])
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


def first_frame(recipe: Recipe, given: int) -> int:
    """Where the SDE starts: at the first frame that the paper's encoder reads, and at
    the last one of a recurrent network, of which that knows most.
    """
    return 0 if recipe.given == 3 else given - 1


def encode(
    model: LatentSDE, given: Float[Array, "batch given 50"], recipe: Recipe
) -> Float[Array, "batch code"]:
    given = given / recipe.unit
    if isinstance(model.encoder, Recurrent):
        return jax.vmap(model.encoder)(given)
    if recipe.derivatives:
        x0, x1, x2 = (given[:, i] for i in range(3))
        # As if frames were 0.1 apart; the second difference is small, and kept so.
        given = jnp.stack([x1, 5 * (x2 - x0), x2 - 2 * x1 + x0], axis=1)
    return jax.vmap(model.encoder)(given.reshape(len(given), -1))


def infer(
    model: LatentSDE,
    given: Float[Array, "batch given 50"],
    num_frames: int,
    recipe: Recipe,
    key: PRNGKeyArray,
    rows: Rows = None,
) -> tuple[Float[Array, "batch time 50"], Float[Array, "batch time 50"], Array]:
    """A sample of the posterior given the first frames, from where the SDE starts, as
    mean and log standard deviation of each angle; and its divergence from the prior.
    """
    start_key, path_key = jr.split(key)
    code = encode(model, given, recipe)
    mean, log_std, context = jnp.split(code, [LATENT, 2 * LATENT], axis=-1)
    z0 = mean + jnp.exp(log_std) * normal(start_key, mean.shape, rows)
    divergence = normal_kl(mean, log_std, model.mean, model.log_std)

    ts = recipe.gap * jnp.arange(num_frames, dtype=float32)
    t0, t1, dt0 = ts[0], ts[-1], jnp.array(recipe.gap / recipe.substeps, float32)
    if recipe.kind == "ode":
        terms, y0 = ODETerm(posterior_drift), z0
    else:
        struct = jax.ShapeDtypeStruct(z0.shape, z0.dtype)
        path = BrownianInterval(t0, t1, struct, path_key, dt=dt0, rows=rows)
        terms = MultiTerm(ODETerm(posterior_drift), ControlTerm(diffusion, path))
        y0 = z0
        if recipe.samples == 0:
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
    if recipe.kind == "ode" or recipe.samples > 0:
        z = sol.ys
    else:
        z, divergences = sol.ys
        divergence = divergences[-1]
    decoded = jax.vmap(jax.vmap(model.decoder))(jnp.swapaxes(z, 0, 1))
    mean, log_std = jnp.split(decoded, 2, axis=-1)
    if recipe.samples > 0:  # They are observations.
        log_std = jnp.full_like(log_std, -jnp.inf)
    return recipe.unit * mean, log_std + math.log(recipe.unit), divergence


def window(
    sequences: Float[Array, "batch frames 50"],
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
    frames = jax.vmap(lambda x, i: x[i])
    return (1 - part) * frames(sequences, index) + part * frames(sequences, index + 1)


def energy_of_parts(
    x: Float[Array, "batch time 50"],
    samples: Float[Array, "batch samples time 50"],
    rows: Rows,
) -> Float[Array, ""]:
    """The energy score of samples of ten frames in a row, for one angle of them."""
    num = x.shape[1] // PART
    cut = lambda z: z[..., : num * PART, :].reshape(*z.shape[:-2], num, -1)
    of_sequence = jax.vmap(lambda x, y: energy_score(x[None], y), in_axes=(0, 1))
    scores = jax.vmap(of_sequence)(cut(x), cut(samples))
    num_scores = num * batch_size(x, rows)
    return jnp.sum(scores) / num_scores / math.sqrt(PART * ANGLES)


def loss_fn(
    model,
    x: Float[Array, "batch time 50"],
    kl_weight,
    recipe: Recipe,
    path_key,
    noise_key,
    rows: Rows,
):
    """Minus the log likelihood and the weighted divergence, per frame and angle; or the
    energy score.
    """
    # So that in a short window, too, there is as much to predict as is given.
    given = 3 if recipe.given == 3 else min(recipe.given, x.shape[1] // 2)
    read, x = x[:, :given], x[:, first_frame(recipe, given) :]
    read = read + recipe.noise * normal(noise_key, read.shape, rows)
    num = recipe.samples
    if num > 0:
        read = jnp.repeat(read, num, axis=0)
        repeated = None if rows is None else (num * rows[0], num * rows[1])
        samples, *_ = infer(model, read, x.shape[1], recipe, path_key, repeated)
        samples = samples.reshape(len(x), num, *x.shape[1:])
        return energy_of_parts(x / recipe.unit, samples / recipe.unit, rows)
    mean, log_std, divergence = infer(model, read, x.shape[1], recipe, path_key, rows)
    error = (x - mean) * jnp.exp(-log_std)
    log_likelihood = jnp.sum(-0.5 * error**2 - log_std, axis=(1, 2))
    total = jnp.sum(kl_weight * divergence - log_likelihood)
    return total / batch_size(x, rows) / (x.shape[1] * ANGLES)


def adam(recipe: Recipe) -> optax.GradientTransformation:
    if recipe.decay is None:
        steps = sum(num for num, _ in recipe.windows)
        schedule = optax.cosine_decay_schedule(recipe.learning_rate, steps)
    else:
        schedule = optax.exponential_decay(recipe.learning_rate, 1, recipe.decay)
    if math.isinf(recipe.clip):
        return optax.adam(schedule)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), optax.adam(schedule))


def train_step(state, data, i, rows: Rows, num_frames: int, recipe: Recipe):
    """Of the model, its optimiser, and its average."""
    model, opt_state, average = state
    sequences, key = data
    window_key, path_key, noise_key = jr.split(jr.fold_in(key, i), 3)
    x = take(window(sequences, num_frames, recipe.warp, window_key), rows)
    done = (i + 1).astype(float32)
    kl_weight = recipe.kl_weight * jnp.minimum(1, done / recipe.kl_annealing)
    loss, grads = value_and_grad(loss_fn, rows)(
        model, x, kl_weight, recipe, path_key, noise_key, rows
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
    sequences: Float[Array, "batch frames 50"],
    recipe: Recipe,
    key: PRNGKeyArray,
    settings: dict[str, Any],
    devices: int,
    out: Path,
    resume: bool,
) -> tuple[LatentSDE, np.ndarray]:
    """The average of the model over the last steps, and the losses."""
    model_key, key = jr.split(key)
    model = eqx.filter_jit(LatentSDE)(recipe.given, model_key)
    state = (model, adam(recipe).init(eqx.filter(model, eqx.is_array)), model)
    frames = [num for steps, num in recipe.windows for _ in range(steps)]
    step = make_step(train_step, (sequences, key), len(sequences), devices)
    one_step = lambda state, i: step(state, i, frames[i], recipe)
    name = settings["name"]
    last = last_checkpoint(out, name) if resume else None
    state, losses = train(one_step, state, len(frames), settings, out, last, name)
    return state[2], losses


@eqx.filter_jit
def predict(
    model: LatentSDE,
    given: Float[Array, "batch given 50"],
    num_frames: int,
    recipe: Recipe,
    key: PRNGKeyArray,
) -> tuple[
    Float[Array, "samples batch time 50"], Float[Array, "samples batch time 50"]
]:
    """Samples of the posterior given the first frames: mean and log standard deviation
    of what is observed.
    """
    one = lambda key: infer(model, given, num_frames, recipe, key)[:2]
    return jax.lax.map(one, jr.split(key, SAMPLES))


def interval(values: Float[np.ndarray, " num"]) -> tuple[float, float]:
    """The mean and half of its 95% interval, by Student's t distribution."""
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return values.mean(), quantile * scipy.stats.sem(values)


def split(
    sequences: dict[str, Float[np.ndarray, "sequences 300 50"]], held_out: str
) -> tuple[
    Float[np.ndarray, "sequences 300 50"],
    list[tuple[Float[np.ndarray, "seen 300 50"], Int[np.ndarray, " unseen"]]],
]:
    """The sequences that are predicted; and for each model those that it is trained on,
    and which ones it predicts.
    """
    known = sequences["train"]
    if held_out != "cross-validation":
        truth = sequences[held_out]
        return truth, [(known, np.arange(len(truth)))]
    fold = np.arange(len(known)) % FOLDS
    return known, [(known[fold != i], np.flatnonzero(fold == i)) for i in range(FOLDS)]


def train_and_predict(
    splits: list[tuple[Float[np.ndarray, "seen 300 50"], Int[np.ndarray, " unseen"]]],
    truth: Float[np.ndarray, "sequences 300 50"],
    recipe: Recipe,
    seed: int,
    settings: dict[str, Any],
    devices: int,
    out: Path,
    resume: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of all sequences, as mean and log standard deviation, not a number where
    nothing is predicted; and the losses.
    """
    mean, log_std = np.full((2, SAMPLES, *truth.shape), np.nan, np.float32)
    start = first_frame(recipe, recipe.given)
    all_losses = []
    for i, (seen, unseen) in enumerate(splits):
        train_key, predict_key = jr.split(jr.fold_in(jr.key(seed), i))
        settings = dict(settings, name=f"seed_{seed}_split_{i}")
        known = jnp.asarray(seen[:, : recipe.known])
        model, losses = train_model(
            known, recipe, train_key, settings, devices, out, resume
        )
        given = jnp.asarray(truth[unseen, : recipe.given])
        mean[:, unseen, start:], log_std[:, unseen, start:] = predict(
            model, given, truth.shape[1] - start, recipe, predict_key
        )
        all_losses.append(losses)
    return mean, log_std, np.mean(all_losses, axis=0)


def score(
    truth: Float[np.ndarray, "sequences time 50"],
    samples: Float[np.ndarray, "seeds samples sequences time 50"],
    log_std: Float[np.ndarray, "seeds samples sequences time 50"],
    seeds: tuple[int, ...],
) -> dict[str, Any]:
    """Errors of samples, as they are published, and of their means; and how wide bands
    are, and how much of the data is in them.
    """
    mse = lambda mean: np.mean((mean - truth) ** 2, axis=(-1, -2))
    scores, of_seeds = {}, []
    for seed, samples_of_seed in zip(seeds, samples, strict=True):
        error = mse(samples_of_seed)
        mean, half = interval(error.mean(axis=1))
        scores[f"MSE: seed {seed}"] = mean
        scores[f"MSE: seed {seed}: +- over samples"] = half
        of_seeds.append(mean)
        say(f"Seed {seed}: {mean:.2f}, each: {error.mean(axis=0).round(1)}")
    means = samples.mean(axis=1)
    scores["MSE"] = np.mean(of_seeds)
    scores["MSE of means of samples"] = mse(means).mean()
    if len(seeds) > 1:
        scores["MSE: +- over seeds"] = interval(np.array(of_seeds))[1]
        scores["MSE of the mean of seeds"] = mse(means.mean(axis=0)).mean()
    observed = observed_std(samples, log_std)
    scores["standard deviation of samples"] = samples.std(axis=1).mean()
    scores["standard deviation of observations"] = observed.mean()
    scores["data in 95% bands"] = np.mean(np.abs(means - truth) < NORMAL * observed)
    return scores


def observed_std(
    samples: Float[np.ndarray, "seeds samples ..."],
    log_std: Float[np.ndarray, "seeds samples ..."],
) -> Float[np.ndarray, "seeds ..."]:
    """Standard deviation of an observation, of which samples are the mean."""
    return np.sqrt(samples.var(axis=1) + np.exp(2 * log_std).mean(axis=1))


def main(
    recipe: (
        Annotated[Recipe, tyro.conf.subcommand("ours", default=OURS)]
        | Annotated[Recipe, tyro.conf.subcommand("energy", default=ENERGY)]
        | Annotated[Recipe, tyro.conf.subcommand("second", default=SECOND)]
        | Annotated[Recipe, tyro.conf.subcommand("paper", default=PAPER)]
    ) = OURS,
    *,
    data: Path,
    held_out: Literal["cross-validation", "validation", "test"] = "cross-validation",
    devices: int = 1,
    seeds: tuple[int, ...] = (0,),
    out: Path = Path("latent_sde_mocap"),
    resume: bool = False,
) -> dict[str, float]:
    """Train a model with each seed, and predict sequences that it has not seen.

    Args:
        recipe: how to train, and what is given.
        data: `mocap35.mat`.
        held_out: what to predict. By cross-validation, each model is four, which
            predict a quarter of the sequences for training each, from the others.
        devices: that share each batch, of all sequences for training.
        seeds: of the weights, windows and paths.
        out: where the figure and the checkpoints go, in the place of earlier ones.
        resume: continue from the checkpoints in `out`, of a run with the same recipe.
    """
    if len(seeds) == 0:
        raise ValueError("`seeds` is empty.")
    out.mkdir(parents=True, exist_ok=True)
    truth, splits = split(load(data), held_out)
    settings = dict(recipe._asdict(), held_out=held_out)

    runs = [
        train_and_predict(splits, truth, recipe, seed, settings, devices, out, resume)
        for seed in seeds
    ]
    samples, log_std, losses = (np.array(x) for x in zip(*runs, strict=True))
    predicted = np.s_[..., recipe.given :, :]
    scores = score(truth[predicted], samples[predicted], log_std[predicted], seeds)
    scores = report(scores | loss_scores(losses.mean(axis=0)))

    plot(out / "latent_sde_mocap.png", truth, samples, log_std, seeds, recipe.given)
    say(f"Figure and checkpoints are in {out}/.")
    return scores


def plot(path: Path, truth, samples, log_std, seeds, given: int):
    """Predictions for the four angles that change most, by each seed and, with a band,
    by the last one; and errors.
    """
    means, observed = samples.mean(axis=1), observed_std(samples, log_std)
    blue, orange, grey = "#0072B2", "#D55E00", "0.3"
    fig, axes = plt.subplots(3, 4, figsize=(13, 8), layout="constrained")
    angles = np.argsort(-truth.std(axis=(0, 1)))[:4]
    frame = np.arange(truth.shape[1])
    for row, sequence in zip(axes, (0, 1), strict=False):
        for ax, angle in zip(row, angles, strict=True):
            middle = means[:, sequence, :, angle]
            half = NORMAL * observed[-1, sequence, :, angle]
            low, high = middle[-1] - half, middle[-1] + half
            ax.fill_between(frame, low, high, color=orange, alpha=0.2, lw=0)
            ax.plot(frame, truth[sequence, :, angle], color=grey, lw=1.5)
            ax.plot(frame, middle.T, color=orange, lw=0.8)
            ax.set(title=f"Sequence {sequence + 1}, angle {angle + 1}")
    labels = (f"95% band, seed {seeds[-1]}", "data", "predicted, each seed")
    handles = (*axes[0, 0].collections, *axes[0, 0].lines[:2])
    fig.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3)
    for ax in axes[:2, 0]:
        ax.set(ylabel="degrees, centred")
    for ax in axes[1]:
        ax.set(xlabel="frame")
    grid = axes[2, 0].get_gridspec()
    for ax in axes[2]:
        ax.remove()
    ax = fig.add_subplot(grid[2, :2])
    by_frame = np.mean((means - truth) ** 2, axis=-1)[-1]
    ax.plot(frame, by_frame.T, color=blue, lw=0.8, alpha=0.6)
    ax.plot(frame, by_frame.mean(axis=0), color=grey, lw=2, label="mean")
    ax.set(title=f"Error of each sequence, seed {seeds[-1]}", xlabel="frame")
    ax.set(ylabel="degrees squared", ylim=(0, None))
    ax.legend(frameon=False)
    ax = fig.add_subplot(grid[2, 2:])
    errors = np.mean((samples - truth)[..., given:, :] ** 2, axis=(1, 3, 4))
    for i, error in enumerate(errors):
        ax.plot(np.full(len(error), i), error, "o", color=blue, alpha=0.5)
        ax.plot([i - 0.2, i + 0.2], [error.mean()] * 2, color=grey, lw=2)
    ax.set(title="Error of each sequence and, as lines, the mean", xlabel="seed")
    ax.set(ylabel="degrees squared", ylim=(0, None))
    ax.set(xticks=range(len(seeds)), xticklabels=seeds)
    save_figure(fig, path)


if __name__ == "__main__":
    tyro.cli(main)
