"""The training loop of the examples: a bar, checkpoints, and continuing from one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm


Model = TypeVar("Model")
State = TypeVar("State")


def update(
    optimiser: optax.GradientTransformation, model: Model, opt_state: Any, grads: Any
) -> tuple[Model, Any]:
    """One step of `optimiser`."""
    with jax.numpy_dtype_promotion("standard"):  # optax is not made for "strict"
        updates, opt_state = optimiser.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state


def train(
    step: Callable[[State, int], tuple[State, Float[Array, "*members"]]],
    state: State,
    steps: int,
    settings: dict[str, Any],
    out: Path,
    resume: Path | None = None,
    name: str = "checkpoint",
) -> tuple[State, Float[np.ndarray, "steps *members"]]:
    """Takes `steps` steps, and saves the state after each quarter of them.

    `step` maps a state and the number of the step to the next state and the loss. It
    makes its random numbers from that number, so a resumed run makes the same draws.
    Returns the last state, and the losses of all steps.
    """
    done, losses = 0, []
    if resume is not None:
        with resume.open("rb") as file:
            done, saved, losses = json.loads(file.readline())
            if saved != json.loads(json.dumps(settings)):
                raise ValueError(f"`resume`: {resume} is of a run with {saved}.")
            state = eqx.tree_deserialise_leaves(file, state)

    progress = tqdm(range(done, steps), initial=done, total=steps, desc="train")
    for i in progress:
        state, loss = step(state, i)
        losses.append(loss)
        if i % 20 == 0:
            progress.set_postfix(loss=f"{np.mean(loss):.3f}")
        if (i + 1) % max(steps // 4, 1) == 0 or i + 1 == steps:
            with (out / f"{name}_{i + 1}.eqx").open("wb") as file:
                header = json.dumps([i + 1, settings, np.array(losses).tolist()])
                file.write(header.encode() + b"\n")
                eqx.tree_serialise_leaves(file, state)
    return state, np.array(losses)
