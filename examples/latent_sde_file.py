"""The series of a file, as a task of `latent_sde.py`.

The latent SDE learns from the first series, as they are and up to the time at which the
forecasts of the last ones start, so that its encoder knows both. Time is scaled: all
times together are ten units long, in which a latent state can move several times as far
as it usually is from zero.
"""

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from devices import save_figure
from diffrax import Heun
from jaxtyping import Array, Float
from latent_sde_scores import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    draw_bands,
    draw_range,
    forecast_scores,
)
from latent_sde_task import Drawn, Grid, Series, Task, Windows


UNITS = 10.0
MAX_DRAWN = 4  # channels in the figure
float32 = jnp.float32


def load(
    path: Path,
) -> tuple[Float[np.ndarray, "series time channels"], Float[np.ndarray, " time"]]:
    """`values`, NaN where `mask` has none, and `times`."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"`data`: {path} is not a file of `numpy.savez`.")
    with np.load(path) as file:
        arrays = dict(file)
    for key in ("values", "times"):
        if key not in arrays:
            raise ValueError(f"`data`: {path} has no `{key}`, but {sorted(arrays)}.")
        if arrays[key].dtype.kind not in "fiu":
            raise ValueError(
                f"`data`: `{key}` of {path} are numbers, but of {arrays[key].dtype}."
            )
    values, times = (arrays[key].astype(float) for key in ("values", "times"))
    mask = arrays.get("mask", np.isfinite(values))
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(
            f"`data`: `values` of {path} have the shape (series, times, channels), but "
            f"here {values.shape}."
        )
    for key, x, shape in (
        ("times", times, values.shape[1:2]),
        ("mask", mask, values.shape),
    ):
        if x.shape != shape:
            raise ValueError(
                f"`data`: `{key}` of {path} has the shape {x.shape}, but with `values` "
                f"of {values.shape} it has to be {shape}."
            )
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"`data`: `mask` of {path} is not of True and False, or 1, 0.")
    return np.where((mask == 1) & np.isfinite(values), values, np.nan), times


def check_times(path: Path, times: Float[np.ndarray, " time"]):
    if len(times) < 3:
        raise ValueError(f"`data`: {path} has {len(times)} `times`, and less than 3.")
    increase = lambda t: np.isfinite(t).all() and (np.diff(t) > 0).all()
    if not increase(times) or not increase(scaled(times, times)):
        raise ValueError(
            f"`data`: `times` of {path} have to increase, each by more than a rounding "
            "error of float32 in all of them."
        )


def scaled(
    t: Float[np.ndarray, "..."], times: Float[np.ndarray, " time"]
) -> Float[np.ndarray, "..."]:
    return (UNITS * (t - times[0]) / (times[-1] - times[0])).astype(np.float32)


def clock_at(t: Float[Array, "*shape"]) -> Float[Array, "*shape 1"]:
    """Time, from -1 to 1."""
    return (2 / UNITS * t - 1)[..., None]


def one_solve(ts: Float[np.ndarray, " time"], dt: float) -> Grid:
    ts = ts - ts[0]
    length = float(ts[-1])
    steps = math.ceil(length / dt - 1e-3)
    return Grid(jnp.asarray(ts), len(ts) - 1, length, steps, Heun())


def standardised(values: Float[np.ndarray, "series time channels"]) -> Windows:
    """Each series a window, from where the clock is zero."""
    num, length, channels = values.shape
    seen = np.isfinite(values)
    both = (jnp.asarray(x, float32) for x in (np.where(seen, values, 0), seen))
    record = Series(*(x.reshape(-1, channels) for x in both))
    return Windows(record, jnp.arange(num) * length, jnp.zeros(num, float32), length)


def split(
    values: Float[np.ndarray, "series time channels"],
    share: float,
    held_out: Literal["test", "validation"],
) -> tuple[np.ndarray, np.ndarray]:
    """The last series are for the test, and as many before them for validation."""
    num = max(1, round(share * len(values)))
    end = len(values) - (num if held_out == "validation" else 0)
    if not 0 < share < 1 or end - num < 1:
        raise ValueError(
            f"`held_out_share`: {share} of {len(values)} series leaves none for "
            f"training, if those held out are for {held_out}."
        )
    return values[: end - num], values[end - num : end]


def digest(*arrays: np.ndarray) -> int:
    """By which a file is known again, wherever it is."""
    return zlib.crc32(b"".join(x.tobytes() for x in arrays))


def file_task(
    path: Path,
    given: int | None,
    share: float,
    dt: float | None,
    held_out: Literal["test", "validation"],
) -> Task:
    """The last `share` of the series in a file is held out."""
    values, times = load(path)
    check_times(path, times)
    given = max(2, len(times) // 2) if given is None else given
    if not 1 < given < len(times):
        raise ValueError(
            f"`given` is at least 2 and less than the number of times, {len(times)}, "
            f"but is {given}."
        )
    if dt is not None and not 0 < dt <= times[-1] - times[0]:
        raise ValueError(f"`dt` is positive and no longer than a series, but is {dt}.")
    train, others = split(values, share, held_out)
    for name, x in (("for training", train), ("to forecast", others[:, given:])):
        unseen = np.flatnonzero(~np.isfinite(x).any(axis=(0, 1)))
        if len(unseen) > 0:
            raise ValueError(
                f"`data`: {path} has no values {name} of channel {unseen}."
            )
    centre, scale = (f(train, axis=(0, 1)) for f in (np.nanmean, np.nanstd))
    scale = np.where(scale > 0, scale, 1)
    train, others = (train - centre) / scale, (others - centre) / scale
    data = FileData(times, train, others, given, centre, scale)
    ts = scaled(times, times)
    step = UNITS / max(100, len(times) - 1)
    if dt is not None:
        step = UNITS * dt / (times[-1] - times[0])
    cut = lambda x: np.where(np.arange(len(times))[:, None] < given, x, np.nan)
    return Task(
        clock=clock_at,
        train=standardised(np.concatenate([train, cut(train)])),
        held_out=standardised(cut(others)),
        given=given,
        whole=one_solve(ts, step),
        ahead=one_solve(ts[given - 1 :], step),
        prior=one_solve(ts, step),
        about=f"{len(others)} held-out series ({held_out})",
        settings=dict(
            data=digest(values, times), given=given, share=share, dt=dt, split=held_out
        ),
        evaluate=data.evaluate,
    )


class FileData(NamedTuple):
    """Standardised series, NaN where there is no value."""

    times: Float[np.ndarray, " time"]
    train: Float[np.ndarray, "series time channels"]
    held_out: Float[np.ndarray, "others time channels"]
    given: int
    centre: Float[np.ndarray, " channels"]
    scale: Float[np.ndarray, " channels"]

    def evaluate(self, drawn: Drawn, out: Path) -> dict[str, Any]:
        forecasts = {"latent SDE": drawn.ahead, **baselines(self)}
        in_units = lambda x: np.asarray(x, float) * self.scale + self.centre
        scores = forecast_scores(
            {name: in_units(x) for name, x in forecasts.items()},
            in_units(self.held_out[:, self.given :]),
        )
        data = self._replace(
            train=in_units(self.train), held_out=in_units(self.held_out)
        )
        plot(out / "latent_sde.png", data, Drawn(*map(in_units, drawn)))
        return scores


def baselines(
    data: FileData,
) -> dict[str, Float[np.ndarray, "200 others ahead channels"]]:
    """Quantiles of forecasts of standardised series.

    - "last value", with the spread that its errors had in training at each time;
    - "training": the values at that time in training.

    Where training has none, they are the last value, and zero.
    """
    ranks = (np.arange(200) + 0.5) / 200

    def quantiles(x):
        filled = np.where(np.isfinite(x).any(axis=0), x, 0)
        return np.nanquantile(filled, ranks, axis=0)[:, None]

    def last(x):
        found = np.zeros((len(x), x.shape[2]))
        for i in range(data.given):
            found = np.where(np.isfinite(x[:, i]), x[:, i], found)
        return found[:, None]

    target = data.train[:, data.given :]
    forecast = last(data.held_out) + quantiles(target - last(data.train))
    at_time = np.broadcast_to(quantiles(target), forecast.shape)
    return {"last value": forecast, "training": at_time}


def plot(path: Path, data: FileData, drawn: Drawn):
    """For each channel: two held-out series, those for training, and the prior."""
    num = min(data.train.shape[-1], MAX_DRAWN)
    fig, axes = plt.subplots(
        num, 4, figsize=(12, 1 + 2.7 * num), layout="constrained", squeeze=False
    )
    # Those with the most values to compare with.
    seen = np.isfinite(data.held_out).sum(axis=(1, 2))
    chosen = np.sort(np.argsort(-seen, kind="stable")[:2])
    for k, row in enumerate(axes):
        for ax, i in zip(row, chosen, strict=False):
            draw_series(ax, data, drawn, i, k)
            ax.set(title=f"Held-out series {i}" if k == 0 else None)
        for ax, x, title in zip(
            row[2:],
            (data.train, drawn.prior),
            ("Series for training", "Drawn from the prior"),
            strict=True,
        ):
            draw_range(ax, data.times, x[..., k], "90% of all")
            for series, colour in zip(x[:3, :, k], COLOURS, strict=False):
                some = np.isfinite(series)
                ax.plot(data.times[some], series[some], color=colour, lw=1.0)
            ax.set(title=title if k == 0 else None)
        low, high = np.nanquantile(data.train[..., k], [0.005, 0.995])
        margin = 0.2 * (high - low) or 1.0
        for ax in row:
            ax.set(ylim=(low - margin, high + margin))
        row[0].set(ylabel=f"channel {k}")
    for ax in axes[-1]:
        ax.set(xlabel="time")
    handles = [x for ax in axes[0, ::2] for x in ax.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    save_figure(fig, path)


def draw_series(ax, data: FileData, drawn: Drawn, i: int, k: int):
    """Of one held-out series, one channel, and what the model says of it."""
    past, future = np.split(data.times, [data.given])
    draw_bands(ax, past, drawn.fitted[:, i, :, k], BLUE, "posterior, 50% and 90%")
    draw_bands(ax, future, drawn.ahead[:, i, :, k], ORANGE, "forecast, 50% and 90%")
    ax.plot(data.times, data.held_out[i, :, k], "k.", ms=4, label="values")
    ax.axvline(past[-1], color=GREY, lw=0.8, ls=":")
