"""The examples learn, and continue from their checkpoints."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def example(monkeypatch):
    """Imports an example, as if it was run from its folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    return importlib.import_module


def test_latent_sde(example, tmp_path):
    # The scores of a run depend on the weights it ends with, on all held-out days.
    latent_sde = example("latent_sde")
    small = dict(steps=60, batch=8, dim=2, width=8, samples=4)
    scores = latent_sde.main(**small, out=tmp_path / "whole")
    assert scores["loss: last 10 steps"] < 0.5 * scores["loss: first 10 steps"]
    assert (tmp_path / "whole" / "latent_sde.png").stat().st_size > 10_000

    checkpoint = tmp_path / "whole" / "checkpoint_30.eqx"
    resumed = latent_sde.main(**small, out=tmp_path / "resumed", resume=checkpoint)
    final = "checkpoint_60.eqx"
    for path in (tmp_path / "whole" / final, tmp_path / "resumed" / final):
        assert path.exists()
    assert (tmp_path / "whole" / final).read_bytes() == (
        tmp_path / "resumed" / final
    ).read_bytes()
    del scores["loss: first 10 steps"], resumed["loss: first 10 steps"]
    assert resumed == scores

    with pytest.raises(ValueError, match="is of a run with"):
        latent_sde.main(**small, seed=1, out=tmp_path, resume=checkpoint)
