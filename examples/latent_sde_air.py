"""A latent SDE of the air: days of PM2.5 and ozone at twelve stations in Beijing.

    python examples/latent_sde_air.py --data FOLDER
    python examples/latent_sde_air.py --data FOLDER --method midpoint
    python examples/latent_sde_air.py --data FOLDER --missing 0.3

As in Kidger, Foster, Li and Lyons, "Efficient and accurate gradients for neural SDEs"
(2021), https://arxiv.org/abs/2105.13493, a latent SDE is trained on days of 24 hours,
each with its station as a label, and asked for new days of each station. `--method`
compares reversible Heun with the midpoint method and the backward SDE, as they do, and
with Heun, whose steps are made again.

`FOLDER` has the twelve files `PRSA_Data_*.csv` of "Beijing Multi-Site Air Quality", of
the UCI Machine Learning Repository (https://doi.org/10.24432/C5RK5G, CC BY 4.0): hourly
readings from March 2013 to February 2017. A run takes four minutes on one core, and
writes the figure of `docs/examples/latent_sde_air.md`; a classifier is right about 95%
of generated and real days.
"""

import csv
import hashlib
import time
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from common import loss_scores, normal_kl, plot_quantiles, report, train, update
from devices import Rows, make_step, normal, save_figure, say, take, value_and_grad
from diffrax import (
    AbstractAdjoint,
    AbstractSolver,
    ControlTerm,
    Heun,
    LinearInterpolation,
    Midpoint,
    MultiTerm,
    ODETerm,
    SaveAt,
    diffeqsolve,
)
from jaxtyping import Array, Float, Int, PRNGKeyArray
from series import Series
from series_metrics import (
    classification_accuracy,
    gaussian_increments,
    label_accuracy,
    prediction_loss,
    signature_mmd,
)

from diffrax_sde_adjoint import (
    BackwardSDEAdjoint,
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    lipswish,
    path_kl_of_shift,
)


SHA256 = dict(
    Aotizhongxin="a94fbcfc71708b6ffdc033360163d91efb7f675e496f6b5860929aa96b96351b",
    Changping="a2e21402a6d95fb7043f87959e6e3dcbecb957aac356a6f8028a85b047c772e7",
    Dingling="3d8dff81f18a80d9f455876a785642bffe1e9b9924ec1e6b7ce8cca790432eeb",
    Dongsi="9c0020214425e5ee2a64d42f97a1f632e1d8f6b53ad50edd85a686cc7999f27e",
    Guanyuan="59390fee3b032597b387491f5230e7edb90a8558e30217ebd6d9befbe669fbf9",
    Gucheng="10ae48801ea55869fee56a48b885fb1127859c130551888d71673f34216ba951",
    Huairou="812dcbe848b3ba2c2d25731064797bff803c46eb0c602156a1fa044df136dc26",
    Nongzhanguan="572cf87b65ef543cd55d3a711b28474def224a46b0ec3fc8add8aaf13b67a487",
    Shunyi="520b59e4ead3b0cfe7f1ed673e30275de8441e999db6f413d5172d2277b8c15a",
    Tiantan="0743e34799cf1ee36195b73321b91baa5625276532e7263c588f68cdef3b4daa",
    Wanliu="0b1a6d754a07f0def2f55434ddfa3870dcd0063b7f766a6f66b6c11bb05a377a",
    Wanshouxigong="ab1d6a356d6997a45f6d657ad47de1e05a4a08d4a7015b38a329a90665ab74d0",
)
STATIONS, CHANNELS, HOURS = tuple(SHA256), ("PM2.5", "O3"), 24
DIM, WIDTH, CONTEXT = 6, 64, 16
STEPS_PER_HOUR = 4
METHODS: dict[str, tuple[AbstractSolver, AbstractAdjoint]] = {
    "reversible-heun": (ReversibleHeun(), StochasticAdjoint()),
    "midpoint": (Midpoint(), BackwardSDEAdjoint()),
    "heun": (Heun(), StochasticAdjoint()),
}
Method: TypeAlias = Literal["reversible-heun", "midpoint", "heun"]
float32 = jnp.float32


class Days(NamedTuple):
    """Days without gaps, of logarithms, and the number of their stations."""

    values: Float[np.ndarray, "days 24 2"]
    station: Int[np.ndarray, " days"]


def split(
    values: Float[np.ndarray, "hours channels"],
) -> dict[str, Float[np.ndarray, "days 24 channels"]]:
    """Days without gaps, of blocks of 28 days: of ten blocks, seven are for training,
    one is for validation, and two are for the test. So each part has all seasons. The
    first day of a block is left out.
    """
    days = values.reshape(-1, HOURS, values.shape[-1])
    block, day = np.divmod(np.arange(len(days)), 28)
    is_used = np.isfinite(days).all(axis=(1, 2)) & (day > 0)
    of_ten = dict(train=(0, 1, 3, 5, 6, 8, 9), validation=(4,), test=(2, 7))
    return {
        part: days[is_used & np.isin(block % 10, chosen)]
        for part, chosen in of_ten.items()
    }


def load(folder: Path) -> dict[str, Days]:
    """`log(10 + x)` of readings `x` in micrograms a cubic metre, scaled by the mean and
    the standard deviation of days for training.

    Nearly all readings are whole numbers. They are spread evenly within what was
    rounded, lest a classifier looks for whole numbers. Without the ten, the smallest of
    them would have the largest changes.
    """
    rng = np.random.default_rng(0)
    number = lambda x: np.nan if x == "NA" else float(x)
    parts = dict(train=[], validation=[], test=[])
    for name, sha256 in SHA256.items():
        path = folder / f"PRSA_Data_{name}_20130301-20170228.csv"
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != sha256:
            raise ValueError(
                f"`data`: {path} is not the file of that name; its SHA-256 is {digest}."
            )
        rows = csv.DictReader(content.decode().splitlines())
        values = np.array([[number(row[x]) for x in CHANNELS] for row in rows])
        values = np.log(10 + values + rng.uniform(-0.5, 0.5, values.shape))
        for part, days in split(values).items():
            parts[part].append(days)
    mean, std = (f(np.concatenate(parts["train"]), (0, 1)) for f in (np.mean, np.std))
    return {
        part: Days(
            ((np.concatenate(days) - mean) / std).astype(np.float32),
            np.repeat(np.arange(len(STATIONS)), [len(x) for x in days]),
        )
        for part, days in parts.items()
    }


def mlp(num_in: int, num_out: int, key: PRNGKeyArray) -> eqx.nn.MLP:
    return eqx.nn.MLP(num_in, num_out, WIDTH, 1, lipswish, dtype=float32, key=key)


def linear(num_in: int, num_out: int, key: PRNGKeyArray) -> eqx.nn.Linear:
    return eqx.nn.Linear(num_in, num_out, dtype=float32, key=key)


class LatentSDE(eqx.Module):
    """The prior dz = f dt + g o dW of a station, the posterior dz = (f + g u) dt +
    g o dW given readings, and what connects both with them.
    """

    f: eqx.nn.MLP
    g: eqx.nn.MLP
    u: eqx.nn.MLP
    initial: eqx.nn.MLP
    encoder: eqx.nn.GRUCell
    to_context: eqx.nn.Linear
    to_initial: eqx.nn.Linear
    readout: eqx.nn.MLP

    def __init__(self, key: PRNGKeyArray):
        keys = jr.split(key, 8)
        readings = 2 * len(CHANNELS)  # and whether they are seen
        stations = len(STATIONS)
        seen = DIM + 2 + stations  # the state, the time of the day and the station
        self.f = mlp(seen, DIM, keys[0])
        self.g = mlp(seen, DIM, keys[1])
        self.u = mlp(seen + CONTEXT + readings, DIM, keys[2])
        self.initial = mlp(stations, 2 * DIM, keys[3])
        self.encoder = eqx.nn.GRUCell(
            readings + stations, WIDTH, dtype=float32, key=keys[4]
        )
        self.to_context = linear(WIDTH, CONTEXT, keys[5])
        self.to_initial = linear(WIDTH, 2 * DIM, keys[6])
        self.readout = mlp(DIM, 2 * len(CHANNELS), keys[7])

    def encode(
        self,
        values: Float[Array, "batch 24 2"],
        is_seen: Float[Array, "batch 24 2"],
        station: Float[Array, "batch 12"],
    ) -> tuple[Float[Array, "25 batch context"], Float[Array, "batch 2*dim"]]:
        """At the hours from 0 to 24 the reading of the next hour, and a summary of all
        from there on; and the posterior of the initial state, as mean and log standard
        deviation.
        """
        readings = jnp.concatenate([values, is_seen], axis=-1)
        readings = jnp.swapaxes(readings, 0, 1)

        def step(hidden, readings):
            inputs = jnp.concatenate([readings, station], axis=-1)
            hidden = jax.vmap(self.encoder)(inputs, hidden)
            return hidden, jax.vmap(self.to_context)(hidden)

        hidden = jnp.zeros((len(values), WIDTH), float32)
        hidden, context = jax.lax.scan(step, hidden, readings, reverse=True)
        context = jnp.concatenate([context, readings], axis=-1)
        context = jnp.concatenate([context, context[-1:]])
        return context, jax.vmap(self.to_initial)(hidden)

    def read(self, z: Float[Array, "steps batch dim"]):
        """Readings, as mean and log standard deviation. They are means over an hour."""
        out = jax.vmap(jax.vmap(self.readout))(z)
        of_steps = (out[1:] + out[:-1]) / 2
        out = of_steps.reshape(HOURS, STEPS_PER_HOUR, *out.shape[1:]).mean(axis=1)
        mean, log_std = jnp.split(jnp.swapaxes(out, 0, 1), 2, axis=-1)
        return mean, log_std - 2.5


# Latent states; or pairs of them and the divergence up to then.
State: TypeAlias = (
    Float[Array, "*steps batch dim"]
    | tuple[Float[Array, "*steps batch dim"], Float[Array, "*steps batch"]]
)


class Args(NamedTuple):
    model: LatentSDE
    station: Float[Array, "batch 12"]
    hour: Float[Array, ""]  # at which a solve begins
    context: LinearInterpolation | None


# The solves of a batch are one, with `(batch, dim)` latent states. Times are in hours.


def inputs_at(t, z, args: Args):
    angle = 2 * jnp.pi / HOURS * (args.hour + t)
    clock = jnp.stack([jnp.sin(angle), jnp.cos(angle)]).astype(float32)
    clock = jnp.broadcast_to(clock, (len(z), 2))
    return jnp.concatenate([z, clock, args.station], axis=-1)


def drift(t, z, args: Args):
    return 0.5 * jnp.tanh(jax.vmap(args.model.f)(inputs_at(t, z, args)))


def diffusion(t, z, args: Args):
    """It depends on all coordinates, so that one may be the volatility of another."""
    raw = jax.vmap(args.model.g)(inputs_at(t, z, args))
    return lx.DiagonalLinearOperator(0.02 + 1.5 * jax.nn.sigmoid(raw - 2))


def shift(t, z, args: Args):
    assert args.context is not None
    inputs = [inputs_at(t, z, args), args.context.evaluate(t)]
    return 2 * jax.vmap(args.model.u)(jnp.concatenate(inputs, axis=-1))


def solve(
    model: LatentSDE,
    y0: State,
    station,
    context,
    method: Method,
    hours: int,
    key: PRNGKeyArray,
    rows: Rows = None,
):
    """Latent paths at all steps of a day: of the posterior, with their divergence from
    the prior, from a pair of both; or if there is no context, of the prior.

    The posterior contracts towards the readings, which reversible Heun does not bear
    for long. So each `hours` are a solve of their own.
    """
    num = HOURS // hours
    ts = jnp.arange(hours + 1, dtype=float32)
    if context is not None:
        context = context[jnp.arange(num)[:, None] * hours + jnp.arange(hours + 1)]
    solver, adjoint = METHODS[method]
    steps = jnp.linspace(0, hours, hours * STEPS_PER_HOUR + 1, dtype=float32)

    def segment(y, inputs):
        hour, context, key = inputs
        z = y if context is None else y[0]
        struct = jax.ShapeDtypeStruct(z.shape, z.dtype)
        dt = 1 / STEPS_PER_HOUR
        path = BrownianInterval(0.0, hours, struct, key, dt=dt, rows=rows)
        terms = MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))
        if context is not None:
            context = LinearInterpolation(ts, context)
            terms = path_kl_of_shift(terms, shift)
        sol = diffeqsolve(
            terms,
            solver,
            0.0,
            hours,
            dt,
            y,
            Args(model, station, hour, context),
            saveat=SaveAt(ts=steps[1:]),
            adjoint=adjoint,
            max_steps=hours * STEPS_PER_HOUR,
        )
        return jax.tree.map(lambda x: x[-1], sol.ys), sol.ys

    starts = jnp.arange(num, dtype=float32) * hours
    _, ys = jax.lax.scan(segment, y0, (starts, context, jr.split(key, num)))
    with_start = lambda x0, x: jnp.concatenate([x0[None], x.reshape(-1, *x0.shape)])
    return jax.tree.map(with_start, y0, ys)


def sample_normal(
    parameters: Float[Array, "batch 2*dim"], key: PRNGKeyArray, rows: Rows = None
):
    mean, log_std = jnp.split(parameters, 2, axis=-1)
    return mean + jnp.exp(log_std) * normal(key, mean.shape, rows)


def posterior(
    model: LatentSDE, values, is_seen, station, method, hours, key, rows: Rows = None
):
    """Latent paths given readings, and their divergence from the prior."""
    z_key, path_key = jr.split(key)
    context, initial = model.encode(values, is_seen, station)
    prior = jax.vmap(model.initial)(station)
    kl0 = normal_kl(*jnp.split(initial, 2, axis=-1), *jnp.split(prior, 2, axis=-1))
    y0 = (sample_normal(initial, z_key, rows), kl0)
    zs, kls = solve(model, y0, station, context, method, hours, path_key, rows)
    return zs, kls[-1]


def loss_fn(
    model, values, is_seen, station, kl_weight, method, hours, key, rows: Rows = None
) -> Float[Array, ""]:
    """Minus the evidence lower bound, in nats."""
    zs, kl = posterior(model, values, is_seen, station, method, hours, key, rows)
    mean, log_std = model.read(zs)
    error = (values - mean) * jnp.exp(-log_std)
    log_prob = -0.5 * error**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return kl_weight * jnp.sum(kl) - jnp.sum(log_prob * is_seen)


def one_hot(station: Int[Array, " batch"]) -> Float[Array, "batch 12"]:
    return jax.nn.one_hot(station, len(STATIONS), dtype=float32)


@eqx.filter_jit
def generate(model: LatentSDE, station: Int[Array, " batch"], method, hours: int, key):
    """Days of stations, from the prior."""
    z_key, path_key, noise_key = jr.split(key, 3)
    station = one_hot(station)
    z0 = sample_normal(jax.vmap(model.initial)(station), z_key)
    mean, log_std = model.read(solve(model, z0, station, None, method, hours, path_key))
    return mean + jnp.exp(log_std) * jr.normal(noise_key, mean.shape, float32)


def adam(steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps, 3e-5)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def train_step(
    state, data, i, rows: Rows, steps: int, batch: int, method: Method, hours: int
):
    """Increases the evidence lower bound of some of the days, in nats a reading."""
    days, is_seen, station, key = data
    index_key, path_key = jr.split(jr.fold_in(key, i))
    index = jr.choice(index_key, len(days), (batch,))
    num_readings = jnp.sum(is_seen[index])
    index = take(index, rows)
    some = days[index], is_seen[index], one_hot(station[index])
    kl_weight = jnp.minimum(1.0, (i + 1).astype(float32) / (0.1 * steps))

    def loss(model):
        total = loss_fn(model, *some, kl_weight, method, hours, path_key, rows)
        return total / num_readings

    model, opt_state = state
    value, grads = value_and_grad(loss, rows)(model)
    return update(adam(steps), model, opt_state, grads), value


@eqx.filter_jit
def reconstruct(
    model, values, is_seen, station, method: Method, hours: int, key
) -> Float[Array, "batch 24 2"]:
    """The mean of days given what is seen of them, by 20 paths of the posterior."""

    def one(key):
        zs, _ = posterior(model, values, is_seen, one_hot(station), method, hours, key)
        return model.read(zs)[0]

    return jnp.mean(jax.lax.map(one, jr.split(key, 20)), axis=0)


def hide(num: int, share: float, seed: tuple[int, int]):
    """Zero at hours that are not seen, of all channels, and one at others, of which
    each day has one at least.
    """
    draws = np.random.default_rng(seed).uniform(size=(num, HOURS, 1))
    is_seen = (draws >= share) | (draws == draws.max(axis=1, keepdims=True))
    return np.repeat(is_seen, len(CHANNELS), axis=2).astype(np.float32)


def interpolate(values: Series, is_seen: Series) -> Series:
    """Linear in time between readings that are seen, and constant around them."""
    hour = np.arange(HOURS)
    one = lambda x, seen: np.interp(hour, hour[seen], x[seen])
    pairs = zip(values, is_seen > 0, strict=True)
    days = [np.stack([*map(one, x.T, seen.T)], axis=1) for x, seen in pairs]
    return np.stack(days).astype(np.float32)


def compare(
    real: Days,
    other: Days,
    generated: tuple[Series, Series],
    samples: int,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Metrics of generated days, of the stations of `real` and of `other`, which is
    held out, of normal increments, and of days for training.
    """
    rng = np.random.default_rng((seed, 2))
    truth = (real.values, other.values)
    normal = [
        gaussian_increments(real.values, len(x), 2 * seed + i)
        for i, x in enumerate(truth)
    ]
    scores = {}
    for kind, (first, second) in (
        ("generated", generated),
        ("normal increments", normal),
    ):
        scores[f"real or not: {kind}"] = classification_accuracy(
            (truth[0], first), (truth[1], second), steps, seed
        )
    for kind, labelled in (
        ("generated", (generated[0], real.station)),
        ("training", real),
    ):
        scores[f"label: {kind}"] = label_accuracy(labelled, other, steps, seed)
    choose = lambda x: x[rng.permutation(len(x))[:samples]]
    for kind, x in (
        ("generated", generated[0]),
        ("normal increments", normal[0]),
        ("training", real.values),
    ):
        scores[f"prediction: {kind}"] = prediction_loss(x, truth[1], steps, seed)
        mmd = signature_mmd(choose(x), choose(truth[1]))
        scores[f"MMD of signatures: {kind}"] = mmd
    return scores


def main(
    *,
    data: Path,
    method: Method = "reversible-heun",
    hours: int = 2,
    missing: float = 0.0,
    steps: int = 4000,
    batch: int = 64,
    held_out: Literal["validation", "test"] = "test",
    metric_steps: int = 1000,
    samples: int = 2000,
    timed: int = 20,
    devices: int = 1,
    seed: int = 0,
    out: Path = Path("latent_sde_air"),
    resume: Path | None = None,
) -> dict[str, float]:
    """Train on days of air, and compare new days of each station with held-out ones.

    Args:
        data: the folder of the twelve files.
        method: the solver. Midpoint is differentiated by the backward SDE, and others
            by `StochasticAdjoint`.
        hours: of each solve, a divisor of 24.
        missing: the share of hours that are not seen of each day for training.
        steps: of the optimiser.
        batch: days in each.
        held_out: what to compare with. Choose settings by `validation`.
        metric_steps: of training, for classifiers and the predictor.
        samples: days of each kind, at most, for signatures.
        timed: steps of each method that are timed at the end.
        devices: that share each batch.
        seed: of the weights, days, paths and hidden hours.
        out: where the figure and the checkpoints go.
        resume: a checkpoint of a run with the same settings, to continue.
    """
    settings = dict(
        method=method,
        hours=hours,
        missing=missing,
        steps=steps,
        batch=batch,
        seed=seed,
    )
    if not 0 <= missing < 1:
        raise ValueError(f"`missing` is a share in [0, 1), but is {missing}.")
    if hours < 1 or HOURS % hours != 0:
        raise ValueError(f"`hours` is a divisor of 24, but is {hours}.")
    out.mkdir(parents=True, exist_ok=True)
    keys = jr.split(jr.key(seed), 4)
    parts = load(data)
    real, other = parts["train"], parts[held_out]
    is_seen = hide(len(real.values), missing, (seed, 3))
    values = interpolate(real.values, is_seen)
    seen_days = (*map(jnp.asarray, (values, is_seen, real.station)), keys[1])
    model = eqx.filter_jit(LatentSDE)(keys[0])
    state = (model, adam(steps).init(eqx.filter(model, eqx.is_array)))
    step = make_step(train_step, seen_days, batch, devices)
    one_step = lambda state, i, method=method: step(
        state, i, steps, batch, method, hours
    )
    state, losses = train(one_step, state, steps, settings, out, resume)
    model, scores = state[0], loss_scores(losses)
    station = jnp.asarray(np.concatenate([real.station, other.station]))
    generated = np.asarray(generate(model, station, method, hours, keys[2]))
    first, second = np.split(generated, [len(real.station)])
    scores |= compare(real, other, (first, second), samples, metric_steps, seed)
    if missing > 0:
        mask = hide(len(other.values), missing, (seed, 4))
        linear = interpolate(other.values, mask)
        given = (jnp.asarray(linear), jnp.asarray(mask), jnp.asarray(other.station))
        mean = reconstruct(model, *given, method, hours, keys[3])
        for kind, x in (("posterior", np.asarray(mean)), ("interpolation", linear)):
            error = (x - other.values)[mask == 0]
            scores[f"error of hidden hours: {kind}"] = np.sqrt(np.mean(error**2))
    scores = report(scores)
    plot(out / "latent_sde_air.png", other, second)
    say(f"Figure and checkpoints are in {out}/.")
    if timed > 0:
        scores |= report(times(one_step, state, timed))
    return scores


def times(step, state, num: int) -> dict[str, float]:
    """Of a step of the optimiser by each method, the median."""
    found = {method: [] for method in METHODS}
    for i in range(-1, num):  # The first one compiles.
        for method, seconds in found.items():
            start = time.perf_counter()
            jax.block_until_ready(step(state, i + 1, method))
            if i >= 0:
                seconds.append(time.perf_counter() - start)
    return {f"ms a step: {name}": 1e3 * np.median(x) for name, x in found.items()}


def plot(path: Path, other: Days, generated: Float[np.ndarray, "days 24 2"]):
    """Days of two stations; and of all, quantiles and how large changes are."""
    blue, grey = "#0072B2", "0.45"
    fig, axes = plt.subplots(3, 4, figsize=(13, 9), layout="constrained")
    hour = np.arange(HOURS)
    labels = [f"log {name}, scaled" for name in CHANNELS]
    rng = np.random.default_rng(0)
    for i, name in enumerate(("Dongsi", "Dingling")):
        of_station = np.flatnonzero(other.station == STATIONS.index(name))
        chosen = rng.permutation(of_station)[:15]
        for k, label in enumerate(labels):
            for j, (kind, x, colour) in enumerate(
                (("held out", other.values, grey), ("generated", generated, blue))
            ):
                ax = axes[k, 2 * i + j]
                ax.plot(hour, x[chosen, :, k].T, color=colour, lw=0.8)
                ax.set(title=f"{name}, {kind}", xlabel="hour", ylim=(-2.3, 3))
                ax.set(ylabel=label if 2 * i + j == 0 else None)
    for k, label in enumerate(labels):
        ax = axes[2, k]
        x, y = other.values[..., k], generated[..., k]
        plot_quantiles(ax, hour, x, y, blue, "generated")
        ax.set(title="Quantiles: 5, 25, 50, 75, 95%", xlabel="hour", ylabel=label)
        ax = axes[2, 2 + k]
        lags = np.arange(1, HOURS)
        for z, colour, kind in ((x, grey, "held out"), (y, blue, "generated")):
            spread = [np.std(z[:, lag:] - z[:, :-lag]) for lag in lags]
            ax.plot(lags, spread, "o-", color=colour, ms=3, label=kind)
        ax.set(title=f"Changes of {CHANNELS[k]}", xlabel="hours between")
        ax.set(ylabel="standard deviation", ylim=(0, None))
        ax.legend(frameon=False, loc="lower right")
    save_figure(fig, path)


if __name__ == "__main__":
    tyro.cli(main)
