"""The figures of `docs/how_it_works/brownian_interval.md`.

    python docs/figures/brownian_interval.py

draws `docs/assets/brownian_interval_cells.png`, a path, a query of it and the intervals
that the query draws numbers for; and `docs/assets/brownian_interval_cost.png`, the time
of a query against the size of the shape, which is measured first. This takes about a
minute on two cores, which should be idle.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from diffrax_sde_adjoint import BrownianInterval
from diffrax_sde_adjoint._brownian import query, refine


ASSETS = Path(__file__).parent.parent / "assets"
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "0.45"

# The first figure: few levels, so that leaves can be seen.
LEVELS, DT = 5, 0.2
START, END = 0.066, 0.734

# The second figure: the length of a query, and from the size of the shape to the number
# of queries that are timed together, for starting the program not to matter.
LENGTH = 1e-3
SIZES = {1: 900, 16: 900, 64: 400, 256: 100, 1024: 40, 16384: 3}
SECONDS = 0.5  # for each program and size

float32 = jnp.float32
# From the index, start and end of a query to its value.
Query = Callable[[Int[Array, ""], Float[Array, ""], Float[Array, ""]], PyTree[Any]]
MakeQuery = Callable[[PRNGKeyArray, tuple[int, ...]], Query]


def main() -> None:
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        draw_cells(ASSETS / "brownian_interval_cells.png")
        draw_cost(ASSETS / "brownian_interval_cost.png", measure())


def draw_cells(out: Path) -> None:
    """Above, a path and a query; below, a rectangle for each draw that the query makes.

    The intervals are those that `BrownianInterval` finds for this query.
    """
    path = BrownianInterval(0.0, 1.0, (), jr.key(7), dt=DT, levels=LEVELS)
    ends = jnp.array([START, END], path.t0.dtype)
    cells, points = query._locate(path._cells, ends, jnp.array(1e-6), LEVELS)
    first, last = (int(i) for i in cells)
    ids = np.asarray(refine.intervals_around(points, LEVELS))

    fig, (above, below) = plt.subplots(
        2,
        1,
        figsize=(7.2, 6.2),
        sharex=True,
        height_ratios=(1, 1.25),
        layout="constrained",
    )
    _draw_path(above, path, first, last)
    _draw_tree(below, round(1 / DT))
    for i in range(first + 1, last):
        _rectangle(below, DT * i, DT, 0, GREEN)
    for cell, around, colour in zip((first, last), ids, (ORANGE, BLUE), strict=True):
        _rectangle(below, DT * cell, DT, 0, colour)
        for i in around:
            level = int(i).bit_length() - 1
            width = DT / 2**level
            left = DT * cell + (int(i) - 2**level) * width
            _rectangle(below, left, width, 1 + level, colour)
            if level < LEVELS:
                _split(below, left + width / 2, 1 + level)
    _count_draws(below, first, last)
    for t in (START, END):
        above.axvline(t, color="0.2", lw=1, ls="--")
        below.plot([t, t], [0.6, -LEVELS - 1.5], color="0.2", lw=1, ls="--")
    fig.savefig(out, dpi=160)
    plt.close(fig)


def _draw_path(ax: Axes, path: BrownianInterval, first: int, last: int) -> None:
    """The path at the ends of all leaves, coloured by the parts that a query joins."""
    edges = [DT * (first + 1), DT * last]
    times = np.linspace(0, 1, round(2**LEVELS / DT) + 1)
    times = np.sort(np.concatenate([times, [START, END]]))
    values = jax.vmap(path.evaluate)(jnp.asarray(times, path.t0.dtype))
    bounds = [0, START, *edges, END, 1]
    colours = ["0.65", ORANGE, GREEN, BLUE, "0.65"]
    for low, high, colour in zip(bounds[:-1], bounds[1:], colours, strict=True):
        part = (low - 1e-9 <= times) & (times <= high + 1e-9)
        ax.plot(times[part], values[part], color=colour, lw=1.6)
    for i in range(round(1 / DT) + 1):
        ax.axvline(DT * i, color="0.8", lw=0.8, zorder=0)

    top = float(jnp.max(values)) + 0.12
    names = ("part", "whole cells", "part")
    for low, high, colour, name in zip(
        bounds[1:-2], bounds[2:-1], colours[1:-1], names, strict=True
    ):
        ax.annotate(
            "",
            (low, top),
            (high, top),
            arrowprops={"arrowstyle": "<->", "color": colour},
        )
        ax.text(
            (low + high) / 2, top + 0.06, name, color=colour, ha="center", va="bottom"
        )
    low = float(jnp.min(values)) - 0.1
    for t, name in ((START, " $s$"), (END, " $t$")):
        ax.text(t, low, name, fontsize=14, va="bottom")
    ax.set(ylabel="Brownian motion", xlim=(0, 1), ylim=(low, top + 0.3))
    ax.tick_params(labelbottom=False)


def _draw_tree(ax: Axes, num_cells: int) -> None:
    """All intervals, faintly: a row for cells as a whole, one for each level."""
    for row in range(LEVELS + 2):
        width = DT / 2 ** max(row - 1, 0)
        lefts = width * np.arange(round(num_cells * DT / width))
        ax.bar(
            lefts,
            0.8,
            width,
            -row - 0.4,
            align="edge",
            facecolor="0.97",
            edgecolor="0.88",
            lw=0.5,
        )
    halved = [r"halving of $dt$"]
    halved += [rf"of $dt\,/\,{2**level}$" for level in range(1, LEVELS)]
    names = ["the cell", *halved, rf"leaf, $dt\,/\,{2**LEVELS}$"]
    ax.set(yticks=-np.arange(LEVELS + 2), yticklabels=names)
    ax.set(xticks=DT * np.arange(num_cells + 1), xlabel="time")
    ax.set(ylim=(-LEVELS - 2.5, 0.6))
    ax.set_title("One draw for each filled rectangle", fontsize=10)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _count_draws(ax: Axes, first: int, last: int) -> None:
    """Below each cell, how many times the query draws numbers for it."""
    for i in range(round(1 / DT)):
        if i in (first, last):
            colour, count = ORANGE if i == first else BLUE, f"{LEVELS + 2} draws"
        elif first < i < last:
            colour, count = GREEN, "1 draw"
        else:
            colour, count = GREY, "none"
        y = -LEVELS - 2
        ax.text(DT * (i + 0.5), y, count, color=colour, ha="center", va="center")


def _rectangle(ax: Axes, left: float, width: float, row: int, colour: str) -> None:
    ax.bar(left, 0.8, width, -row - 0.4, align="edge", color=colour)
    ax.plot([left, left], [-row - 0.4, -row + 0.4], color="w", lw=1)


def _split(ax: Axes, t: float, row: int) -> None:
    ax.plot([t, t], [-row - 0.4, -row + 0.4], color="w", lw=1, ls=":")


def measure() -> dict[str, list[float]]:
    """The time of a query in µs, for each program and size."""
    out: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for size, num in SIZES.items():
        shape = () if size == 1 else (size,)
        runs = {
            name: _sum_of_queries(make_query, offset, shape, num)
            for name, (make_query, offset, _) in PROGRAMS.items()
        }
        for name, seconds in _fastest(runs).items():
            out[name].append(1e6 * seconds / num)
        row = (f"{name}: {x[-1]:.3g} µs" for name, x in out.items())
        print(shape, *(" ".join(cell.split()) for cell in row), sep="; ")
    return out


def _sum_of_queries(
    make_query: MakeQuery, offset: float, shape: tuple[int, ...], num: int
) -> Callable[[], Array]:
    """Queries one after the other from `offset * LENGTH` on, and uses the results."""

    # As in `tests/benchmarks/test_noise.py`: not a scan over an array of times, which
    # XLA would run differently and, for small shapes, more slowly.
    @jax.jit
    def run(key):
        query = make_query(key, shape)
        time_of = lambda i: (i.astype(float32) + float32(offset)) * float32(LENGTH)

        def step(i, carry):
            t0, total = carry
            t1 = time_of(i + 1)
            return t1, total + query(i, t0, t1)

        init = (time_of(jnp.zeros((), jnp.int32)), jnp.zeros(shape, float32))
        return lax.fori_loop(0, num, step, init)[1]

    return lambda: jax.block_until_ready(run(jr.key(0)))


def _fastest(runs: dict[str, Callable[[], Array]]) -> dict[str, float]:
    """The fastest run of each program, in seconds. They take turns, so that whatever
    else the machine does reaches all of them.
    """
    for run in runs.values():
        run()  # compiles
    fastest = dict.fromkeys(runs, float("inf"))
    spent = dict.fromkeys(runs, 0.0)
    while min(spent.values()) < SECONDS:
        for name, run in runs.items():
            if spent[name] < SECONDS:
                start = time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
                fastest[name] = min(fastest[name], elapsed)
                spent[name] += elapsed
    return fastest


def _keyed_draw(key: PRNGKeyArray, shape: tuple[int, ...]) -> Query:
    std = jnp.sqrt(float32(LENGTH))
    return lambda i, t0, t1: jr.normal(jr.fold_in(key, i), shape, float32) * std


def _brownian_interval(key: PRNGKeyArray, shape: tuple[int, ...]) -> Query:
    struct = jax.ShapeDtypeStruct(shape, float32)
    path = BrownianInterval(float32(0), float32(1), struct, key, dt=float32(LENGTH))
    return lambda i, t0, t1: path.evaluate(t0, t1)


def _virtual_brownian_tree(key: PRNGKeyArray, shape: tuple[int, ...]) -> Query:
    struct = jax.ShapeDtypeStruct(shape, float32)
    path = diffrax.VirtualBrownianTree(
        float32(0), float32(1), tol=1e-6, shape=struct, key=key
    )
    return lambda i, t0, t1: path.evaluate(t0, t1)


# How each makes queries, where these start, in units of their length, and its colour.
PROGRAMS: dict[str, tuple[MakeQuery, float, str]] = {
    "VirtualBrownianTree,\ntolerance 1e-6": (_virtual_brownian_tree, 0.37, BLUE),
    "BrownianInterval,\noff its grid": (_brownian_interval, 0.37, ORANGE),
    "BrownianInterval,\na cell of its grid": (_brownian_interval, 0.0, GREEN),
    "keyed draw": (_keyed_draw, 0.0, "black"),
}


def draw_cost(out: Path, times: dict[str, list[float]]) -> None:
    """The time of a query against the size of the shape."""
    fig, ax = plt.subplots(figsize=(7.2, 4.3), layout="constrained")
    falling = sorted(times.items(), key=lambda item: -item[1][-1])
    ends = _spread([x[-1] for _, x in falling], 3.0)
    for (name, x), end in zip(falling, ends, strict=True):
        colour = PROGRAMS[name][2]
        style = "--" if name == "keyed draw" else "-"
        ax.loglog(list(SIZES), x, color=colour, ls=style, marker="o", ms=4, lw=1.8)
        ax.text(1.35 * max(SIZES), end, name, color=colour, va="center")
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    ax.set(xlabel="numbers in an increment", ylabel="time of a query, µs")
    ax.set(xlim=(0.8, 1.2 * max(SIZES)), xticks=list(SIZES))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(plain)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color="0.9")
    fig.savefig(out, dpi=160)
    plt.close(fig)


def _spread(values: list[float], ratio: float) -> list[float]:
    """`values`, which fall, moved apart until each is `ratio` times the next."""
    logs = np.log(values)
    step = np.log(ratio)
    for _ in range(100):
        for i in range(len(logs) - 1):
            lack = max(step - (logs[i] - logs[i + 1]), 0.0)
            logs[i] += lack / 2
            logs[i + 1] -= lack / 2
    return [float(x) for x in np.exp(logs)]


if __name__ == "__main__":
    main()
