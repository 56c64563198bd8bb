"""What `latent_sde.py` knows of data: `glucose.py` makes such a task of readings of
glucose, and `latent_sde_file.py` one of the series in a file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from diffrax import AbstractSolver
from jaxtyping import Array, Float, Int


# What networks see of times.
Clock: TypeAlias = Callable[[Float[Array, "*shape"]], Float[Array, "*shape features"]]


class Series(NamedTuple):
    """Standardised readings, and one where there is a reading, else zero."""

    level: Float[Array, "*batch time channels"]
    seen: Float[Array, "*batch time channels"]


class Windows(NamedTuple):
    """Parts of a record, of `length` times each."""

    record: Series
    first: Int[Array, " windows"]  # the index of the first time
    start: Float[Array, " windows"]  # what the clock says then
    length: int

    def choose(self, i: Int[Array, " batch"]) -> tuple[Series, Float[Array, " batch"]]:
        index = self.first[i, None] + jnp.arange(self.length)
        return Series(*(x[index] for x in self.record)), self.start[i]


class Grid(NamedTuple):
    """Times, the first of which is zero, and how latent paths get from that to the
    others: by solves that all have some `length`, span `gaps` between times, and make
    `steps` steps.
    """

    ts: Float[Array, " time"]
    gaps: int
    length: float
    steps: int
    solver: AbstractSolver


class Drawn(NamedTuple):
    """Standardised readings that the model draws."""

    # Without noise, at the times of what a forecast is given, and those after them.
    fitted: Float[np.ndarray, "samples windows given channels"]
    ahead: Float[np.ndarray, "samples windows ahead channels"]
    prior: Float[np.ndarray, "samples time channels"]


class Task(NamedTuple):
    """What to learn, to forecast and to draw."""

    clock: Clock
    train: Windows
    # Of these, only the first `given` times may have readings. Forecasts go on from the
    # last of those.
    held_out: Windows
    given: int
    whole: Grid  # of windows
    ahead: Grid  # of forecasts
    prior: Grid  # of draws from the prior, which start where the clock is zero
    about: str  # what is held out
    settings: dict[str, Any]  # that a run has to share with one that it continues
    # Scores of what is drawn, which it may also plot, in a folder.
    evaluate: Callable[[Drawn, Path], dict[str, Any]]
