"""Every public name is documented, and in the docs."""

import inspect
import re
from pathlib import Path

import pytest

import diffrax_sde_adjoint


root = Path(__file__).parent.parent
public = [
    name
    for name, value in vars(diffrax_sde_adjoint).items()
    if not name.startswith("_") and not inspect.ismodule(value)
]


def test_public_names():
    assert set(public) == {
        "StochasticAdjoint",
        "BackwardSDEAdjoint",
        "BrownianInterval",
        "ReversibleHeun",
        "EES25",
        "EES27",
        "Reversible",
        "AbstractReversibleSolver",
        "ito_to_stratonovich",
        "stratonovich_to_ito",
        "path_kl",
        "path_kl_of_shift",
        "forward_sensitivity",
        "clip_lipschitz",
        "lipswish",
        "energy_score",
        "WindowedEnergyScore",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", diffrax_sde_adjoint.__version__)


@pytest.mark.parametrize("name", public)
def test_documented(name):
    value = getattr(diffrax_sde_adjoint, name)
    assert value.__doc__
    if inspect.isclass(value) and not inspect.isabstract(value):
        assert "**Arguments:**" in (value.__init__.__doc__ or "")
    pages = "".join(page.read_text() for page in (root / "docs" / "api").glob("*.md"))
    assert f"::: diffrax_sde_adjoint.{name}\n" in pages
