"""Scores of forecasts, and how `glucose.py` and `latent_sde_file.py` draw them.

Forecasts are samples or quantiles, along the first axis.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.45"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def crps(
    samples: Float[np.ndarray, "samples *shape"], truth: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Continuous ranked probability score: the absolute error, for distributions."""
    num = len(samples)
    rank = np.arange(1 - num, num, 2).reshape(-1, *[1] * truth.ndim)
    spread = np.sum(rank * np.sort(samples, axis=0), axis=0) / (num * (num - 1))
    return np.mean(np.abs(samples - truth), axis=0) - spread


def forecast_scores(
    forecasts: dict[str, Float[np.ndarray, "samples series ahead channels"]],
    truth: Float[np.ndarray, "series ahead channels"],
) -> dict[str, Any]:
    """Of each forecast and channel. NaN in `truth` does not count."""
    scores, num_channels = {}, truth.shape[-1]
    for name, x in forecasts.items():
        for i in range(num_channels):
            of = name if num_channels == 1 else f"channel {i}, {name}"
            y, z = x[..., i], truth[..., i]
            scores[f"CRPS: {of}"] = np.nanmean(crps(y, z))
            scores[f"RMSE: {of}"] = np.nanmean((y.mean(axis=0) - z) ** 2) ** 0.5
            low, high = np.quantile(y, [0.05, 0.95], axis=0)
            covers = (low <= z) & (z <= high)
            scores[f"in 90% band: {of}"] = covers[np.isfinite(z)].mean()
    return scores


def draw_bands(
    ax: Axes,
    t: Float[np.ndarray, " time"],
    samples: Float[np.ndarray, "samples time"],
    colour: str,
    label: str,
):
    """The median, and where half and 90% of samples are."""
    low, lower, middle, upper, high = np.quantile(
        samples, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0
    )
    ax.fill_between(t, low, high, color=colour, alpha=0.25, lw=0, label=label)
    ax.fill_between(t, lower, upper, color=colour, alpha=0.35, lw=0)
    ax.plot(t, middle, color=colour, lw=1.5)


def draw_range(
    ax: Axes,
    t: Float[np.ndarray, " time"],
    series: Float[np.ndarray, "series time"],
    label: str,
):
    """The median of series, and where 90% of them are; NaN does not count."""
    some = np.isfinite(series).any(axis=0)
    quantiles = np.nanquantile(series[:, some], [0.05, 0.5, 0.95], axis=0)
    ax.fill_between(t[some], *quantiles[::2], color="0.88", lw=0, label=label)
    ax.plot(t[some], quantiles[1], color=GREY, lw=2, label="median")
