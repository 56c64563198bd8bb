"""An SDE-GAN: a neural SDE learns to generate series, from a critic that reads them.

    python examples/sde_gan.py
    python examples/sde_gan.py --data ou

The generator is a neural SDE and the critic a neural CDE, both solved by reversible
Heun and differentiated by `StochasticAdjoint`. Clipping and LipSwish keep the critic
Lipschitz, as in Kidger, Foster, Li and Lyons, "Efficient and accurate gradients for
neural SDEs" (2021), https://arxiv.org/abs/2105.13493. With `--penalty 10` or `--solver
midpoint` it is what that paper compares with.

By default the series are 16 hours of the glucose of one person, every quarter of an
hour; `--data ou` is a time-dependent Ornstein-Uhlenbeck process, and `--data shares` 64
days of the price of a share and of its daily range. `--recipe paper` are the settings
of the authors.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import tyro
from common import train, update
from devices import Rows, batch_size, make_step, sum_of_devices, take
from diffrax import LinearInterpolation, Midpoint, SaveAt
from jaxtyping import Array, Float, Int, PRNGKeyArray
from neural_de import REVERSIBLE, Generator, Method, NeuralDE, with_scales
from series import TIMES, Name, load
from series_metrics import evaluate

from diffrax_sde_adjoint import ReversibleHeun, clip_lipschitz


float32 = jnp.float32


class Recipe(NamedTuple):
    """How both are trained. Weights of the network of the start and of the vector field
    of the generator are larger, at first, by `scales`.
    """

    steps: int = 6000
    batch: int = 128
    optimiser: Literal["adam", "adadelta"] = "adam"
    learning_rates: tuple[float, float] = (1e-4, 3e-4)
    scales: tuple[float, float] = (4.0, 1.0)


# Those of the example of torchsde.
PAPER = Recipe(10_000, 1024, "adadelta", (2e-4, 1e-3), (3.0, 0.5))
RECIPES = {"ours": Recipe(), "paper": PAPER}


# Models


def make_generator(
    channels: int, key: PRNGKeyArray, recipe: Recipe = RECIPES["ours"], **kwargs
) -> Generator:
    return with_scales(Generator(channels, TIMES, key, **kwargs), *recipe.scales)


def make_critic(channels: int, key: PRNGKeyArray) -> NeuralDE:
    return NeuralDE(channels, channels, 1, key, end=TIMES - 1.0)


def criticise(
    critic: NeuralDE,
    series: Float[Array, "num times channels"],
    method: Method = REVERSIBLE,
) -> Float[Array, " num"]:
    """A number for each of the series: what the critic has made of its start, and of
    the whole.
    """
    steps = series.shape[1] - 1
    times = jnp.arange(steps + 1, dtype=float32)
    path = LinearInterpolation(times, jnp.swapaxes(series, 0, 1))
    saveat = SaveAt(t0=True, t1=True)
    saved = critic(series[:, 0], path, steps, 1.0, saveat, method)
    return jnp.sum(saved[..., 0], axis=0)


# Training


class Pair(NamedTuple):
    """Of the models, of their gradients, of optimisers or of their states."""

    generator: Any
    critic: Any


def score_difference(
    models: Pair,
    series: Float[Array, "num times channels"],
    key: PRNGKeyArray,
    method: Method,
    rows: Rows,
) -> tuple[Float[Array, ""], Float[Array, "num times channels"]]:
    """What the critic gives to series of data, on average, more than to generated ones;
    and these.

    The critic is to make it large, and the generator to make it small.
    """
    generated = models.generator(len(series), key, method, rows)
    both = jnp.concatenate([series, generated])
    real, fake = jnp.split(criticise(models.critic, both, method), 2)
    batch = batch_size(series, rows)
    return jnp.sum(real) / batch - jnp.sum(fake) / batch, generated


def penalty_gradient(
    critic: NeuralDE, series, weight: float, method: Method, rows: Rows = None
):
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
    direction = 2 * weight / batch_size(series, rows) * (norm - 1) / norm * slope
    gradient = lambda y: eqx.filter_grad(total)(critic, y)
    return eqx.filter_jvp(gradient, (series,), (direction,))[1]


def make_optimiser(
    recipe: Recipe, learning_rate: float
) -> optax.GradientTransformation:
    """Of Adam, the rates fall to zero, and are larger for the networks of the start,
    which are else learned too slowly. Adadelta also makes weights decay.
    """
    if recipe.optimiser == "adadelta":
        decay = optax.add_decayed_weights(0.01)
        return optax.chain(decay, optax.adadelta(learning_rate, eps=1e-6))

    def adam(rate):
        schedule = optax.cosine_decay_schedule(rate, recipe.steps)
        return optax.adam(schedule, b1=0.0, b2=0.9)

    def labels(model):
        rest = jax.tree.map(lambda _: "rest", model)
        initial = lambda x: (x.sde if isinstance(x, Generator) else x).initial
        start = jax.tree.map(lambda _: "start", initial(model))
        return eqx.tree_at(initial, rest, start)

    return optax.partition(
        {"start": adam(10 * learning_rate), "rest": adam(learning_rate)}, labels
    )


class State(NamedTuple):
    """Of the training."""

    models: Pair
    opt_states: Pair
    average: Generator  # of the generator, over the second half of the steps


def initial_state(models: Pair, optimisers: Pair) -> State:
    inits = (optimiser.init for optimiser in optimisers)
    arrays = (eqx.filter(model, eqx.is_array) for model in models)
    opt_states = Pair(*(init(x) for init, x in zip(inits, arrays, strict=True)))
    return State(models, opt_states, models.generator)


def mean_of_models(
    average: Generator, model: Generator, num: Int[Array, ""]
) -> Generator:
    """The average of `num` models, of which `average` is, and of another one. Of none,
    it is the other one.
    """
    weight = 1 / jnp.maximum(1, num + 1).astype(float32)
    mean = lambda x, old: old + weight * (x - old) if eqx.is_array(x) else x
    return jax.tree.map(mean, model, average)


def train_step(
    state: State,
    series: Float[Array, "batch times channels"],
    i: Int[Array, ""],
    key: PRNGKeyArray,
    optimisers: Pair,
    method: Method,
    penalty: float | None,
    averaged_from: int,
    rows: Rows = None,
) -> tuple[State, Float[Array, ""]]:
    """One of both generator and critic, at once. The critic's gradient is penalised, or
    its weights are clipped.
    """
    path_key, mix_key = jr.split(key)
    difference = lambda models: score_difference(models, series, path_key, method, rows)
    (loss, generated), grads = eqx.filter_value_and_grad(difference, has_aux=True)(
        state.models
    )
    grads = grads._replace(critic=jax.tree.map(jnp.negative, grads.critic))
    if penalty is not None:
        shape = (batch_size(series, rows), 1, 1)
        share = take(jr.uniform(mix_key, shape, float32), rows)
        between = share * series + (1 - share) * generated
        more = penalty_gradient(state.models.critic, between, penalty, method, rows)
        grads = grads._replace(critic=eqx.apply_updates(grads.critic, more))
    loss, grads = sum_of_devices((loss, grads), rows)
    new = [
        update(*each)
        for each in zip(optimisers, state.models, state.opt_states, grads, strict=True)
    ]
    models, opt_states = (Pair(*each) for each in zip(*new, strict=True))
    if penalty is None:
        models = models._replace(critic=clip_lipschitz(models.critic))
    average = mean_of_models(state.average, models.generator, i - averaged_from)
    return State(models, opt_states, average), loss


def main(
    *,
    data: Name = "glucose",
    recipe: Literal["ours", "paper"] = "ours",
    solver: Literal["reversible-heun", "midpoint"] = "reversible-heun",
    penalty: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    learning_rates: tuple[float, float] | None = None,
    averaged: bool = False,
    sees_time: bool = True,
    held_out: Literal["validation", "test"] = "test",
    metric_steps: int = 500,
    samples: int = 2048,
    devices: int = 1,
    seed: int = 0,
    out: Path = Path("sde_gan"),
    resume: Path | None = None,
) -> dict[str, float]:
    """Train a generator of series, and compare what it generates with held-out ones.

    Args:
        data: what to learn.
        recipe: the settings of the training. With those of the paper's authors, 10 000
            steps with 1024 series, a run is longer.
        solver: of the generator and of the critic.
        penalty: the weight of a penalty of the critic's gradient (WGAN-GP, where it
            is 10), instead of clipping its weights.
        steps: of the optimiser, other than the recipe's. The generator is the average
            over their second half.
        batch: series of the data, and as many generated ones, in each step.
        learning_rates: of the generator and of the critic, at first.
        averaged: whether each value is of all that is generated until the next
            one, as readings of glucose are.
        sees_time: whether the generator's networks do.
        held_out: what to compare with. Choose settings by `validation`.
        metric_steps: of training, for the classifier and the predictor.
        samples: series of each kind, at most, for the metrics.
        devices: that share each batch.
        seed: of the weights, batches and paths.
        out: where the figures and the checkpoints go.
        resume: a checkpoint of a run with the same settings, to continue.
    """
    settings = dict(locals())
    for name in ("out", "resume", "held_out", "metric_steps", "samples", "devices"):
        del settings[name]
    out.mkdir(parents=True, exist_ok=True)
    keys = jr.split(jr.key(seed), 5)
    dataset = load(data, held_out)
    series = jnp.asarray(dataset.train)
    method = Method(ReversibleHeun() if solver == "reversible-heun" else Midpoint())
    changes = dict(steps=steps, batch=batch, learning_rates=learning_rates)
    chosen = RECIPES[recipe]._replace(
        **{name: x for name, x in changes.items() if x is not None}
    )
    steps = chosen.steps
    optimisers = Pair(*(make_optimiser(chosen, rate) for rate in chosen.learning_rates))
    kind = dict(is_averaged=averaged, sees_time=sees_time)

    @eqx.filter_jit
    def start():
        channels = series.shape[-1]
        generator = make_generator(channels, keys[0], chosen, **kind)
        models = Pair(generator, make_critic(channels, keys[1]))
        if penalty is None:
            models = models._replace(critic=clip_lipschitz(models.critic))
        return initial_state(models, optimisers)

    def step(state, data, i, rows):
        series, key = data
        data_key, step_key = jr.split(jr.fold_in(key, i))
        index = jr.choice(data_key, len(series), (chosen.batch,))
        real = series[take(index, rows)]
        args = (optimisers, method, penalty, steps // 2)
        return train_step(state, real, i, step_key, *args, rows)

    untrained = start()
    one_step = make_step(step, (series, keys[2]), chosen.batch, devices)
    state, losses = train(one_step, untrained, steps, settings, out, resume)

    return evaluate(
        data,
        dataset,
        lambda model, num, key: model(num, key, method),
        (state.average, keys[3]),
        (untrained.average, keys[4]),
        losses,
        samples=samples,
        steps=metric_steps,
        seed=seed,
        out=out,
    )


if __name__ == "__main__":
    tyro.cli(main)
