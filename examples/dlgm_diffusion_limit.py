"""Deep latent Gaussian models, and the neural SDE that they become with more layers.

Tzen and Raginsky, "Neural stochastic differential equations: deep latent Gaussian
models in the diffusion limit" (2019), https://arxiv.org/abs/1905.09883. The latent
variable of such a model goes through `K` layers, each of which adds a small step and
Gaussian noise:

    x[k + 1] = x[k] + b(x[k], k / K) / K + s z[k] / sqrt(K),    y = x[K] + 0.4 z[K].

As `K` grows, this becomes the SDE `dx = b(x, t) dt + s dW`. The variational posterior
is mean-field: given `y`, the noise has a drift `u(y, t)` that knows nothing of `x`, and
the divergence from the prior is that of Girsanov's theorem. Chains of growing `K` and
the SDE are trained on the same data; and gradients of the SDE's free energy are made in
the paper's two ways, and in ours.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from common import last_checkpoint, loss_scores, report, train, update
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
from diffrax import (
    AbstractAdjoint,
    AbstractSolver,
    AbstractTerm,
    ControlTerm,
    Euler,
    MultiTerm,
    ODETerm,
    RecursiveCheckpointAdjoint,
    diffeqsolve,
)
from jaxtyping import Array, Float, PRNGKeyArray

from diffrax_sde_adjoint import (
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    forward_sensitivity,
    path_kl_of_shift,
)


DIM, NOISE, FINE = 2, 0.4, 64
float32 = jnp.float32


def clusters(num: int, key: PRNGKeyArray) -> Float[Array, "num 2"]:
    """Four of them, at the corners of a square."""
    index_key, noise_key = jr.split(key)
    corner = 1.5 * jr.rademacher(index_key, (num, DIM), float32)
    return corner + NOISE * jr.normal(noise_key, corner.shape, float32)


class Model(eqx.Module):
    """The drift of the prior, the posterior's of the noise, and the scale of noise."""

    b: eqx.nn.MLP
    u: eqx.nn.MLP
    log_scale: Float[Array, " 2"]

    def __init__(self, width: int, key: PRNGKeyArray):
        b_key, u_key = jr.split(key)
        mlp = lambda key: eqx.nn.MLP(
            DIM + 1, DIM, width, 2, jnp.tanh, dtype=float32, key=key
        )
        self.b, self.u = mlp(b_key), mlp(u_key)
        self.log_scale = jnp.zeros(DIM, float32)

    def drift(self, t, x: Float[Array, "batch 2"]) -> Float[Array, "batch 2"]:
        return 3 * jax.vmap(self.b)(_with_time(t, x))

    def shift(self, t, y: Float[Array, "batch 2"]) -> Float[Array, "batch 2"]:
        return 3 * jax.vmap(self.u)(_with_time(t, y))


def _with_time(t, x):
    return jnp.concatenate([x, jnp.full((len(x), 1), t, x.dtype)], axis=-1)


def minus_log_likelihood(x: Float[Array, "batch 2"], y: Float[Array, "batch 2"]):
    error = jnp.sum((y - x) ** 2, axis=-1) / NOISE**2
    return 0.5 * error + DIM * math.log(NOISE * math.sqrt(2 * math.pi))


def mean_free_energy(
    x: Float[Array, "batch 2"],
    divergence: Float[Array, " batch"],
    y: Float[Array, "batch 2"],
    rows: Rows,
) -> Float[Array, ""]:
    total = jnp.sum(divergence + minus_log_likelihood(x, y))
    return total / batch_size(y, rows)


def chain_free_energy(
    model: Model,
    y: Float[Array, "batch 2"],
    layers: int,
    key: PRNGKeyArray,
    rows: Rows,
) -> Float[Array, ""]:
    """Of the deep latent Gaussian model."""
    scale = jnp.exp(model.log_scale)

    def layer(carry, k):
        x, divergence = carry
        t, h = k.astype(float32) / layers, 1 / layers
        u = model.shift(t, y)
        z = normal(jr.fold_in(key, k), x.shape, rows)
        x = x + h * (model.drift(t, x) + scale * u) + scale * z * h**0.5
        return (x, divergence + 0.5 * h * jnp.sum(u**2, axis=-1)), None

    start = jnp.zeros_like(y), jnp.zeros(len(y), float32)
    (x, divergence), _ = jax.lax.scan(layer, start, jnp.arange(layers))
    return mean_free_energy(x, divergence, y, rows)


def make_terms(
    y: Float[Array, "batch 2"], key: PRNGKeyArray, finest: int, rows: Rows = None
):
    """The posterior, and its divergence from the prior; `args` are the model. The path
    depends on the key, and on how many steps the finest solve makes.
    """
    struct = jax.ShapeDtypeStruct(y.shape, y.dtype)
    t0, t1, dt = jnp.array([0, 1, 1 / finest], float32)
    path = BrownianInterval(t0, t1, struct, key, dt=dt, rows=rows)
    prior = MultiTerm(
        ODETerm(lambda t, x, model: model.drift(t, x)),
        ControlTerm(
            lambda t, x, model: lx.DiagonalLinearOperator(
                jnp.broadcast_to(jnp.exp(model.log_scale), x.shape)
            ),
            path,
        ),
    )
    return path_kl_of_shift(prior, lambda t, x, model: model.shift(t, y))


def sde_free_energy(
    model: Model,
    y: Float[Array, "batch 2"],
    dt0: float | Float[Array, ""],
    finest: int,
    key: PRNGKeyArray,
    solver: AbstractSolver,
    adjoint: AbstractAdjoint,
    rows: Rows = None,
) -> Float[Array, ""]:
    """Of the neural SDE. Noise is additive, so Itô and Stratonovich are the same."""
    t0, t1 = jnp.array([0, 1], float32)
    start = jnp.zeros_like(y), jnp.zeros(len(y), float32)
    sol = diffeqsolve(
        make_terms(y, key, finest, rows),
        solver,
        t0,
        t1,
        jnp.asarray(dt0, float32),
        start,
        model,
        adjoint=adjoint,
        max_steps=finest,
    )
    x, divergence = jax.tree.map(lambda a: a[-1], sol.ys)
    return mean_free_energy(x, divergence, y, rows)


def free_energy(model, y, layers: int | None, key, rows: Rows = None):
    """Of a chain, or if there is no number of layers, of the SDE."""
    if layers is None:
        return sde_free_energy(
            model, y, 1 / FINE, FINE, key, ReversibleHeun(), StochasticAdjoint(), rows
        )
    return chain_free_energy(model, y, layers, key, rows)


def adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(3e-3, steps))


def train_step(state, data, i, rows: Rows, layers: int | None, steps: int, batch: int):
    """Decreases the free energy of some of the data."""
    points, key = data
    data_key, noise_key = jr.split(jr.fold_in(key, i))
    y = take(jr.choice(data_key, points, (batch,)), rows)
    model, opt_state = state
    of_model = value_and_grad(free_energy, rows)
    loss, grads = of_model(model, y, layers, noise_key, rows)
    return update(adam(steps), model, opt_state, grads), loss


def train_model(
    data: Float[Array, "num 2"],
    layers: int | None,
    settings: dict[str, Any],
    devices: int,
    out: Path,
    resume: bool,
    key: PRNGKeyArray,
) -> tuple[Model, np.ndarray]:
    model_key, train_key = jr.split(key)
    model = eqx.filter_jit(Model)(settings["width"], model_key)
    steps, batch = settings["steps"], settings["batch"]
    state = (model, adam(steps).init(eqx.filter(model, eqx.is_array)))
    step = make_step(train_step, (data, train_key), batch, devices)
    one_step = lambda state, i: step(state, i, layers, steps, batch)
    name = "sde" if layers is None else f"{layers}_layers"
    last = last_checkpoint(out, name) if resume else None
    state, losses = train(one_step, state, steps, settings, out, last, name)
    return state[0], losses


@eqx.filter_jit
def evaluate(model, data, layers, key):
    """The free energy of held-out data, of 64 samples each, and its standard error."""
    one = lambda key: free_energy(model, data, layers, key)
    values = jax.lax.map(one, jr.split(key, 64))
    return jnp.mean(values), jnp.std(values) / 8


@eqx.filter_jit
def sample(model: Model, layers: int, num: int, key: PRNGKeyArray):
    """Of the prior, with observation noise."""
    scale = jnp.exp(model.log_scale)

    def layer(x, k):
        z = jr.normal(jr.fold_in(key, k), x.shape, float32)
        x = (
            x
            + model.drift(k.astype(float32) / layers, x) / layers
            + scale * z * layers**-0.5
        )
        return x, None

    x, _ = jax.lax.scan(layer, jnp.zeros((num, DIM), float32), jnp.arange(layers))
    return x + NOISE * jr.normal(jr.fold_in(key, layers), x.shape, float32)


# The three ways to differentiate the free energy of the SDE. Each takes all parameters
# as one vector.


def by_backpropagation(parameters, unravel, y, dt0, finest, key):
    loss = lambda x: sde_free_energy(
        unravel(x), y, dt0, finest, key, Euler(), RecursiveCheckpointAdjoint()
    )
    return jax.grad(loss)(parameters)


class OfVector(AbstractTerm):
    """The terms of a model, as those of the vector of its parameters."""

    terms: AbstractTerm
    unravel: Callable

    def vf(self, t, y, args):
        return self.terms.vf(t, y, self.unravel(args))

    def contr(self, t0, t1, **kwargs):
        return self.terms.contr(t0, t1, **kwargs)

    def prod(self, vf, control):
        return self.terms.prod(vf, control)


def by_stochastic_flow(parameters, unravel, y, dt0, finest, key):
    """The derivative in each parameter is solved forwards, beside the state."""
    terms = OfVector(make_terms(y, key, finest), unravel)
    t0, t1 = jnp.array([0, 1], float32)
    start = jnp.zeros_like(y), jnp.zeros(len(y), float32)
    num = len(parameters)
    dot_start = jax.tree.map(lambda x: jnp.zeros((num, *x.shape), x.dtype), start)
    sol = diffeqsolve(
        forward_sensitivity(terms),
        Euler(),
        t0,
        t1,
        jnp.asarray(dt0, float32),
        (start, dot_start),
        (parameters, jnp.eye(num, dtype=float32)),
        max_steps=finest,
    )
    (x, _), (dot_x, dot_divergence) = jax.tree.map(lambda a: a[-1], sol.ys)
    grad_x = jax.grad(lambda x: jnp.mean(minus_log_likelihood(x, y)))(x)
    return jnp.einsum("bi,pbi->p", grad_x, dot_x) + jnp.mean(dot_divergence, axis=1)


def by_stochastic_adjoint(parameters, unravel, y, dt0, finest, key):
    loss = lambda x: sde_free_energy(
        unravel(x), y, dt0, finest, key, ReversibleHeun(), StochasticAdjoint()
    )
    return jax.grad(loss)(parameters)


ESTIMATORS = {
    "backpropagation through Euler": by_backpropagation,
    "stochastic flow, forwards": by_stochastic_flow,
    "StochasticAdjoint, reversible Heun": by_stochastic_adjoint,
}


def _vector(width: int):
    """The parameters of a model with such networks, and what makes it of them."""
    model = eqx.filter_jit(Model)(width, jr.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    parameters, unravel = jfu.ravel_pytree(arrays)
    return parameters, lambda x: eqx.combine(unravel(x), static)


def distances(
    y: Float[Array, "batch 2"], width: int, all_steps: tuple[int, ...]
) -> dict[str, list[float]]:
    """How far gradients are from that of the finest solve, all along one path."""
    parameters, unravel = _vector(width)
    gradients = {}
    for name, estimator in ESTIMATORS.items():
        gradient = jax.jit(
            lambda parameters, dt0, f=estimator: f(
                parameters, unravel, y, dt0, all_steps[-1], jr.key(1)
            )
        )
        gradients[name] = [
            gradient(parameters, jnp.array(1 / n, float32)) for n in all_steps
        ]
    best = gradients["StochasticAdjoint, reversible Heun"][-1]
    size = jnp.linalg.norm(best)
    return {
        name: [float(jnp.linalg.norm(x - best) / size) for x in gradients[name]]
        for name in ESTIMATORS
    }


class Cost(NamedTuple):
    """Of a gradient: milliseconds, and kB of temporary memory."""

    estimator: str
    steps: int
    parameters: int
    ms: float
    kilobytes: float


def costs(y: Float[Array, "batch 2"], width: int, steps: int) -> list[Cost]:
    parameters, unravel = _vector(width)
    out = []
    for name, estimator in ESTIMATORS.items():
        gradient = jax.jit(
            lambda parameters, key, f=estimator: f(
                parameters, unravel, y, 1 / steps, steps, key
            )
        )
        compiled = gradient.lower(parameters, jr.key(1)).compile()
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(compiled(parameters, jr.key(1)))
            seconds.append(time.perf_counter() - start)
        kilobytes = compiled.memory_analysis().temp_size_in_bytes / 1e3
        out.append(Cost(name, steps, len(parameters), 1e3 * min(seconds), kilobytes))
    return out


def main(
    *,
    steps: int = 4000,
    batch: int = 256,
    width: int = 32,
    layers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    all_steps: tuple[int, ...] = (4, 16, 64, 256, 1024),
    measured: tuple[tuple[int, int], ...] = (
        *((4, n) for n in (16, 64, 256, 1024)),
        *((n, 64) for n in (2, 8, 16, 24)),
    ),
    devices: int = 1,
    seed: int = 0,
    out: Path = Path("dlgm_diffusion_limit"),
    resume: bool = False,
) -> dict[str, float]:
    """Train chains and the SDE, compare estimators of gradients, and draw both.

    Args:
        steps: of the optimiser, for each chain and for the SDE.
        batch: points of the data in each.
        width: of the networks.
        layers: of the chains.
        all_steps: the numbers of steps that gradients are compared for.
        measured: widths of networks and numbers of steps, to measure gradients for. In
            the figure are those with 64 steps.
        devices: that share each batch.
        seed: of the data, weights, batches and paths.
        out: where the figure and the checkpoints go, in the place of earlier ones.
        resume: continue from the checkpoints in `out`, of a run with the same settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    keys = jr.split(jr.key(seed), 5)
    data_key, held_out_key, train_key, evaluate_key, sample_key = keys
    data, held_out = clusters(4096, data_key), clusters(1024, held_out_key)
    settings = dict(steps=steps, batch=batch, width=width, seed=seed)
    scores, models = {}, {}
    for num in (*layers, None):
        name = "SDE" if num is None else f"{num} layers"
        model, losses = train_model(
            data, num, settings, devices, out, resume, train_key
        )
        scores |= loss_scores(losses, f": {name}")
        value, error = evaluate(model, held_out, num, evaluate_key)
        scores[f"free energy: {name}"] = value
        scores[f"standard error: {name}"] = error
        models[num] = model

    for num in layers:
        value, _ = evaluate(models[None], held_out, num, evaluate_key)
        scores[f"free energy: SDE as {num} layers"] = value

    y = held_out[:32]
    for name, values in distances(y, 4, all_steps).items():
        for n, value in zip(all_steps, values, strict=True):
            scores[f"distance: {name}: {n} steps"] = value
    rows = [row for size in measured for row in costs(y, *size)]

    scores = report(scores)
    say(f"{'':36s}{'steps':>6s}{'parameters':>11s}{'ms':>9s}{'kB':>8s}")
    for name, n, parameters, ms, kilobytes in sorted(rows):
        say(f"{name:36s}{n:6d}{parameters:11d}{ms:9.1f}{kilobytes:8.0f}")

    samples = sample(models[None], FINE, 4096, sample_key)
    path = out / "dlgm_diffusion_limit.png"
    plot(path, data, samples, layers, all_steps, scores, rows)
    say(f"Figure and checkpoints are in {out}/.")
    return scores


def plot(path: Path, data, samples, layers, all_steps, scores, rows):
    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    fig, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    ax = axes[0, 0]
    ax.plot(*np.asarray(data[:2000]).T, ".", ms=2, color="0.6", label="data")
    ax.plot(*np.asarray(samples[:2000]).T, ".", ms=2, color=blue, label="SDE")
    ax.set(title="Data, and what the model generates", aspect="equal", ylim=(-3.2, 4.2))
    ax.legend(markerscale=5, frameon=False, loc="upper center", ncols=2)

    ax = axes[0, 1]
    value = np.array([scores[f"free energy: {k} layers"] for k in layers])
    error = np.array([scores[f"standard error: {k} layers"] for k in layers])
    ax.errorbar(layers, value, 2 * error, color=orange, marker="o", label="chain")
    middle, spread = scores["free energy: SDE"], 2 * scores["standard error: SDE"]
    ax.axhspan(middle - spread, middle + spread, color=blue, alpha=0.3, lw=0)
    ax.axhline(middle, color=blue, label="SDE")
    ax.set(ylim=(min(value.min(), middle) - 0.1, max(value.max(), middle) + 0.1))
    as_chain = [scores[f"free energy: SDE as {k} layers"] for k in layers]
    ax.plot(layers, as_chain, "--x", color=blue, label="chain, networks of the SDE")
    ax.set(title="Free energy of held-out data", xlabel="layers", ylabel="nats")
    ax.set_xscale("log", base=2)
    ax.legend(frameon=False)

    for name, colour, style in zip(
        ESTIMATORS, (orange, green, blue), ("o-", "x--", "s-"), strict=True
    ):
        values = np.array([scores[f"distance: {name}: {n} steps"] for n in all_steps])
        seen = values > 0
        axes[1, 0].loglog(
            np.array(all_steps)[seen], values[seen], style, color=colour, label=name
        )
        times = sorted(
            (row.parameters, row.ms)
            for row in rows
            if row.estimator == name and row.steps == FINE
        )
        parameters, ms = np.array(times).reshape(-1, 2).T
        axes[1, 1].loglog(parameters, ms, style, color=colour)
    axes[1, 0].set(title="Distance of gradients from the finest solve's")
    axes[1, 0].set(xlabel="steps", ylabel="relative")
    axes[1, 0].legend(frameon=False, fontsize=9)
    title = f"Time of a gradient, {FINE} steps"
    axes[1, 1].set(title=title, xlabel="parameters", ylabel="ms")
    save_figure(fig, path)


if __name__ == "__main__":
    tyro.cli(main)
