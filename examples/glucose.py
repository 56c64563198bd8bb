"""Glucose, as a task of `latent_sde.py`: readings, and forecasts to compare with.

Readings of a continuous glucose monitor, every five minutes over 201 days, with gaps:
part of the package bokeh-sampledata. Days differ much from one another, and the next
few hours are what the wearer of a sensor wants to know.
"""

import csv
import gzip
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from devices import save_figure
from jaxtyping import Array, Float, Int
from latent_sde_scores import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    crps,
    draw_bands,
    draw_range,
    forecast_scores,
)
from latent_sde_task import Drawn, Grid, Series, Task, Windows

from diffrax_sde_adjoint import ReversibleHeun


PER_HOUR = 4  # readings an hour: means of quarters of an hour
DAY = 24 * PER_HOUR  # readings a day
WINDOW, HORIZON = 8, 4  # hours that the posterior is given, and that it has to forecast
AHEAD = np.arange(1, HORIZON * PER_HOUR + 1)
LENGTH = WINDOW * PER_HOUR
# The days to score on; those before are for training.
HELD_OUT = {"validation": (130, 160), "test": (160, 201)}
float32 = jnp.float32


def load_glucose() -> Float[np.ndarray, " time"]:
    """Glucose in mg/dL, from a midnight on, a mean for every quarter of an hour.

    NaN where there are no readings.
    """
    path = files("bokeh_sampledata").joinpath("_data", "CGM.csv.gz")
    with path.open("rb") as file, gzip.open(file, "rt") as lines:
        rows = list(csv.DictReader(lines))
    times = np.array([row["datetime"] for row in rows], "datetime64[m]")
    index = (times - times[0].astype("datetime64[D]")).astype(int) * PER_HOUR // 60
    count = np.bincount(index, minlength=(index[-1] // DAY + 1) * DAY)
    total = np.bincount(index, [float(row["glucose"]) for row in rows], len(count))
    return np.where(count > 0, total, np.nan) / np.maximum(count, 1)


def clock_at(hour: Float[Array, "..."]) -> Float[Array, "... 4"]:
    """The time of day, as two harmonics."""
    angle = hour * (2 * jnp.pi / 24)
    return jnp.stack(
        [jnp.sin(angle), jnp.cos(angle), jnp.sin(2 * angle), jnp.cos(2 * angle)], -1
    )


def every_hour(hours: int) -> Grid:
    """Each hour is a solve of its own, of 12 steps: the posterior contracts towards the
    readings, which reversible Heun does not bear for long.
    """
    ts = jnp.arange(hours * PER_HOUR + 1, dtype=float32) / PER_HOUR
    return Grid(ts, PER_HOUR, 1.0, 12, ReversibleHeun())


def glucose_task(held_out: Literal["test", "validation"]) -> Task:
    """The model sees the logarithm, in windows of which more than half has readings. It
    forecasts from every full hour of the held-out days at which there is one.
    """
    values = load_glucose()
    split, end = (DAY * day for day in HELD_OUT[held_out])
    seen, logs = np.isfinite(values), np.log(values)
    centre, scale = (float(f(logs[:split])) for f in (np.nanmean, np.nanstd))
    level = np.where(seen, (logs - centre) / scale, 0)
    record = Series(*(jnp.asarray(x[:, None], float32) for x in (level, seen)))

    def windows(first):
        hour = jnp.asarray(first % DAY, float32) / PER_HOUR
        return Windows(record, jnp.asarray(first), hour, LENGTH + 1)

    starts = np.arange(split - LENGTH)
    covered = np.convolve(seen, np.ones(LENGTH + 1), "valid")[starts] > LENGTH / 2
    origins = np.arange(split + LENGTH, end - AHEAD[-1], PER_HOUR)
    origins = origins[seen[origins]]
    return Task(
        clock=clock_at,
        train=windows(starts[covered]),
        held_out=windows(origins - LENGTH),
        given=LENGTH + 1,
        whole=every_hour(WINDOW),
        ahead=every_hour(HORIZON),
        prior=every_hour(24),
        about=f"{(end - split) // DAY} held-out days ({held_out})",
        settings=dict(held_out=held_out),
        evaluate=Days(values, split, end, origins, centre, scale).evaluate,
    )


class Days(NamedTuple):
    """Glucose in mg/dL, and what there is to score."""

    values: Float[np.ndarray, " time"]
    split: int  # the end of the days for training
    end: int  # the end of those that are held out
    origins: Int[np.ndarray, " windows"]
    centre: float  # of the logarithm
    scale: float

    def evaluate(self, drawn: Drawn, out: Path) -> dict[str, Any]:
        fitted, ahead, prior = (self.in_mg_dl(x[..., 0]) for x in drawn)
        seen = np.isfinite(self.values)
        fit = np.arange(LENGTH, self.split - AHEAD[-1])
        others = baselines(self.values, fit[seen[fit]], self.origins)
        forecasts = {"latent SDE": ahead, **others}
        truth = self.values[self.origins[:, None] + AHEAD]
        scores = forecast_scores(
            {name: x[..., None] for name, x in forecasts.items()}, truth[..., None]
        )
        # Days of the prior, without the midnight at their end; and held-out days, for
        # how much days differ from one another.
        split, end = self.split, self.end
        days, later = (
            x.reshape(-1, DAY) for x in (self.values[:split], self.values[split:end])
        )
        prior = prior[:, :DAY]
        change = lambda x: x[:, PER_HOUR:] - x[:, :-PER_HOUR]
        for name, x in (("prior", prior), ("held-out", later)):
            scores[f"KS to training, readings: {name}"] = ks(x, days)
            changes = ks(change(x), change(days))
            scores[f"KS to training, hourly changes: {name}"] = changes
        errors = {name: crps(x, truth) for name, x in forecasts.items()}
        plot(out / "latent_sde.png", self, fitted, ahead, days, prior, errors)
        return scores

    def in_mg_dl(self, x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The sensor's readings end at 40 and 400."""
        return np.clip(np.exp(np.asarray(x, float) * self.scale + self.centre), 40, 400)


def ks(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic: the largest gap of two CDFs."""
    x, y = (np.sort(values[np.isfinite(values)]) for values in (x, y))
    at = np.concatenate([x, y])
    cdfs = (np.searchsorted(z, at, side="right") / len(z) for z in (x, y))
    return float(np.max(np.abs(np.subtract(*cdfs))))


def baselines(
    glucose: Float[np.ndarray, " time"],
    fit: Int[np.ndarray, " some"],
    origins: Int[np.ndarray, " others"],
) -> dict[str, Float[np.ndarray, "200 others ahead"]]:
    """Quantiles of forecasts from `origins`, having learned from those of `fit`.

    - "last reading", with the spread that its errors had;
    - "time of day": the distribution of readings in that hour of the day;
    - "regression": linear, for each horizon, of log glucose on the last six readings,
      the mean of the window and the time of day; with the spread that its errors had
      within two hours of that time of day.
    """
    level = np.log(glucose)
    last = np.maximum.accumulate(np.where(np.isfinite(level), np.arange(len(level)), 0))
    filled = np.nan_to_num(level[last], nan=float(np.nanmean(level[: fit[-1]])))
    mean = np.convolve(filled, np.ones(LENGTH) / LENGTH)
    ranks = (np.arange(200) + 0.5) / 200
    hour = jnp.arange(len(level), dtype=float32) / PER_HOUR
    clock = np.asarray(clock_at(hour), float)

    def features(origin):
        recent = filled[origin[:, None] - np.arange(6)]
        return np.column_stack(
            [recent, mean[origin], clock[origin], np.ones(len(origin))]
        )

    def quantiles(values, index, target, reach):
        """Of `values`, those within `reach` hours of the target's time of day."""
        apart = np.abs(np.arange(24)[:, None] - index % DAY // PER_HOUR)
        near = np.minimum(apart, 24 - apart) <= reach
        table = np.stack([np.quantile(values[hour], ranks) for hour in near], axis=1)
        return table[:, target % DAY // PER_HOUR]

    forecasts = {"last reading": [], "time of day": [], "regression": []}
    for ahead in AHEAD:
        seen = fit[np.isfinite(level[fit + ahead])]
        then, target = seen + ahead, origins + ahead
        errors = np.quantile(level[then] - filled[seen], ranks)[:, None]
        forecasts["last reading"].append(filled[origins] + errors)
        forecasts["time of day"].append(quantiles(level[then], then, target, 0))
        x = features(seen)
        weights = np.linalg.solve(
            x.T @ x + 1e-2 * np.eye(x.shape[1]), x.T @ level[then]
        )
        errors = quantiles(level[then] - x @ weights, then, target, 2)
        forecasts["regression"].append(features(origins) @ weights + errors)
    return {name: np.exp(np.stack(x, axis=-1)) for name, x in forecasts.items()}


def plot(path: Path, data: Days, fitted, ahead, days, prior, errors):
    """Above, held-out windows; below, days of the data and of the prior, and scores."""
    fig, axes = plt.subplots(2, 3, figsize=(12, 6.8), layout="constrained")
    draw_windows(axes[0], data, fitted, ahead)
    titles = ("Days of the data", "Days drawn from the prior")
    rng = np.random.default_rng(0)
    for ax, x, title in zip(axes[1], (days, prior), titles, strict=False):
        draw_range(ax, np.arange(DAY) / PER_HOUR, x, "90% of all days")
        whole = x[np.isfinite(x).mean(axis=1) > 0.95]
        some = whole[rng.choice(len(whole), len(COLOURS), replace=False)]
        for day, colour in zip(some, COLOURS, strict=True):
            ax.plot(np.arange(DAY) / PER_HOUR, day, color=colour, lw=1.1)
        ax.set(title=title, xlabel="time of day, hours", ylim=(30, 410))
        ax.set(xlim=(0, 24), xticks=range(0, 25, 6))
    axes[1, 0].legend(loc="upper left", frameon=False, fontsize=9)
    for ax in axes[:, 0]:
        ax.set(ylabel="glucose, mg/dL")
    draw_errors(axes[1, 2], errors)
    save_figure(fig, path)


def draw_windows(axes, data: Days, fitted, ahead):
    """Around three origins, each at another time of day."""
    around = data.origins[:, None] + np.arange(-LENGTH, AHEAD[-1] + 1)
    whole = np.isfinite(data.values[around]).all(axis=1)
    past, future = np.arange(-LENGTH, 1) / PER_HOUR, AHEAD / PER_HOUR
    for ax, hour, rank in zip(axes, (8, 13, 20), (0.2, 0.5, 0.8), strict=True):
        # Chosen by the clock.
        those = np.flatnonzero(whole & (data.origins % DAY == hour * PER_HOUR))
        i = those[int(rank * len(those))]
        draw_bands(ax, past, fitted[:, i], BLUE, "posterior, 50% and 90%")
        draw_bands(ax, future, ahead[:, i], ORANGE, "forecast, 50% and 90%")
        x = np.concatenate([past, future])
        ax.plot(x, data.values[around[i]], "k.", ms=4, label="readings")
        ax.axvline(0, color=GREY, lw=0.8, ls=":")
        ax.set(title=f"Held-out day {data.origins[i] // DAY + 1}, at {hour}:00")
        ax.set(xlabel="hours from now", ylim=(30, 410), xticks=range(-8, 5, 2))
    axes[0].legend(loc="upper left", frameon=False, fontsize=9)


def draw_errors(ax, errors: dict[str, Float[np.ndarray, "origins ahead"]]):
    styles = ({"color": ORANGE, "lw": 2.5}, {"ls": ":"}, {"ls": "-."}, {"ls": "--"})
    for (name, error), style in zip(errors.items(), styles, strict=True):
        label = f"{name}: {np.nanmean(error):.1f}"
        x, y = AHEAD / PER_HOUR, np.nanmean(error, axis=0)
        ax.plot(x, y, label=label, **{"color": "black", "lw": 1.2, **style})
    ax.set(title="Error of held-out forecasts", xlabel="hours ahead")
    ax.set(ylabel="CRPS, mg/dL (lower is better)", ylim=(0, None))
    ax.legend(title="mean over horizons", loc="lower right", frameon=False)
