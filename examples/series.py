"""Series to generate, of `neural_sde_score.py` and `sde_gan.py`: a process whose law is
known, the glucose of one person, and the prices of four shares.
"""

import csv
import gzip
from importlib.resources import files
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from glucose import DAY, load_glucose
from jaxtyping import Float


TIMES = 64  # of each series: 0, 1, ..., 63
Name: TypeAlias = Literal["glucose", "ou", "shares"]
Series: TypeAlias = Float[np.ndarray, "num times channels"]


class Data(NamedTuple):
    """Series for training and others, what they are of, and what is known of them: if
    each value is the mean until the next one, and if any time is like any other.
    """

    train: Series
    held_out: Series
    labels: tuple[str, ...]
    is_averaged: bool
    is_stationary: bool


def ornstein_uhlenbeck(num: int, seed: int) -> Float[np.ndarray, "num times 1"]:
    """dy = (0.02 t - 0.1 y) dt + 0.4 dW from y(0) uniform in [-1, 1], exactly.

    The distance from `0.2 t - 2`, which solves the equation without noise, is an
    Ornstein-Uhlenbeck process with normal transitions.
    """
    rng = np.random.default_rng(seed)
    decay = np.exp(-0.1)
    std = 0.4 * np.sqrt((1 - decay**2) / 0.2)
    around = 0.2 * np.arange(TIMES) - 2
    distance = np.empty((num, TIMES))
    distance[:, 0] = rng.uniform(-1, 1, num) - around[0]
    for i in range(1, TIMES):
        distance[:, i] = decay * distance[:, i - 1] + std * rng.normal(size=num)
    return (around + distance)[..., None]


def windows(values: Float[np.ndarray, "time channels"], period: int):
    """Windows without gaps, which start at any time of the first of two periods. Of ten
    pairs of periods, seven are for training, one for validation and two for the test.
    """
    pairs = values[: len(values) // (2 * period) * 2 * period]
    pairs = pairs.reshape(-1, 2 * period, values.shape[-1])
    all_windows = np.lib.stride_tricks.sliding_window_view(pairs, TIMES, axis=1)
    all_windows = np.swapaxes(all_windows[:, :period], 2, 3)
    of_ten = np.arange(len(pairs)) % 10
    parts = dict(validation=(4,), test=(2, 7), train=(0, 1, 3, 5, 6, 8, 9))
    split = {
        name: all_windows[np.isin(of_ten, part)].reshape(-1, TIMES, values.shape[-1])
        for name, part in parts.items()
    }
    return {name: x[np.isfinite(x).all(axis=(1, 2))] for name, x in split.items()}


def glucose_windows() -> dict[str, Series]:
    return windows(np.log(load_glucose())[:, None], DAY)


def load_shares() -> Float[np.ndarray, "share day 2"]:
    """Logarithms of the price and of the day's range, of shares of Apple, Google, IBM
    and Microsoft from March 2000 to March 2013: part of the package bokeh-sampledata.

    The price is that at the close, adjusted for splits and dividends; the range is
    log(highest / lowest). NaN before a company was listed.
    """
    path = files("bokeh_sampledata").joinpath("_data", "stocks.csv.gz")
    with path.open("rb") as file, gzip.open(file, "rt") as lines:
        rows = list(csv.DictReader(lines))
    days = sorted({row["Date"] for row in rows})
    names = ("AAPL", "GOOG", "IBM", "MSFT")
    shares = np.full((len(names), len(days), 2), np.nan)
    index = {day: i for i, day in enumerate(days)}
    for row in rows:
        if row["Ticker"] in names:
            price, high, low = (float(row[x]) for x in ("Adj Close", "High", "Low"))
            values = np.log(price), np.log(max(np.log(high / low), 1e-3))
            shares[names.index(row["Ticker"]), index[row["Date"]]] = values
    return shares


def share_windows() -> dict[str, Series]:
    """The price is relative to that of the day before the window, so what is first is
    the change of a day. Windows of all shares are of the same days in each part.
    """
    parts = []
    for share in load_shares():
        changes = np.diff(share[:, :1], axis=0)
        parts.append(windows(np.concatenate([changes, share[1:, 1:]], axis=1), TIMES))
    split = {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
    for x in split.values():
        x[..., 0] = np.cumsum(x[..., 0], axis=1)
    return split


def load(name: Name, held_out: Literal["validation", "test"]) -> Data:
    """Each channel is scaled by its mean and standard deviation at the first time."""
    if name == "ou":
        sizes = dict(train=8192, test=2048, validation=2048)
        split = {
            part: ornstein_uhlenbeck(num, i)
            for i, (part, num) in enumerate(sizes.items())
        }
        about = (("y, scaled",), False, False)
    elif name == "glucose":
        split = glucose_windows()
        about = (("log glucose, scaled",), True, True)
    else:
        split = share_windows()
        about = (("log price, scaled", "log range, scaled"), False, True)
    start = split["train"][:, 0]
    scale = lambda x: ((x - start.mean(axis=0)) / start.std(axis=0)).astype(np.float32)
    return Data(scale(split["train"]), scale(split[held_out]), *about)
