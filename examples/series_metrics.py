"""How alike two samples of series are: the metrics of an SDE-GAN, and what it has to
beat. All are divided by the standard deviation of those held out, or do not depend on
the scale.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import roughpy
from common import update
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.spatial.distance import cdist


Series = Float[np.ndarray, "num times dim"]
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
        kernel = lambda a, b: np.exp(-0.5 * cdist(a, b, "sqeuclidean") / np.var(y))
        within = (
            (np.sum(kernel(a, a)) - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y)
        )
        return sum(within) - 2 * np.mean(kernel(x, y))

    return float(np.mean([at(x[:, i], y[:, i]) for i in marginal_times(y)]))


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
    first, second = (np.mean(signatures(z / np.std(y)), axis=0) for z in (x, y))
    return float(np.linalg.norm(first - second))


class _Reader(eqx.Module):
    """A GRU, and a linear map of its last state."""

    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, dim: int, out: int, key: PRNGKeyArray):
        cell_key, readout_key = jr.split(key)
        self.cell = eqx.nn.GRUCell(dim, HIDDEN, dtype=float32, key=cell_key)
        self.readout = eqx.nn.Linear(HIDDEN, out, dtype=float32, key=readout_key)

    def __call__(self, series: Float[Array, "num times dim"]):
        def step(hidden, inputs):
            return jax.vmap(self.cell)(inputs, hidden), None

        hidden = jnp.zeros((len(series), HIDDEN), float32)
        hidden, _ = jax.lax.scan(step, hidden, jnp.swapaxes(series, 0, 1))
        return jax.vmap(self.readout)(hidden)


def _with_changes(series: Series, held_out: Series) -> Float[Array, "num times 2*dim"]:
    """Values and their changes, in units of what `held_out` has of either."""
    values = series[:, 1:] / np.std(held_out)
    changes = np.diff(series, axis=1) / np.std(np.diff(held_out, axis=1))
    return jnp.asarray(np.concatenate([values, changes], axis=-1), float32)


@eqx.filter_jit
def _fit(
    loss: Callable[[Array, Array], Array],
    series: Float[Array, "num times dim"],
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
def _read(reader: _Reader, series: Float[Array, "num times dim"]):
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


def prediction_loss(train: Series, test: Series, steps: int, seed: int) -> float:
    """The mean squared error of predictions of the last fifth of `test` from what is
    before, by a network that was trained on `train`.
    """
    seen = round(0.8 * test.shape[1])

    def future(series):
        change = series[:, seen:] - series[:, seen - 1 : seen]
        return jnp.asarray(change.reshape(len(series), -1) / np.std(test), float32)

    past = lambda series: _with_changes(series[:, :seen], test)
    reader = _fit(_squared_error, past(train), future(train), steps, jr.key(seed))
    predicted = _read(reader, past(test))
    return float(jnp.mean(_squared_error(predicted, future(test))))
