"""An SDE-GAN: a neural SDE learns to generate series, from a critic that reads them.

    python examples/sde_gan.py
    python examples/sde_gan.py --data ou

The generator is a neural SDE and the critic a neural CDE, both solved by reversible
Heun and differentiated by `StochasticAdjoint`. Clipping and LipSwish keep the critic
Lipschitz, as in Kidger, Foster, Li and Lyons, "Efficient and accurate gradients for
neural SDEs" (2021), https://arxiv.org/abs/2105.13493. With `--penalty 10` or `--solver
midpoint` it is what that paper compares with.

By default the series are 16 hours of the glucose of one person, every quarter of an
hour; `--data ou` is a time-dependent Ornstein-Uhlenbeck process.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from common import loss_scores, plot_quantiles, report, train, update
from diffrax import (
    AbstractAdjoint,
    AbstractPath,
    AbstractSolver,
    AbstractTerm,
    LinearInterpolation,
    Midpoint,
    MultiTerm,
    ODETerm,
    SaveAt,
    diffeqsolve,
)
from glucose import DAY, load_glucose
from jaxtyping import Array, Float, Int, PRNGKeyArray
from series_metrics import (
    classification_accuracy,
    gaussian_increments,
    marginal_mmd,
    marginal_times,
    prediction_loss,
    signature_mmd,
)

from diffrax_sde_adjoint import (
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    clip_lipschitz,
    lipswish,
)


TIMES = 64  # of each series: 0, 1, ..., 63
INITIAL_NOISE, NOISE, HIDDEN, WIDTH = 5, 3, 16, 16
float32 = jnp.float32


# Data


class Data(NamedTuple):
    """Series for training, others, and what they are of."""

    train: Float[np.ndarray, "num times dim"]
    held_out: Float[np.ndarray, "held_out times dim"]
    label: str


def ornstein_uhlenbeck(num: int, seed: int) -> Float[np.ndarray, "num times 1"]:
    """dy = (0.02 t - 0.1 y) dt + 0.4 dW from y(0) uniform in [-1, 1], exactly.

    The distance from `0.2 t - 2`, which solves the equation without noise, is an
    Ornstein-Uhlenbeck process with normal transitions.
    """
    rng = np.random.default_rng(seed)
    decay = np.exp(-0.1)
    std = 0.4 * np.sqrt((1 - decay**2) / 0.2)
    around = 0.2 * np.arange(TIMES) - 2
    distance = np.empty((num, TIMES))
    distance[:, 0] = rng.uniform(-1, 1, num) - around[0]
    for i in range(1, TIMES):
        distance[:, i] = decay * distance[:, i - 1] + std * rng.normal(size=num)
    return (around + distance)[..., None]


def glucose_windows() -> dict[str, Float[np.ndarray, "num times 1"]]:
    """Log glucose in windows without gaps, which start at any time of the first of two
    days. Of ten pairs of days, seven are for training, one for validation and two for
    the test.
    """
    pairs = np.log(load_glucose())
    pairs = pairs[: len(pairs) // (2 * DAY) * 2 * DAY].reshape(-1, 2 * DAY)
    windows = np.lib.stride_tricks.sliding_window_view(pairs, TIMES, axis=1)[:, :DAY]
    of_ten = np.arange(len(pairs)) % 10
    parts = dict(validation=(4,), test=(2, 7), train=(0, 1, 3, 5, 6, 8, 9))
    split = {
        name: windows[np.isin(of_ten, part)].reshape(-1, TIMES, 1)
        for name, part in parts.items()
    }
    return {name: x[np.isfinite(x).all(axis=(1, 2))] for name, x in split.items()}


def load(
    name: Literal["glucose", "ou"], held_out: Literal["validation", "test"]
) -> Data:
    """Scaled by the mean and the standard deviation at the first time."""
    if name == "ou":
        sizes = dict(train=8192, test=2048, validation=2048)
        split = {
            part: ornstein_uhlenbeck(num, i)
            for i, (part, num) in enumerate(sizes.items())
        }
        label = "y"
    else:
        split = glucose_windows()
        label = "log glucose, scaled"
    series = [split["train"], split[held_out]]
    start = series[0][:, 0]
    train, others = (
        ((x - start.mean()) / start.std()).astype(np.float32) for x in series
    )
    return Data(train, others, label)


# Models


def brownian_interval(t0, t1, shape, key: PRNGKeyArray) -> AbstractPath:
    return BrownianInterval(t0, t1, shape, key, dt=1.0)


class Method(NamedTuple):
    """How both equations are solved and differentiated. They are short, so memory is no
    concern; and 63 steps of reversible Heun could not be undone in single precision.
    """

    solver: AbstractSolver = ReversibleHeun()
    adjoint: AbstractAdjoint = StochasticAdjoint(store_all=True)
    brownian: Callable[..., AbstractPath] = brownian_interval


REVERSIBLE = Method()


class NeuralDE(eqx.Module):
    """`dh = f(t, h) dt + g(t, h) dX` from `h(0) = initial(x)`, and a linear map of it.

    As a generator, `X` is Brownian motion and `x` noise. As a critic, `X` is a series
    and `x` its start.
    """

    initial: eqx.nn.MLP
    drift: eqx.nn.MLP
    field: eqx.nn.MLP
    readout: eqx.nn.Linear

    def __init__(self, num_x: int, control: int, out: int, key: PRNGKeyArray):
        keys = jr.split(key, 4)

        def mlp(num_in, num_out, last, key):
            return eqx.nn.MLP(
                num_in, num_out, WIDTH, 1, lipswish, last, dtype=float32, key=key
            )

        self.initial = mlp(num_x, HIDDEN, lambda x: x, keys[0])
        self.drift = mlp(1 + HIDDEN, HIDDEN, jnp.tanh, keys[1])
        self.field = mlp(1 + HIDDEN, HIDDEN * control, jnp.tanh, keys[2])
        self.readout = eqx.nn.Linear(HIDDEN, out, dtype=float32, key=keys[3])

    def __call__(
        self,
        x: Float[Array, "batch x"],
        control: AbstractPath,
        saveat: SaveAt,
        method: Method,
    ) -> Float[Array, "times batch out"]:
        t1 = jnp.asarray(TIMES - 1, float32)
        sol = diffeqsolve(
            MultiTerm(ODETerm(drift), FieldTerm(control)),
            method.solver,
            jnp.zeros_like(t1),
            t1,
            jnp.ones_like(t1),
            jax.vmap(self.initial)(x),
            self,
            saveat=saveat,
            adjoint=method.adjoint,
            max_steps=TIMES - 1,
        )
        assert sol.ys is not None
        return jax.vmap(jax.vmap(self.readout))(sol.ys)


def evaluate(network: eqx.nn.MLP, t, h: Float[Array, "batch hidden"]):
    time = jnp.broadcast_to(t / (TIMES - 1), (len(h), 1))
    return jax.vmap(network)(jnp.concatenate([time, h], axis=1))


def drift(t, h, model):
    return evaluate(model.drift, t, h)


class FieldTerm(AbstractTerm):
    """`g(t, h) dX`, for a batch of `h` and of `X`."""

    control: AbstractPath

    def vf(self, t, y, args):
        return evaluate(args.field, t, y)

    def contr(self, t0, t1, **kwargs):
        return self.control.evaluate(t0, t1, **kwargs)

    def prod(self, vf, control):
        # Written out, as XLA is slow to sum over short axes on a CPU.
        columns = jnp.split(vf, control.shape[-1], axis=1)
        return sum(x * control[:, i : i + 1] for i, x in enumerate(columns))


def make_generator(dim: int, key: PRNGKeyArray) -> NeuralDE:
    """The network of the start has larger weights, so that series start about as far
    apart as those of the data do.
    """
    generator = NeuralDE(INITIAL_NOISE, NOISE, dim, key)
    larger = lambda x: 4 * x if eqx.is_array(x) else x
    start = jax.tree.map(larger, generator.initial)
    return eqx.tree_at(lambda model: model.initial, generator, start)


def make_critic(dim: int, key: PRNGKeyArray) -> NeuralDE:
    return NeuralDE(dim, dim, 1, key)


def times() -> Float[Array, " times"]:
    return jnp.arange(TIMES, dtype=float32)


def generate(
    generator: NeuralDE, num: int, key: PRNGKeyArray, method: Method = REVERSIBLE
) -> Float[Array, "num times dim"]:
    """Series, each of its own noise."""
    start_key, path_key = jr.split(key)
    struct = jax.ShapeDtypeStruct((num, NOISE), float32)
    ts = times()
    path = method.brownian(ts[0], ts[-1], struct, path_key)
    start = jr.normal(start_key, (num, INITIAL_NOISE), float32)
    series = generator(start, path, SaveAt(t0=True, steps=True), method)
    return jnp.swapaxes(series, 0, 1)


def criticise(
    critic: NeuralDE, series: Float[Array, "num times dim"], method: Method = REVERSIBLE
) -> Float[Array, " num"]:
    """A number for each of the series: what the critic has made of its start, and of
    the whole.
    """
    path = LinearInterpolation(times(), jnp.swapaxes(series, 0, 1))
    saved = critic(series[:, 0], path, SaveAt(t0=True, t1=True), method)
    return jnp.sum(saved[..., 0], axis=0)


# Training


class Pair(NamedTuple):
    """Of the models, of their gradients, of optimisers or of their states."""

    generator: Any
    critic: Any


def score_difference(
    models: Pair, series: Float[Array, "num times dim"], key, method: Method
) -> tuple[Float[Array, ""], Float[Array, "num times dim"]]:
    """What the critic gives to series of data, on average, more than to generated ones;
    and these.

    The critic is to make it large, and the generator to make it small.
    """
    generated = generate(models.generator, len(series), key, method)
    both = jnp.concatenate([series, generated])
    real, fake = jnp.split(criticise(models.critic, both, method), 2)
    return jnp.mean(real) - jnp.mean(fake), generated


def penalty_gradient(critic: NeuralDE, series, weight: float, method: Method):
    """The gradient, for the critic, of `weight * mean((|dD/dy| - 1)^2)`, in which `D`
    is the critic, and `y` is one of the series.

    With `v = 2 (|dD/dy| - 1) dD/dy / |dD/dy|`, held fixed, that of one of the series is
    the derivative of the critic's gradient in the direction `v` of the series. So it
    takes a derivative of the gradient forwards, and none in reverse.
    """
    total = lambda critic, y: jnp.sum(criticise(critic, y, method))
    slope = jax.grad(total, argnums=1)(critic, series)
    norm = jnp.sqrt(jnp.sum(slope**2, axis=(1, 2), keepdims=True))
    norm = jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    direction = 2 * weight / len(series) * (norm - 1) / norm * slope
    gradient = lambda y: eqx.filter_grad(total)(critic, y)
    return eqx.filter_jvp(gradient, (series,), (direction,))[1]


def make_optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Rates that fall to zero, and are larger for the networks of the start, which are
    else learned too slowly.
    """

    def adam(rate):
        return optax.adam(optax.cosine_decay_schedule(rate, steps), b1=0.0, b2=0.9)

    def labels(model):
        rest = jax.tree.map(lambda _: "rest", model)
        start = jax.tree.map(lambda _: "start", model.initial)
        return eqx.tree_at(lambda model: model.initial, rest, start)

    return optax.partition(
        {"start": adam(10 * learning_rate), "rest": adam(learning_rate)}, labels
    )


class State(NamedTuple):
    """Of the training."""

    models: Pair
    opt_states: Pair
    average: NeuralDE  # of the generator, over the second half of the steps


def initial_state(models: Pair, optimisers: Pair) -> State:
    inits = (optimiser.init for optimiser in optimisers)
    arrays = (eqx.filter(model, eqx.is_array) for model in models)
    opt_states = Pair(*(init(x) for init, x in zip(inits, arrays, strict=True)))
    return State(models, opt_states, models.generator)


def averaged(average: NeuralDE, model: NeuralDE, num: Int[Array, ""]) -> NeuralDE:
    """The average of `num` models, of which `average` is, and of another one. Of none,
    it is the other one.
    """
    weight = 1 / jnp.maximum(1, num + 1).astype(float32)
    mean = lambda x, old: old + weight * (x - old) if eqx.is_array(x) else x
    return jax.tree.map(mean, model, average)


def train_step(
    state: State,
    series: Float[Array, "batch times dim"],
    i: Int[Array, ""],
    key: PRNGKeyArray,
    optimisers: Pair,
    method: Method,
    penalty: float | None,
    averaged_from: int,
) -> tuple[State, Float[Array, ""]]:
    """One of both generator and critic, at once. The critic's gradient is penalised, or
    its weights are clipped.
    """
    path_key, mix_key = jr.split(key)
    difference = lambda models: score_difference(models, series, path_key, method)
    (loss, generated), grads = eqx.filter_value_and_grad(difference, has_aux=True)(
        state.models
    )
    grads = grads._replace(critic=jax.tree.map(jnp.negative, grads.critic))
    if penalty is not None:
        share = jr.uniform(mix_key, (len(series), 1, 1), float32)
        between = share * series + (1 - share) * generated
        more = penalty_gradient(state.models.critic, between, penalty, method)
        grads = grads._replace(critic=eqx.apply_updates(grads.critic, more))
    new = [
        update(*each)
        for each in zip(optimisers, state.models, state.opt_states, grads, strict=True)
    ]
    models, opt_states = (Pair(*each) for each in zip(*new, strict=True))
    if penalty is None:
        models = models._replace(critic=clip_lipschitz(models.critic))
    average = averaged(state.average, models.generator, i - averaged_from)
    return State(models, opt_states, average), loss


def main(
    *,
    data: Literal["glucose", "ou"] = "glucose",
    solver: Literal["reversible-heun", "midpoint"] = "reversible-heun",
    penalty: float | None = None,
    steps: int = 6000,
    batch: int = 128,
    learning_rates: tuple[float, float] = (1e-4, 3e-4),
    held_out: Literal["validation", "test"] = "test",
    metric_steps: int = 500,
    samples: int = 2048,
    seed: int = 0,
    out: Path = Path("sde_gan"),
    resume: Path | None = None,
) -> dict[str, float]:
    """Train a generator of series, and compare what it generates with held-out ones.

    Args:
        data: what to learn.
        solver: of the generator and of the critic.
        penalty: the weight of a penalty of the critic's gradient (WGAN-GP, where it
            is 10), instead of clipping its weights.
        steps: of the optimiser; the generator is the average over their second half.
        batch: series of the data, and as many generated ones, in each step.
        learning_rates: of the generator and of the critic, at first.
        held_out: what to compare with. Choose settings by `validation`.
        metric_steps: of training, for the classifier and the predictor.
        samples: series of each kind, at most, for the metrics.
        out: where the figure and the checkpoints go.
        resume: a checkpoint of a run with the same settings, to continue.
    """
    settings = dict(locals())
    for name in ("out", "resume", "held_out", "metric_steps", "samples"):
        del settings[name]
    out.mkdir(parents=True, exist_ok=True)
    keys = jr.split(jr.key(seed), 5)
    dataset = load(data, held_out)
    series = jnp.asarray(dataset.train)
    method = Method(ReversibleHeun() if solver == "reversible-heun" else Midpoint())
    optimisers = Pair(*(make_optimiser(rate, steps) for rate in learning_rates))

    @eqx.filter_jit
    def start():
        dim = series.shape[-1]
        models = Pair(make_generator(dim, keys[0]), make_critic(dim, keys[1]))
        if penalty is None:
            models = models._replace(critic=clip_lipschitz(models.critic))
        return initial_state(models, optimisers)

    @eqx.filter_jit
    def step(state, series, i):
        data_key, step_key = jr.split(jr.fold_in(keys[2], i))
        real = series[jr.choice(data_key, len(series), (batch,))]
        args = (optimisers, method, penalty, steps // 2)
        return train_step(state, real, i, step_key, *args)

    untrained = start()
    one_step = lambda state, i: step(state, series, jnp.asarray(i))
    state, losses = train(one_step, untrained, steps, settings, out, resume)

    rng = np.random.default_rng((seed, 2))
    samples = min(samples, *map(len, (dataset.train, dataset.held_out)))
    choose = lambda x: x[rng.permutation(len(x))[:samples]]
    others, real = choose(dataset.held_out), choose(dataset.train)
    sample = eqx.filter_jit(lambda model, key: generate(model, samples, key, method))
    pair = lambda model, key: [np.asarray(sample(model, k)) for k in jr.split(key)]
    normal = [gaussian_increments(dataset.train, samples, 2 * seed + i) for i in (0, 1)]
    kinds = {
        "generator": pair(state.average, keys[3]),
        "untrained": pair(untrained.average, keys[4]),
        "normal increments": normal,
    }
    scores = {}
    for kind, (first, second) in kinds.items():
        scores[f"real or not: {kind}"] = classification_accuracy(
            (real, first), (others, second), metric_steps, seed
        )
    kinds["series for training"] = [real]
    for kind, (first, *_) in kinds.items():
        loss = prediction_loss(first, others, metric_steps, seed)
        scores[f"prediction: {kind}"] = loss
    for kind, (first, *_) in kinds.items():
        scores[f"MMD of signatures: {kind}"] = signature_mmd(first, others)
    for kind, (first, *_) in kinds.items():
        scores[f"MMD^2 of marginals: {kind}"] = marginal_mmd(first, others)
    scores |= loss_scores(losses)
    scores = report(scores)
    generated = kinds["generator"][0]
    plot(out / f"{data}.png", dataset.label, others, generated, normal[0])
    print(f"Figure and checkpoints are in {out}/.")
    return scores


def plot(path: Path, label: str, held_out, generated, normal):
    """Series, their quantiles, and their distributions at five times."""
    blue, orange, grey = "#0072B2", "#D55E00", "0.45"
    t = np.arange(TIMES)
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
    lags = np.unique(np.round(np.geomspace(1, TIMES - 1, 20)).astype(int))
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
    fig.savefig(path, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    tyro.cli(main)
