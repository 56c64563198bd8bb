"""The latent SDE learns series of a file."""

from pathlib import Path

import numpy as np
import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


def waves(num, times):
    """Two channels of a wave with a phase of its own, with large and small values."""
    rng = np.random.default_rng(0)
    phase = rng.uniform(0, 2 * np.pi, (num, 1)) + times / 3
    values = np.stack([200 + 50 * np.sin(phase), 0.01 * np.cos(phase)], axis=-1)
    values += rng.normal(size=values.shape) * [5, 0.001]
    return values, rng.uniform(size=values.shape) < 0.7


@pytest.mark.slow
def test_latent_sde_of_a_file(example, tmp_path):
    rng = np.random.default_rng(1)
    times = 1e6 + np.sort(rng.uniform(0, 20, 14))
    values, mask = waves(24, times)
    values[3, 5, 0] = np.nan
    path = tmp_path / "waves.npz"
    np.savez(path, values=values, times=times, mask=mask)
    main = example("latent_sde").main
    settings = dict(data=path, batch=16, dim=2, width=16, samples=8, out=tmp_path)
    scores = main(**settings, steps=60, dt=0.5)
    assert scores["loss: last 10 steps"] < 0.7 * scores["loss: first 10 steps"]
    assert all(map(np.isfinite, scores.values()))
    names = {f"CRPS: channel {i}, latent SDE" for i in (0, 1)}
    assert names < set(scores)
    # In the units of the file.
    ratio = np.divide(*(scores[f"RMSE: channel {i}, training"] for i in (0, 1)))
    assert 2500 < ratio < 10_000
    assert (tmp_path / "latent_sde.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="is of a run with"):
        main(**settings, steps=60, dt=0.4, resume=tmp_path / "train_60.eqx")


@pytest.fixture
def task(example, tmp_path):
    """That of a file of arrays."""

    def make(given=None, share=0.2, dt=None, held_out="test", **arrays):
        path = tmp_path / "series.npz"
        np.savez(path, **arrays)
        return example("latent_sde_file").file_task(path, given, share, dt, held_out)

    return make


TIMES = np.array([0.0, 1.0, 1.5, 4.0])


def test_what_the_model_knows_of_a_file(task):
    values = np.arange(5 * 4 * 2, dtype=np.int32).reshape(5, 4, 2)
    mask = np.ones_like(values)
    mask[1, 2, 0] = mask[4, 1, 1] = 0
    made = task(values=values, times=TIMES, mask=mask)
    assert made.given == 2 and made.settings["given"] == 2
    assert np.allclose(made.whole.ts, TIMES * 2.5)
    assert np.allclose(made.ahead.ts, (TIMES[1:] - 1) * 2.5)
    assert (made.whole.steps, made.ahead.steps) == (100, 75)
    # Each of the four series for training, as it is and cut.
    series, start = made.train.choose(np.arange(8))
    assert np.array_equal(series.seen[:4], mask[:4]) and not np.any(start)
    assert np.array_equal(series.seen[4:, :2], mask[:4, :2])
    assert not np.any(series.seen[4:, 2:])
    level = np.where(mask[:4] == 1, values[:4], np.nan)
    level = (level - np.nanmean(level, (0, 1))) / np.nanstd(level, (0, 1))
    assert np.allclose(series.level[:4], np.nan_to_num(level), atol=1e-6)
    series, _ = made.held_out.choose(np.arange(1))
    assert np.array_equal(series.seen[0, :2], mask[4, :2])
    assert not np.any(series.seen[0, 2:])
    finer = task(values=values, times=TIMES, dt=0.01, given=3)
    assert (finer.whole.steps, finer.ahead.steps, finer.given) == (400, 250, 3)


def test_series_are_split_in_their_order(example):
    split = example("latent_sde_file").split
    series = np.arange(10.0).reshape(10, 1, 1)
    for held_out, num, first in (("test", 8, 8), ("validation", 6, 6)):
        train, others = split(series, 0.2, held_out)
        assert np.array_equal(train, series[:num])
        assert np.array_equal(others, series[first : first + 2])


def test_baselines_of_a_file(example):
    module = example("latent_sde_file")
    rng = np.random.default_rng(0)
    walks = np.cumsum(rng.normal(size=(4000, 5, 1)), axis=1)
    walks[2, 0] = np.nan
    held_out = np.array([[7.0], [3.0], [np.nan], [np.nan], [np.nan]])[None]
    data = module.FileData(np.arange(5.0), walks, held_out, 3, *np.ones((2, 1)))
    found = module.baselines(data)
    last, training = found["last value"][:, 0, :, 0], found["training"][:, 0, :, 0]
    assert np.allclose(last.mean(axis=0), 3, atol=0.1)
    assert np.allclose(last.std(axis=0), np.sqrt([1, 2]), rtol=0.05)
    assert np.allclose(training.mean(axis=0), 0, atol=0.15)
    assert np.allclose(training.std(axis=0), np.sqrt([4, 5]), rtol=0.05)


VALUES = np.ones((5, 4, 2))
ill_formed = {
    "no values": (dict(values=None), r"series.npz has no `values`, but \['times'\]"),
    "no times": (dict(times=None), "series.npz has no `times`"),
    "two axes": (dict(values=VALUES[0]), r"\(series, times, channels\), but here"),
    "text": (dict(values=VALUES.astype(str)), "`values` of .* are numbers"),
    "times of each": (
        dict(times=np.ones((5, 4))),
        r"`times` of .* has the shape \(5, 4\), .* it has to be \(4,\)",
    ),
    "a short mask": (
        dict(mask=np.ones((5, 4))),
        r"`mask` of .* the shape \(5, 4\), .* it has to be \(5, 4, 2\)",
    ),
    "a mask of shares": (dict(mask=VALUES / 2), "`mask` of .* is not of True and"),
    "times that stay": (dict(times=np.array([0.0, 1, 1, 2])), "have to increase"),
    "times too near": (dict(times=np.array([0, 1, 1 + 1e-9, 2])), "float32"),
    "no time": (dict(times=np.array([0, 1, np.nan, 2])), "have to increase"),
    "two times": (dict(values=VALUES[:, :2], times=TIMES[:2]), "has 2 `times`"),
    "a channel without values": (
        dict(mask=np.arange(2) * np.ones_like(VALUES)),
        r"has no values for training of channel \[0\]",
    ),
    "nothing to forecast": (
        dict(mask=(np.arange(4) < 2)[:, None] * np.ones_like(VALUES)),
        r"has no values to forecast of channel \[0 1\]",
    ),
    "all given": (dict(given=4), "number of times, 4, but is 4"),
    "one given": (dict(given=1), "`given` is at least 2"),
    "no step": (dict(dt=0.0), "`dt` is positive .* but is 0.0"),
    "a step that is not a number": (dict(dt=np.nan), "`dt` is positive"),
    "a step that is too long": (dict(dt=np.inf), "no longer than a series"),
    "all held out": (dict(share=1.0), "`held_out_share`: 1.0 of 5 series"),
    "none for training": (dict(share=0.6, held_out="validation"), "`held_out_share`"),
}


@pytest.mark.parametrize("name", ill_formed)
def test_ill_formed_files(task, name):
    changed, message = ill_formed[name]
    args = dict(values=VALUES, times=TIMES) | changed
    with pytest.raises(ValueError, match=message):
        task(**{key: x for key, x in args.items() if x is not None})


def test_other_files(example, tmp_path):
    load = example("latent_sde_file").load
    path = tmp_path / "series.npy"
    np.save(path, VALUES)
    with pytest.raises(ValueError, match=r"series\.npy is not a file of `numpy.savez`"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")


def test_program_of_the_docs_writes_such_a_file(example, tmp_path, monkeypatch):
    page = (EXAMPLES.parent / "docs" / "examples" / "latent_sde.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    values, times = example("latent_sde_file").load(tmp_path / "waves.npz")
    assert values.shape == (200, 40, 2) and times.shape == (40,)
    assert abs(np.isnan(values).mean() - 0.3) < 0.02


def test_flags_of_a_file_without_one(example, tmp_path):
    with pytest.raises(ValueError, match="are for `data`"):
        example("latent_sde").main(given=5, out=tmp_path)
