"""Collects what the benchmarks measure, and prints it at the end as Markdown tables."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest


_Row = dict[str, str]
_tables = pytest.StashKey[dict[str, list[_Row]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tables] = {}


@pytest.fixture
def record_row(pytestconfig: pytest.Config) -> Callable[[str, _Row], None]:
    """Adds a row, from column names to entries, to the table with the given title."""

    def record(title: str, row: _Row) -> None:
        pytestconfig.stash[_tables].setdefault(title, []).append(row)

    return record


@pytest.fixture(autouse=True)
def _default_dtype(request: pytest.FixtureRequest):
    """As for most users: float32, and no float64, but where a test is of that."""
    callspec = getattr(request.node, "callspec", None)
    dtype = callspec.params.get("dtype") if callspec is not None else None
    is_double = dtype == jnp.float64 or "float64" in request.keywords
    jax.config.update("jax_enable_x64", is_double)
    yield
    jax.config.update("jax_enable_x64", True)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for title, rows in config.stash[_tables].items():
        terminalreporter.section(title)
        for line in _markdown(rows):
            terminalreporter.write_line(line)


def _markdown(rows: list[_Row]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns] + [[row.get(column, "") for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    # The first column names the row, the others are numbers.
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = [cells[0], rule, *cells[1:]]
    return [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
