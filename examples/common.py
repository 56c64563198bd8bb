"""What the examples share: training with checkpoints, and parts of latent SDEs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from devices import is_first_process, of_first_process, on_one_device, say
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from tqdm import tqdm


Model = TypeVar("Model")
State = TypeVar("State")


def update(
    optimiser: optax.GradientTransformation, model: Model, opt_state: Any, grads: Any
) -> tuple[Model, Any]:
    """One step of `optimiser`."""
    params = eqx.filter(model, eqx.is_inexact_array)
    with jax.numpy_dtype_promotion("standard"):  # optax is not made for "strict"
        updates, opt_state = optimiser.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


def train(
    step: Callable[[State, int], tuple[State, Float[Array, ""]]],
    state: State,
    steps: int,
    settings: dict[str, Any],
    out: Path,
    resume: Path | None = None,
    name: str = "train",
) -> tuple[State, Float[np.ndarray, " steps"]]:
    """Takes `steps` steps, and saves the state after each quarter of them.

    `step` maps a state and the number of the step to the next state and the loss, as
    one of `devices.make_step` does. It makes its random numbers from that number, so a
    resumed run makes the same draws, on any number of devices. Returns the last state,
    on one device, and the losses of all steps.
    """
    done, losses = np.zeros((), np.int32), np.zeros(steps)
    if resume is not None and is_first_process():
        with resume.open("rb") as file:
            done[()], saved, before = json.loads(file.readline())
            if saved != json.loads(json.dumps(settings)):
                raise ValueError(f"`resume`: {resume} is of a run with {saved}.")
            losses[:done] = before
            state = eqx.tree_deserialise_leaves(file, state)
    done, losses, state = of_first_process((done, losses, state))
    losses = list(losses[:done])

    progress = tqdm(
        range(done, steps),
        initial=int(done),
        total=steps,
        desc=name,
        disable=not is_first_process(),
    )
    for i in progress:
        state, loss = step(state, i)
        losses.append(loss)
        if i % 20 == 0:
            if not np.isfinite(loss).all():
                raise FloatingPointError(f"The loss at step {i} is {np.asarray(loss)}.")
            progress.set_postfix(loss=f"{np.mean(loss):.3f}")
        if 4 * (i + 1) // steps > 4 * i // steps and is_first_process():
            path = out / f"{name}_{i + 1}.eqx"
            with path.with_suffix(".part").open("wb") as file:
                header = json.dumps(
                    [i + 1, settings, np.array(losses, np.float64).tolist()]
                )
                file.write(header.encode() + b"\n")
                eqx.tree_serialise_leaves(file, state)
            path.with_suffix(".part").rename(path)
    return on_one_device(state), np.array(losses, np.float64)


def last_checkpoint(out: Path, name: str) -> Path | None:
    number = lambda path: int(path.stem.rpartition("_")[2])
    return max(out.glob(f"{name}_*.eqx"), key=number, default=None)


def loss_scores(losses: Float[np.ndarray, " steps"], name: str = "") -> dict[str, Any]:
    """Of the first and the last steps, of a model with some name."""
    ends = {"first": losses[:10], "last": losses[-10:]}
    return {f"loss: {end} 10 steps{name}": x.mean() for end, x in ends.items()}


def report(scores: dict[str, Any]) -> dict[str, float]:
    """Prints them, and returns them as plain numbers."""
    width = max(map(len, scores))
    for name, value in scores.items():
        say(f"{name:{width}s}{float(value):12.4f}")
    return {name: float(value) for name, value in scores.items()}


def normal_kl(
    mean: Float[Array, "... dim"],
    log_std: Float[Array, "... dim"],
    prior_mean: Float[Array, "... dim"],
    prior_log_std: Float[Array, "... dim"],
) -> Float[Array, "..."]:
    """The divergence of one normal distribution from another, both of independent
    coordinates.
    """
    log_ratio = log_std - prior_log_std
    distance = (mean - prior_mean) * jnp.exp(-prior_log_std)
    kl = 0.5 * jnp.exp(2 * log_ratio) - log_ratio + 0.5 * distance**2 - 0.5
    return jnp.sum(kl, axis=-1)


def coordinatewise(
    networks: Callable[[Array], Array],
    z: Float[Array, "batch dim"],
    other: Float[Array, "batch other"] | None = None,
) -> Float[Array, "batch dim"]:
    """A stack of networks with one output, each of a coordinate of `z`, and of `other`
    numbers that all of them see.
    """

    def of_batch(network, z):
        inputs = z[:, None]
        if other is not None:
            inputs = jnp.concatenate([inputs, other], axis=-1)
        return jax.vmap(network)(inputs)[:, 0]

    in_axes = (eqx.if_array(0), 1)
    return eqx.filter_vmap(of_batch, in_axes=in_axes, out_axes=1)(networks, z)


def plot_quantiles(ax: Axes, t, held_out, other, colour: str, label: str):
    """Of series along the first axis: 5, 25, 50, 75 and 95%. Those of `held_out` are
    bands.
    """
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    low, lower, middle, upper, high = np.quantile(held_out, quantiles, axis=0)
    ax.fill_between(t, low, high, color="0.88", lw=0)
    ax.fill_between(t, lower, upper, color="0.75", lw=0, label="held out")
    ax.plot(t, middle, color="0.45", lw=2)
    curves = np.quantile(other, quantiles, axis=0)
    for curve, style in zip(curves, (":", "--", "-", "--", ":"), strict=True):
        name = label if style == "-" else None
        ax.plot(t, curve, style, color=colour, lw=1.3, label=name)
