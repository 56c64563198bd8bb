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


@pytest.mark.slow
def test_dlgm_diffusion_limit(example, tmp_path):
    scores = example("dlgm_diffusion_limit").main(
        steps=50,
        batch=16,
        width=4,
        layers=(2,),
        all_steps=(4, 16, 64),
        measured=((2, 4),),
        out=tmp_path,
    )
    for name in ("2 layers", "SDE"):
        first, last = (scores[f"loss: {x} 10 steps: {name}"] for x in ("first", "last"))
        assert last < 0.95 * first
    # The paper's two estimators are the same; and in the limit, all three.
    distance = lambda name, n: scores[f"distance: {name}: {n} steps"]
    backpropagation, flow, ours = (
        "backpropagation through Euler",
        "stochastic flow, forwards",
        "StochasticAdjoint, reversible Heun",
    )
    for n in (4, 16, 64):
        assert abs(distance(flow, n) - distance(backpropagation, n)) < 1e-4
    assert distance(backpropagation, 64) < 0.5 * distance(backpropagation, 4)
    assert distance(ours, 16) < distance(ours, 4)
    assert (tmp_path / "dlgm_diffusion_limit.png").stat().st_size > 10_000
