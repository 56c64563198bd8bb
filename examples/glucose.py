"""The data of `latent_sde.py`, the forecasts it is compared with, and their scores.

Readings of a continuous glucose monitor, every five minutes over 201 days, with gaps:
part of the package bokeh-sampledata. Days differ much from one another, and the next
few hours are what the wearer of a sensor wants to know.
"""

import csv
import gzip
from importlib.resources import files

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


PER_HOUR = 4  # readings an hour: means of quarters of an hour
DAY = 24 * PER_HOUR  # readings a day
WINDOW, HORIZON = 8, 4  # hours that the posterior is given, and that it has to forecast
AHEAD = np.arange(1, HORIZON * PER_HOUR + 1)


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


# Scores and baselines. Forecasts are samples or quantiles, along the first axis.


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score: the absolute error, for distributions."""
    num = len(samples)
    rank = np.arange(1 - num, num, 2).reshape(-1, *[1] * truth.ndim)
    spread = np.sum(rank * np.sort(samples, axis=0), axis=0) / (num * (num - 1))
    return np.mean(np.abs(samples - truth), axis=0) - spread


def ks(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic: the largest gap of two CDFs."""
    x, y = (np.sort(values[np.isfinite(values)]) for values in (x, y))
    at = np.concatenate([x, y])
    cdfs = (np.searchsorted(z, at, side="right") / len(z) for z in (x, y))
    return float(np.max(np.abs(np.subtract(*cdfs))))


def baselines(glucose: np.ndarray, fit: np.ndarray, origins: np.ndarray):
    """Forecasts from each of `origins`, having learned from those of `fit`.

    - "last reading", with the spread that its errors had;
    - "time of day": the distribution of readings in that hour of the day;
    - "regression": linear, for each horizon, of log glucose on the last six readings,
      the mean of the window and the time of day; with the spread that its errors had
      within two hours of that time of day.
    """
    level = np.log(glucose)
    last = np.maximum.accumulate(np.where(np.isfinite(level), np.arange(len(level)), 0))
    filled = np.nan_to_num(level[last], nan=float(np.nanmean(level[: fit[-1]])))
    mean = np.convolve(filled, np.ones(WINDOW * PER_HOUR) / (WINDOW * PER_HOUR))
    ranks = (np.arange(200) + 0.5) / 200
    hour = jnp.arange(len(level), dtype=jnp.float32) / PER_HOUR
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
