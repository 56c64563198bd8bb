"""What tests of examples share."""

import importlib
from pathlib import Path

import jax
import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _default_dtype():
    """float32, and no float64, as when an example is run."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture
def example(monkeypatch):
    """Imports an example, as if it was run from its folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module
