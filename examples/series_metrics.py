"""How alike two samples of series are: the metrics of generators, what they have to
beat, and a figure. All are divided by the standard deviation of those held out, or do
not depend on the scale.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import roughpy
from common import loss_scores, plot_quantiles, report, update
from devices import save_figure, say
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp
from series import Data, Series


HIDDEN, BATCH = 32, 256  # of the networks that tell series apart, and predict them
DEPTH = 5  # of signatures
float32 = jnp.float32


def gaussian_increments(series: Series, num: int, seed: int) -> Series:
    """Others that start as `series` do, and have independent normal increments, of the
    mean and the standard deviation at each time.
    """
    rng = np.random.default_rng((seed, 1))
    increments = np.diff(series, axis=1)
    mean, std = increments.mean(axis=0), increments.std(axis=0)
    start = series[rng.integers(len(series), size=num), :1]
    steps = np.concatenate([start, rng.normal(mean, std, (num, *mean.shape))], axis=1)
    return np.cumsum(steps, axis=1).astype(series.dtype)


def marginal_times(series: Series) -> np.ndarray:
    """Five, from a fifth of the time to the end."""
    return np.round(np.linspace(0, series.shape[1] - 1, 6)[1:]).astype(int)


def marginal_mmd(x: Series, y: Series) -> float:
    """The squared maximum mean discrepancy of values at one time, on average over five
    times; without bias, if the series of each sample are independent. The kernel is
    Gaussian, as wide as the standard deviation of `y` then. See Gretton et al., "A
    kernel two-sample test" (2012).
    """

    def at(x, y):
        x, y = x / np.std(y, axis=0), y / np.std(y, axis=0)
        kernel = lambda a, b: np.exp(-0.5 * cdist(a, b, "sqeuclidean"))
        within = (
            (np.sum(kernel(a, a)) - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y)
        )
        return sum(within) - 2 * np.mean(kernel(x, y))

    return float(np.mean([at(x[:, i], y[:, i]) for i in marginal_times(y)]))


def ks_rejections(x: Series, y: Series, seed: int, size: int = 128) -> float:
    """The share of Kolmogorov-Smirnov tests that reject, at the level of 5%, that
    values of a channel at one time have the same law in both: of 100 random samples of
    so many series of each, at five times. See Issa et al. 2023.
    """
    rng = np.random.default_rng((seed, 3))
    size = min(size, len(x), len(y))
    rejected = []
    for _ in range(100):
        a, b = (z[rng.permutation(len(z))[:size]] for z in (x, y))
        for i in marginal_times(y):
            for k in range(y.shape[-1]):
                _, p_value = map(float, ks_2samp(a[:, i, k], b[:, i, k]))
                rejected.append(p_value < 0.05)
    return float(np.mean(rejected))


def novelty(x: Series, held_out: Series, train: Series) -> float:
    """How far series are from the nearest one of the training, in the median, by how
    far those held out are: far below one, if they are learned by heart.
    """
    scale = np.std(train, axis=(0, 1))
    flat = lambda z: (z / scale).reshape(len(z), -1)
    nearest = lambda z: np.median(cdist(flat(z), flat(train)).min(axis=1))
    return float(nearest(x) / nearest(held_out))


def signatures(series: Series) -> Float[np.ndarray, "num terms"]:
    """The terms up to depth 5 of the signature of each, joined with the time from 0 to
    1, and beginning at zero, so that it also has the start.
    """
    num, times, dim = series.shape
    steps = np.diff(series.astype(float), axis=1, prepend=0)
    time = np.full((num, times, 1), 1 / (times - 1))
    time[:, 0] = 0
    steps = np.concatenate([time, steps], axis=-1)
    context = roughpy.get_context(width=1 + dim, depth=DEPTH, coeffs=roughpy.DPReal)
    indices = np.arange(times) / times
    whole = roughpy.RealInterval(0, 1)  # pyright: ignore[reportCallIssue]

    def signature(steps):
        stream = roughpy.LieIncrementStream.from_increments(
            steps, indices=indices, ctx=context
        )
        terms = stream.signature(whole)  # pyright: ignore[reportCallIssue]
        return np.array(terms)[1:]

    return np.stack([signature(x) for x in steps])


def signature_mmd(x: Series, y: Series) -> float:
    """The maximum mean discrepancy of signatures: the distance of their means."""
    scale = np.std(y, axis=(0, 1))
    first, second = (np.mean(signatures(z / scale), axis=0) for z in (x, y))
    return float(np.linalg.norm(first - second))


class _Reader(eqx.Module):
    """A GRU, and a linear map of its last state."""

    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, dim: int, out: int, key: PRNGKeyArray):
        cell_key, readout_key = jr.split(key)
        self.cell = eqx.nn.GRUCell(dim, HIDDEN, dtype=float32, key=cell_key)
        self.readout = eqx.nn.Linear(HIDDEN, out, dtype=float32, key=readout_key)

    def __call__(self, series: Float[Array, "num times channels"]):
        def step(hidden, inputs):
            return jax.vmap(self.cell)(inputs, hidden), None

        hidden = jnp.zeros((len(series), HIDDEN), float32)
        hidden, _ = jax.lax.scan(step, hidden, jnp.swapaxes(series, 0, 1))
        return jax.vmap(self.readout)(hidden)


def _with_changes(
    series: Series, held_out: Series
) -> Float[Array, "num times 2*channels"]:
    """Values and their changes, in units of what `held_out` has of either."""
    values = series[:, 1:] / np.std(held_out, axis=(0, 1))
    changes = np.diff(series, axis=1) / np.std(np.diff(held_out, axis=1), axis=(0, 1))
    return jnp.asarray(np.concatenate([values, changes], axis=-1), float32)


@eqx.filter_jit
def _fit(
    loss: Callable[[Array, Array], Array],
    series: Float[Array, "num times channels"],
    target: Float[Array, "num out"],
    steps: int,
    key: PRNGKeyArray,
) -> _Reader:
    """A reader of `series`, trained to predict `target`."""
    model_key, data_key = jr.split(key)
    reader = _Reader(series.shape[-1], target.shape[-1], model_key)
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(state, key):
        reader, opt_state = state
        index = jr.choice(key, len(series), (BATCH,))
        error = lambda reader: jnp.mean(loss(reader(series[index]), target[index]))
        grads = eqx.filter_grad(error)(reader)
        return update(optimiser, reader, opt_state, grads), None

    state = (reader, optimiser.init(eqx.filter(reader, eqx.is_array)))
    (reader, _), _ = jax.lax.scan(step, state, jr.split(data_key, steps))
    return reader


@eqx.filter_jit
def _read(reader: _Reader, series: Float[Array, "num times channels"]):
    return reader(series)


def _squared_error(predicted: Array, target: Array) -> Array:
    return (predicted - target) ** 2


def classification_accuracy(
    train: tuple[Series, Series], test: tuple[Series, Series], steps: int, seed: int
) -> float:
    """How often a classifier is right that was trained to tell two kinds of series
    apart, on others of these kinds: one half if they are alike, and one if they are
    not.
    """
    labels = lambda pair: np.repeat([1.0, 0.0], [len(x) for x in pair])[:, None]
    inputs = lambda pair: _with_changes(np.concatenate(pair), test[0])
    target = jnp.asarray(labels(train), float32)
    loss = optax.sigmoid_binary_cross_entropy
    reader = _fit(loss, inputs(train), target, steps, jr.key(seed))
    logit = _read(reader, inputs(test))
    is_right = (np.asarray(logit) > 0) == (labels(test) > 0.5)
    return float(np.mean(is_right))


def label_accuracy(
    train: tuple[Series, np.ndarray],
    test: tuple[Series, np.ndarray],
    steps: int,
    seed: int,
) -> float:
    """How often a classifier that was trained on series of `train` and their labels,
    which are whole numbers from zero on, finds the label of a series of `test`.
    """
    (series, label), (other, other_label) = train, test
    inputs = lambda x: _with_changes(x, other)
    target = jax.nn.one_hot(label, max(label) + 1, dtype=float32)
    loss = optax.softmax_cross_entropy
    reader = _fit(loss, inputs(series), target, steps, jr.key(seed))
    found = np.argmax(_read(reader, inputs(other)), axis=-1)
    return float(np.mean(found == other_label))


def prediction_loss(train: Series, test: Series, steps: int, seed: int) -> float:
    """The mean squared error of predictions of the last fifth of `test` from what is
    before, by a network that was trained on `train`.
    """
    seen = round(0.8 * test.shape[1])

    def future(series):
        change = series[:, seen:] - series[:, seen - 1 : seen]
        change = change / np.std(test, axis=(0, 1))
        return jnp.asarray(change.reshape(len(series), -1), float32)

    past = lambda series: _with_changes(series[:, :seen], test)
    reader = _fit(_squared_error, past(train), future(train), steps, jr.key(seed))
    predicted = _read(reader, past(test))
    return float(jnp.mean(_squared_error(predicted, future(test))))


def compare(
    data: Data,
    generated: Sequence[Series],
    untrained: Sequence[Series],
    samples: int,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """All metrics of a generator before and after its training, of normal increments,
    each by two independent samples, and of the series for training.
    """
    rng = np.random.default_rng((seed, 2))
    choose = lambda x: x[rng.permutation(len(x))[:samples]]
    others, real = choose(data.held_out), choose(data.train)
    normal = [gaussian_increments(data.train, samples, 2 * seed + i) for i in (0, 1)]
    kinds = {
        "generator": generated,
        "untrained": untrained,
        "normal increments": normal,
    }
    scores = {}
    for kind, (first, second) in kinds.items():
        scores[f"real or not: {kind}"] = classification_accuracy(
            (real, first), (others, second), steps, seed
        )
    kinds["series for training"] = [real]
    metrics = {
        "prediction": lambda x: prediction_loss(x, others, steps, seed),
        "MMD of signatures": lambda x: signature_mmd(x, others),
        "MMD^2 of marginals": lambda x: marginal_mmd(x, others),
        "KS tests rejected": lambda x: ks_rejections(x, others, seed),
        "novelty": lambda x: novelty(x, others, data.train),
    }
    for name, metric in metrics.items():
        for kind, (first, *_) in kinds.items():
            if (name, kind) != ("novelty", "series for training"):
                scores[f"{name}: {kind}"] = metric(first)
    return scores


def evaluate(
    name: str,
    data: Data,
    generate: Callable[[Any, int, PRNGKeyArray], Array],
    trained: tuple[Any, PRNGKeyArray],
    untrained: tuple[Any, PRNGKeyArray],
    losses: Float[np.ndarray, " steps"],
    *,
    samples: int,
    steps: int,
    seed: int,
    out: Path,
) -> dict[str, float]:
    """Prints and returns all scores of a generator and of its training, and draws its
    series, from models and keys for their noise.
    """
    samples = min(samples, len(data.train), len(data.held_out))
    sample = eqx.filter_jit(lambda model, key: generate(model, samples, key))
    pair = lambda model, key: [np.asarray(sample(model, k)) for k in jr.split(key)]
    generated = pair(*trained)
    scores = compare(data, generated, pair(*untrained), samples, steps, seed)
    scores = report(scores | loss_scores(losses))
    plot(out, name, data, generated[0])
    say(f"Figures and checkpoints are in {out}/.")
    return scores


def plot(folder: Path, name: str, data: Data, generated: Series) -> None:
    """Series, their quantiles, and their distributions at five times: a figure of each
    channel, `{name}.png`, `{name}_1.png` and so on.
    """
    normal = gaussian_increments(data.train, len(generated), 0)
    # One window is much like the next.
    held_out = np.random.default_rng(0).permutation(data.held_out)
    for k, label in enumerate(data.labels):
        fig = _figure(
            label, *(x[..., k : k + 1] for x in (held_out, generated, normal))
        )
        save_figure(fig, folder / f"{name}{f'_{k}' if k else ''}.png")


def _figure(label: str, held_out: Series, generated: Series, normal: Series) -> Figure:
    blue, orange, grey = "#0072B2", "#D55E00", "0.45"
    times = held_out.shape[1]
    t = np.arange(times)
    fig = plt.figure(figsize=(15, 7.5), layout="constrained")
    top, bottom = fig.subfigures(2, 1, squeeze=False)[:, 0]
    axes = top.subplots(1, 4)
    low, high = np.quantile(held_out, (0.0005, 0.9995))
    limits = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    for ax, title, x, colour in (
        (axes[0], "Held-out series", held_out, grey),
        (axes[1], "Generated series", generated, blue),
    ):
        ax.plot(t, x[:40, :, 0].T, color=colour, lw=0.7, alpha=0.8)
        ax.set(title=title, xlabel="time", ylim=limits)
    axes[0].set(ylabel=label)

    ax = axes[2]
    plot_quantiles(ax, t, held_out[..., 0], generated[..., 0], blue, "generated")
    ax.set(title="Quantiles: 5, 25, 50, 75, 95%", xlabel="time", ylim=limits)

    kinds = (
        (held_out, grey, "held out"),
        (generated, blue, "generated"),
        (normal, orange, "normal increments"),
    )
    ax = axes[3]
    lags = np.unique(np.round(np.geomspace(1, times - 1, 20)).astype(int))
    for x, colour, name in kinds:
        spread = [np.std(x[:, k:] - x[:, :-k]) for k in lags]
        ax.loglog(lags, spread, "o-", color=colour, ms=3, label=name)
    ax.set(title="Standard deviation of changes", xlabel="time between")
    ax.legend(frameon=False)

    axes = bottom.subplots(1, 5)
    for ax, i in zip(axes, marginal_times(held_out), strict=True):
        ends = np.quantile(held_out[:, i], (0.001, 0.999))
        margin = 0.2 * np.ptp(ends)
        edges = np.linspace(ends[0] - margin, ends[1] + margin, 41)
        for x, colour, _ in kinds:
            ax.hist(
                x[:, i, 0], edges, density=True, histtype="step", color=colour, lw=1.8
            )
        ax.set(title=f"Density at time {i}", xlabel=label, yticks=[])
    return fig
