"""The examples learn."""

import ast
import re
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from diffrax import DirectAdjoint, Midpoint
from helpers import by_default_unless

from diffrax_sde_adjoint import ReversibleHeun, StochasticAdjoint


EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("neural_sde", "heston", "neural_cde")


@pytest.mark.parametrize("name", SHORT)
def test_short_programs_are_short(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 70
    others = {path.stem for path in EXAMPLES.glob("*.py")}
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {x.name for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert "diffrax_sde_adjoint" in imported and not imported & others
    page = EXAMPLES.parent / "docs" / "examples" / f"{name}.md"
    assert f"--8<--\n{name}.py\n--8<--\n" in page.read_text()


def flags(path):
    """Those of an example, with their descriptions, as tyro and argparse find them."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ".add_argument"
        ):
            helps = [ast.unparse(x.value) for x in node.keywords if x.arg == "help"]
            yield ast.literal_eval(node.args[0]), next(iter(helps), None)
    for main in tree.body:
        if not isinstance(main, ast.FunctionDef) or main.name != "main":
            continue
        text = ast.get_docstring(main) or ""
        described = dict(
            re.findall(r"^    (\w+): (\S.*)$", text.partition("Args:\n")[2], re.M)
        )
        args = main.args.args + main.args.kwonlyargs
        for arg in args:
            yield arg.arg, described.get(arg.arg)
        # A comment above it describes a field of a tuple of settings.
        nodes = (x for arg in args for x in ast.walk(arg))
        names = {x.id for x in nodes if isinstance(x, ast.Name)}
        lines = path.read_text().splitlines()
        for record in tree.body:
            if isinstance(record, ast.ClassDef) and record.name in names:
                for field in record.body:
                    if isinstance(field, ast.AnnAssign):
                        above = lines[field.lineno - 2].strip()
                        comment = above if above.startswith("#") else None
                        yield f"{record.name}.{ast.unparse(field.target)}", comment


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda x: x.stem)
def test_every_flag_has_a_description(path):
    without = [flag for flag, description in flags(path) if not description]
    assert not without, f"{path.name} does not describe {', '.join(without)}"


def test_flags_without_a_description_are_found(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "class Recipe:\n    # Some.\n    a: int = 0\n    b: int = 0\n\n\n"
        "def main(recipe: Recipe, *, steps: int = 1, seed: int = 0):\n"
        '    """Train.\n\n    Args:\n        recipe: how.\n        steps: some.\n'
        '    """\n'
        'parser.add_argument("--process")\n'
    )
    found = dict(flags(path))
    assert {x for x, y in found.items() if y is None} == {
        "seed",
        "Recipe.b",
        "--process",
    }
    assert found["steps"] == "some." and len(found) == 6


@pytest.fixture
def printed(example, capsys):
    """The numbers in each line that a short program prints."""

    def numbers(name, **settings):
        with jax.numpy_dtype_promotion("standard"):  # optax is not made for "strict"
            example(name).main(**settings)
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(
            r"a gradient: [0-9.]+ ms; by diffrax's default: [0-9.]+ ms", lines[-1]
        )
        number = r"-?[0-9]+\.[0-9]*(?:e[+-]?[0-9]+)?"
        return [[float(x) for x in re.findall(number, line)] for line in lines]

    return numbers


@pytest.mark.slow
def test_short_neural_sde(printed):
    *losses, generated, other, _ = printed("neural_sde", steps=50, batch=32)
    first, last = losses[0][0], losses[-1][0]
    assert last < 0.5 * first
    assert other[0] < generated[0] < 0.5 * first


def heston_call(s0, v0, xi, rho, *, strike=1.0, kappa=2.0, theta=0.04, t1=1.0):
    """By an integral of the characteristic function, as in Lewis 2001, "A simple option
    formula for general jump-diffusion and other exponential Lévy processes".
    """
    u = np.arange(0.005, 200, 0.01)
    z = 0.5 + 1j * u
    b = kappa - rho * xi * z
    d = np.sqrt(b**2 + xi**2 * (z - z**2))
    g, decay = (b - d) / (b + d), np.exp(-d * t1)
    of_theta = (b - d) * t1 - 2 * np.log((1 - g * decay) / (1 - g))
    of_v0 = (b - d) * (1 - decay) / (1 - g * decay)
    exponent = (kappa * theta * of_theta + v0 * of_v0) / xi**2
    wave = np.exp(exponent + 1j * u * np.log(s0 / strike)).real
    integral = 0.01 * np.sum(wave / (u**2 + 0.25))
    return s0 - np.sqrt(s0 * strike) * integral / np.pi


def test_closed_form_of_a_call():
    # Of Black and Scholes, where the variance hardly varies.
    volatility = 0.2
    norm = scipy.stats.norm
    exact = 2 * norm.cdf(volatility / 2) - 1
    assert abs(heston_call(1.0, 0.04, 1e-3, 0.0) - exact) < 1e-6


@pytest.mark.slow
def test_short_heston(printed):
    greeks, fitted, _ = printed("heston", paths=4096, steps=1)
    xi, rho = 0.3, -0.7
    call = lambda s0, root: heston_call(s0, root**2, xi, rho)
    delta = (call(1.001, 0.2) - call(0.999, 0.2)) / 0.002
    vega = (call(1.0, 0.201) - call(1.0, 0.199)) / 0.002
    for found in (greeks[:2], greeks[2:]):
        assert found == pytest.approx([delta, vega], rel=0.05)
    assert greeks[:2] == pytest.approx(greeks[2:], rel=0.01)
    true = [1, 0.2, xi * rho, xi * (1 - rho**2) ** 0.5]
    assert fitted[4:] == pytest.approx(true, rel=1e-2)
    # A step of Adam, towards them.
    assert fitted[:3] == pytest.approx([1, 0.2, -0.1], abs=1e-3)


@pytest.mark.long
def test_short_heston_fits(printed):
    _, fitted, _ = printed("heston", paths=4096, steps=80)
    found, true = np.split(np.array(fitted), 2)
    assert np.all(np.abs(found - true)[:3] < [1e-6, 0.02, 0.05])
    # Prices of one maturity tell little of the last, and nothing of its sign: it comes
    # closer than the 0.5 that it starts with.
    assert abs(abs(found[3]) - true[3]) < 0.2


@pytest.mark.slow
def test_short_neural_cde(printed):
    *losses, accuracy, _ = printed("neural_cde", steps=60, batch=32)
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert accuracy[0] > 0.9


def test_training_continues_from_a_checkpoint(example, tmp_path):
    common = example("common")
    settings = dict(decay=0.9, shape=(2, 3))

    def step(state, i):
        state = 0.9 * state + jr.normal(jr.key(i), state.shape)
        return state, jnp.mean(state)

    start = jnp.zeros(3)
    whole, losses = common.train(step, start, 8, settings, tmp_path)
    assert losses.shape == (8,)
    resume = tmp_path / "train_4.eqx"
    resumed, later = common.train(step, start, 8, settings, tmp_path, resume)
    assert jnp.array_equal(resumed, whole)
    assert np.array_equal(later, losses)
    with pytest.raises(ValueError, match="is of a run with"):
        common.train(step, start, 8, dict(decay=0.5), tmp_path, resume)


@pytest.mark.slow
def test_latent_sde(example, tmp_path):
    scores = example("latent_sde").main(
        steps=30, batch=8, dim=2, width=8, samples=2, out=tmp_path
    )
    assert scores["loss: last 10 steps"] < 0.85 * scores["loss: first 10 steps"]
    assert (tmp_path / "latent_sde.png").stat().st_size > 10_000
    assert (tmp_path / "train_30.eqx").exists()


def sines(num, angles):
    """Forty frames of angles that each have a phase of their own."""
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, (num, 1, angles))
    return 6 * np.sin(0.3 * np.arange(40)[:, None] + phase).astype(np.float32)


@pytest.mark.slow
def test_latent_sde_mocap(example, tmp_path, monkeypatch):
    mocap = example("latent_sde_mocap")
    shapes = eqx.filter_eval_shape(mocap.LatentSDE, 3, jr.key(0))
    arrays, _ = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    assert sum(x.size for x in jax.tree.leaves(arrays)) == 11_605
    monkeypatch.setattr(mocap, "SAMPLES", 8)

    walks = sines(11, mocap.ANGLES)
    split = dict(train=walks[:4], validation=walks[4:7], test=walks[7:])
    monkeypatch.setattr(mocap, "load", lambda path: split)
    settings = dict(data=tmp_path, held_out="test", out=tmp_path)
    recipe = mocap.OURS._replace(windows=((60, 10),))
    scores = mocap.main(recipe, **settings)
    assert scores["loss: last 10 steps"] < scores["loss: first 10 steps"] - 0.1
    assert np.isfinite(scores["MSE"])
    assert (tmp_path / "latent_sde_mocap.png").stat().st_size > 10_000

    (tmp_path / "seed_0_split_0_60.eqx").unlink()  # so from step 45
    assert mocap.main(recipe, **settings, resume=True) == scores
    with pytest.raises(ValueError, match="is of a run with"):
        mocap.main(recipe._replace(warp=0.1), **settings, resume=True)


@pytest.mark.slow
def test_latent_ode_mocap_in_the_second_set_up(example, tmp_path, monkeypatch):
    mocap = example("latent_sde_mocap")
    walks = sines(7, mocap.ANGLES)
    split = dict(train=walks[:4].copy(), test=walks[4:])
    split["train"][:, 30:] = np.nan  # hidden in training
    monkeypatch.setattr(mocap, "load", lambda path: split)
    small = dict(given=10, known=30, windows=((60, 16),))
    recipe = mocap.SECOND._replace(kind="ode", **small)
    scores = mocap.main(recipe, data=tmp_path, held_out="test", out=tmp_path)
    assert scores["loss: last 10 steps"] < scores["loss: first 10 steps"] - 0.1
    assert np.isfinite(scores["MSE"])
    assert 0 < scores["standard deviation of samples"]
    assert (tmp_path / "latent_sde_mocap.png").stat().st_size > 10_000


@pytest.mark.slow
def test_mocap_by_energy_scores(example, tmp_path, monkeypatch):
    mocap = example("latent_sde_mocap")
    walks = sines(7, mocap.ANGLES)
    monkeypatch.setattr(
        mocap, "load", lambda path: dict(train=walks[:4], test=walks[4:])
    )
    recipe = mocap.ENERGY._replace(windows=((60, 20),))
    scores = mocap.main(recipe, data=tmp_path, held_out="test", out=tmp_path)
    assert scores["loss: last 10 steps"] < 0.9 * scores["loss: first 10 steps"]
    assert scores["standard deviation of samples"] > 0
    assert scores["standard deviation of observations"] == pytest.approx(
        scores["standard deviation of samples"], rel=1e-5
    )


def test_cross_validation(example, tmp_path, monkeypatch):
    mocap = example("latent_sde_mocap")
    level = np.arange(8, dtype=np.float32)
    walks = np.broadcast_to(level[:, None, None], (8, 20, mocap.ANGLES))
    monkeypatch.setattr(mocap, "load", lambda path: dict(train=walks))
    # A model that predicts the mean of what it was trained on, and one more or less
    # by its seed.
    monkeypatch.setattr(
        mocap,
        "train_model",
        lambda x, recipe, key, settings, *_: (
            x.mean() + (1 if settings["name"].startswith("seed_0") else -1),
            np.ones(2),
        ),
    )

    def predict(model, given, num_frames, *_):
        shape = (mocap.SAMPLES, len(given), num_frames, mocap.ANGLES)
        return np.broadcast_to(model, shape), np.zeros(shape)

    monkeypatch.setattr(mocap, "predict", predict)
    scores = mocap.main(data=tmp_path, out=tmp_path, seeds=(0, 1))
    seen = [level[level % 4 != i % 4].mean() for i in range(8)]
    of_mean = np.mean((level - seen) ** 2)
    assert scores["MSE"] == pytest.approx(of_mean + 1)
    assert scores["MSE of means of samples"] == pytest.approx(of_mean + 1)
    assert scores["MSE of the mean of seeds"] == pytest.approx(of_mean)
    assert scores["standard deviation of observations"] == pytest.approx(1)
    inside = np.abs(level - seen + 1) < 1.96
    assert scores["data in 95% bands"] == pytest.approx(np.mean(inside))


@pytest.mark.slow
def test_latent_ode_mocap_by_the_recipe_of_the_paper(example, tmp_path, monkeypatch):
    mocap = example("latent_sde_mocap")
    walks = np.random.default_rng(0).normal(size=(8, 20, mocap.ANGLES))
    split = dict(train=walks.astype(np.float32))
    monkeypatch.setattr(mocap, "load", lambda path: split)
    recipe = mocap.PAPER._replace(kind="ode", windows=((20, 20),))
    out = dict(data=tmp_path, out=tmp_path)
    scores = mocap.main(recipe, **out, seeds=(0, 1))
    assert scores["loss: last 10 steps"] < scores["loss: first 10 steps"]
    assert scores["MSE: +- over seeds"] > 0
    with pytest.raises(ValueError, match="`windows`: there are 20 frames, not 21"):
        mocap.main(recipe._replace(windows=((2, 21),)), **out)


def test_motion_capture_data_are_checked(example, tmp_path):
    path = tmp_path / "mocap35.mat"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"`data`: .* is not `mocap35.mat`"):
        example("latent_sde_mocap").load(path)


def test_windows_are_played_faster_or_slower(example):
    window = example("latent_sde_mocap").window
    ramp = jnp.arange(300, dtype=jnp.float32)[None, :, None]
    ramps = jnp.broadcast_to(ramp, (100, 300, 2))
    assert jnp.allclose(window(ramps, 300, 0.0, jr.key(0)), ramps)
    parts = window(ramps, 60, 0.1, jr.key(0))
    speed = jnp.diff(parts, axis=1)
    assert jnp.allclose(speed, speed[:, :1], atol=1e-4)
    assert 0.9 <= speed.min() < 0.92 and 1.08 < speed.max() <= 1.1001
    assert 0 <= parts.min() < 10 and 289 < parts.max() <= 299
    # There are no more than 300 frames to be played faster.
    parts = window(ramps, 290, 0.1, jr.key(0))
    assert parts.min() >= 0 and parts.max() <= 299.001


@pytest.mark.parametrize(
    "process",
    by_default_unless(lambda _: True, ("lorenz", "gbm"), long=("gbm",)),
)
def test_latent_sde_synthetic(example, tmp_path, process):
    scores = example("latent_sde_synthetic").main(
        process=process, steps=80, batch=8, observed=0.5, out=tmp_path
    )
    assert scores["loss: last 10 steps"] < 0.5 * scores["loss: first 10 steps"]
    assert (tmp_path / f"{process}.png").stat().st_size > 10_000


def test_processes(example):
    synthetic = example("latent_sde_synthetic")
    lorenz, gbm = (synthetic.PROCESSES[name] for name in ("lorenz", "gbm"))
    y = gbm.sample(4096, gbm.times, jr.key(0))
    assert y.shape == (4096, 51, 1)
    assert abs(jnp.mean(y[:, 0]) - 0.1) < 4 * 0.03 / 64
    assert abs(jnp.std(y[:, 0]) - 0.03) < 4 * 0.03 / 64
    log = jnp.log(jnp.abs(y[:, -1] / y[:, 0]))  # normal, of these moments
    assert abs(jnp.mean(log) - (1 - 0.125)) < 4 * 0.5 / 64
    assert abs(jnp.std(log) - 0.5) < 4 * 0.5 / 64
    y = jax.jit(lorenz.sample, static_argnums=(0, 1))(64, 41, jr.key(0))
    assert y.shape == (64, 41, 3)
    assert 20 < y[:, -10:, 2].mean() < 30
    fixed = jnp.array([[72**0.5, 72**0.5, 27]])
    assert jnp.allclose(synthetic._lorenz_drift(0.0, fixed, None), 0, atol=1e-4)


def test_energy_distance(example):
    energy_distance = example("latent_sde_synthetic").energy_distance
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 300, 5))
    distance, bound = energy_distance(x, y)
    assert abs(distance) < 2 * bound
    many = [energy_distance(*rng.normal(size=(2, 5, 2)))[0] for _ in range(400)]
    assert abs(np.mean(many)) < 4 * scipy.stats.sem(many)  # no bias
    # Of normal distributions a distance `d` apart, in one dimension:
    # 2 E|d + sqrt(2) z| - 2 E|sqrt(2) z|.
    x, y = rng.normal(size=(2, 2000, 1))
    d = 1.0
    norm = scipy.stats.norm
    folded = 2 * norm.pdf(d / 2**0.5) * 2**0.5 + d * (2 * norm.cdf(d / 2**0.5) - 1)
    exact = 2 * folded - 4 / np.pi**0.5
    distance, bound = energy_distance(x, y + d)
    assert abs(distance - exact) < 0.1 * exact
    assert bound < 0.02 * exact


@pytest.mark.parametrize(
    "measured",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(((2, 4), (2, 64)), marks=pytest.mark.long),
    ],
)
def test_dlgm_diffusion_limit(example, tmp_path, measured):
    scores = example("dlgm_diffusion_limit").main(
        steps=50,
        batch=16,
        width=4,
        layers=(2,),
        all_steps=(4, 16, 64),
        measured=measured,
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


@pytest.mark.slow
def test_neural_sde_score(example, tmp_path):
    scores = example("neural_sde_score").main(
        data="ou",
        windows=4,
        steps=60,
        batch=64,
        generated=32,
        metric_steps=5,
        samples=100,
        out=tmp_path,
    )
    assert all(map(np.isfinite, scores.values()))
    assert scores["loss: last 10 steps"] < 0.9 * scores["loss: first 10 steps"]
    mmd = lambda kind: scores[f"MMD^2 of marginals: {kind}"]
    assert mmd("generator") < 0.3 * mmd("untrained")
    assert (tmp_path / "ou.png").stat().st_size > 10_000


@pytest.mark.slow
def test_neural_sde_score_of_channels_with_gaps(example, tmp_path):
    scores = example("neural_sde_score").main(
        data="shares",
        missing=0.3,
        averaged=True,
        windows=2,
        steps=4,
        batch=32,
        generated=16,
        held_out="validation",
        metric_steps=2,
        samples=20,
        out=tmp_path,
    )
    assert all(map(np.isfinite, scores.values()))
    assert (tmp_path / "shares_1.png").stat().st_size > 10_000


@pytest.mark.parity
def test_neural_sde_score_by_signature_kernels(example, tmp_path):
    scores = example("neural_sde_score").main(
        data="ou",
        signature_kernel=12.0,
        learning_rate=1e-2,
        steps=30,
        batch=16,
        generated=16,
        metric_steps=2,
        samples=100,
        out=tmp_path,
    )
    assert scores["loss: last 10 steps"] < -10  # That of a constant is -1.


def test_signature_kernels_need_all_values(example, tmp_path):
    with pytest.raises(ValueError, match="`signature_kernel` takes no series with"):
        example("neural_sde_score").main(
            signature_kernel=12.0, missing=0.3, out=tmp_path
        )


@pytest.mark.slow
def test_averaged_generator(example):
    """Its values are of all times until the next one: here, means of straight lines."""
    models = example("neural_de")

    @eqx.filter_jit
    def series(steps_per_time, is_averaged):
        model = models.Generator(
            1,
            5,
            jr.key(0),
            steps_per_time=steps_per_time,
            is_averaged=is_averaged,
            sees_time=False,
        )
        of = lambda x: (x.sde.drift, x.sde.field, x.sde.readout.weight)
        drift, field, weight = of(model)
        drift, field = (models.scaled(x, 0.0) for x in (drift, field))
        bias = lambda x: x.layers[-1].bias
        drift = eqx.tree_at(bias, drift, jnp.linspace(-1, 1, 16, dtype=jnp.float32))
        weight = jnp.tile(jnp.linspace(1, 2, 16), weight.shape[1] // 16)
        weight = weight / (2 if is_averaged else 1)
        model = eqx.tree_at(of, model, (drift, field, weight[None]))
        model = eqx.tree_at(lambda x: x.sde.readout.bias, model, jnp.zeros(1))
        return model(3, jr.key(1))[..., 0]

    for steps_per_time in (1, 2):
        line, means = (series(steps_per_time, x) for x in (False, True))
        assert line.shape == means.shape == (3, 5)
        slope = line[:, 1:] - line[:, :-1]
        assert np.all(np.abs(slope) > 1e-3)
        assert np.allclose(slope, slope[0, 0], rtol=1e-3)
        assert np.allclose(means, line + 0.5 * slope[0, 0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_sde_gan(example, tmp_path):
    scores = example("sde_gan").main(
        data="ou",
        steps=60,
        batch=64,
        learning_rates=(2e-3, 2e-3),
        metric_steps=5,
        samples=100,
        out=tmp_path,
    )
    assert all(map(np.isfinite, scores.values()))
    mmd = lambda kind: scores[f"MMD^2 of marginals: {kind}"]
    assert mmd("generator") < 0.3 * mmd("untrained")
    assert (tmp_path / "ou.png").stat().st_size > 10_000


@pytest.mark.slow
def test_sde_gan_with_a_penalty_and_the_recipe_of_the_paper(example, tmp_path):
    gan = example("sde_gan")
    settings = dict(
        recipe="paper",
        held_out="validation",
        solver="midpoint",
        penalty=1e5,
        steps=40,
        batch=16,
        learning_rates=(1e-6, 1e-3),
        metric_steps=2,
        samples=20,
        out=tmp_path,
    )
    scores = gan.main(**settings)
    assert np.isfinite(scores["loss: last 10 steps"])
    resumed = gan.main(**settings, resume=tmp_path / "train_20.eqx")
    assert resumed == scores


def test_averages_of_generators(example):
    gan = example("sde_gan")
    models = jr.normal(jr.key(0), (7, 3), jnp.float32)
    average = jnp.zeros(3, jnp.float32)
    for i, model in enumerate(models):
        average = gan.mean_of_models(average, model, jnp.asarray(i - 3))
        assert i > 3 or jnp.allclose(average, model, rtol=1e-5)
    assert jnp.allclose(average, models[3:].mean(axis=0), rtol=1e-6)


def test_series(example):
    series = example("series")
    y = series.ornstein_uhlenbeck(4096, 0)[..., 0]
    t = np.arange(64)
    mean = 0.2 * t - 2 + 2 * np.exp(-0.1 * t)
    var = np.exp(-0.2 * t) / 3 + 0.4**2 * (1 - np.exp(-0.2 * t)) / 0.2
    assert np.all(np.abs(y.mean(axis=0) - mean) < 4.5 * np.sqrt(var / 4096))
    assert np.all(np.abs(y.var(axis=0) / var - 1) < 4.5 * np.sqrt(2 / 4096))
    lag = np.mean((y[:, 40] - mean[40]) * (y[:, 30] - mean[30]))
    assert abs(lag / (np.exp(-1) * var[30]) - 1) < 0.25

    for name, channels in (("glucose", 1), ("shares", 2)):
        split = getattr(series, f"{name.rstrip('s')}_windows")()
        sizes = {part: len(x) for part, x in split.items()}
        assert sizes["train"] > 2 * sizes["test"] > 3 * sizes["validation"] > 1000
        parts = []
        for x in split.values():
            assert x.shape[1:] == (64, channels) and np.isfinite(x).all()
            # Four hours of readings, or 16 days, are found in one part only. (A price
            # is relative to the start of its window, a range is not.)
            ends = (w.tobytes() for y in x[..., -1] for w in (y[:16], y[-16:]))
            parts.append(set(ends))
            assert len(parts[-1]) < 1.9 * len(x)  # windows overlap
        assert sum(map(len, parts)) == len(set.union(*parts))
        start = series.load(name, "test").train[:, 0]
        assert np.all(np.abs(start.mean(axis=0)) < 1e-4)
        assert np.all(np.abs(start.std(axis=0) - 1) < 1e-4)


@pytest.mark.slow
def test_a_clipped_critic_is_lipschitz(example, monkeypatch):
    """Its networks are, and so the critic never magnifies the distance of two paths by
    more than what follows step by step.
    """
    gan = example("sde_gan")
    monkeypatch.setattr(gan, "TIMES", 3)
    critic = eqx.filter_jit(gan.make_critic)(1, jr.key(0))
    names = ("initial", "drift", "field", "readout")
    hidden = critic.readout.in_features
    scaled = lambda model, scale: jax.tree.map(
        lambda x: scale * x if eqx.is_array(x) else x, model
    )
    large = gan.clip_lipschitz(scaled(critic, 40.0))
    # Weights as large as they may be, and biases where activations are steep.
    steep = gan.clip_lipschitz(
        jax.tree.map(lambda x: jnp.ones_like(x) if eqx.is_array(x) else x, critic)
    )
    for name in names[:3]:
        biases = lambda model, name=name: [x.bias for x in getattr(model, name).layers]
        first, last = biases(steep)
        values = [jnp.full_like(first, 2.4), jnp.full_like(last, -2.2)]
        steep = eqx.tree_at(biases, steep, values)

    keys = jr.split(jr.key(1), 5)

    def slope(network):
        layers = getattr(network, "layers", [network])
        shape = (1000, layers[0].weight.shape[1])
        x = 0.3 * jr.normal(keys[0], shape, jnp.float32)
        size = 10 ** jr.uniform(keys[1], (1000, 1), jnp.float32, -1, 1)
        y = x + size * jr.uniform(keys[2], shape, jnp.float32, 0.5, 1)
        moved = jnp.abs(jax.vmap(network)(x) - jax.vmap(network)(y)).sum(axis=1)
        return jnp.max(moved / jnp.abs(x - y).sum(axis=1))

    for name in names:
        assert slope(getattr(large, name)) <= 1.001
        assert 0.6 < slope(getattr(steep, name)) <= 1.001
        first = lambda network: getattr(network, "layers", [network])[0].weight
        wrong = eqx.tree_at(first, getattr(steep, name), replace_fn=lambda x: 2 * x)
        assert slope(wrong) > 1.1

    x = jnp.cumsum(0.1 * jr.normal(keys[3], (512, 3, 1), jnp.float32), axis=1)
    size = 10 ** jr.uniform(keys[4], (256, 1, 1), jnp.float32, -3, 0)
    shift = jnp.broadcast_to(size, (256, 3, 1))
    change = size * jr.normal(keys[0], shift.shape, jnp.float32)
    change = jnp.concatenate([shift, change])  # some move as a whole

    def bound(x, change):
        start, step, step_change = jnp.abs(change[0]), jnp.diff(x), jnp.diff(change)
        y = yhat = start
        for s, d in jnp.abs(jnp.stack([step, step_change], axis=-1)):
            # Of the vector field times the step, at a distance of the states.
            apart = lambda distance, s=s, d=d: (1 + s) * distance + hidden * d
            before = apart(yhat)
            yhat = 2 * y + yhat + before
            y = y + 0.5 * (before + apart(yhat))
        return start + y

    bounds = jax.vmap(bound)(x[..., 0], change[..., 0])

    @eqx.filter_jit
    def part_of_bound(critic):
        distance = gan.criticise(critic, x + change) - gan.criticise(critic, x)
        return jnp.max(jnp.abs(distance) / bounds)

    assert part_of_bound(large) <= 1
    assert 0.3 < part_of_bound(steep) <= 1
    for name in ("initial", "readout"):  # The others end in tanh.
        part = lambda model, name=name: getattr(model, name)
        wrong = eqx.tree_at(part, steep, scaled(part(steep), 8.0))
        assert part_of_bound(wrong) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver, reference",
    [
        (ReversibleHeun(), diffrax.ReversibleHeun()),
        (Midpoint(), Midpoint()),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_penalty_gradient(example, monkeypatch, solver, reference):
    """It is that of reverse over reverse mode, of an adjoint that can do so."""
    gan = example("sde_gan")
    monkeypatch.setattr(gan, "TIMES", 4)
    critic = eqx.filter_jit(gan.make_critic)(1, jr.key(0))
    critic = jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, critic)
    series = jr.normal(jr.key(1), (3, 4, 1), jnp.float32)

    def penalty(critic):
        method = gan.Method(reference, DirectAdjoint())
        total = lambda series: jnp.sum(gan.criticise(critic, series, method))
        norm = jnp.sqrt(jnp.sum(jax.grad(total)(series) ** 2, axis=(1, 2)))
        return 10 * jnp.mean((norm - 1) ** 2)

    expected = eqx.filter_jit(eqx.filter_grad(penalty))(critic)
    method = gan.Method(solver, StochasticAdjoint(checkpoint_every=2))
    found = eqx.filter_jit(gan.penalty_gradient)(critic, series, 10.0, method)
    # Of a bias that has no part in it, there is none.
    found = eqx.apply_updates(jax.tree.map(jnp.zeros_like, expected), found)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.allclose(a, b, rtol=1e-3, atol=1e-4 * jnp.max(jnp.abs(b)))
    assert jnp.max(jnp.abs(found.field.layers[0].weight)) > 1e-3


@pytest.mark.slow
def test_series_metrics(example):
    metrics = example("series_metrics")
    rng = np.random.default_rng(0)
    walks = np.cumsum(rng.normal(size=(3, 600, 20, 1)), axis=2).astype(np.float32)
    x, y, z = walks
    drifting = 0.8 * np.arange(20, dtype=np.float32)[:, None]

    # Of a straight line from zero, a term of the signature is a product of lengths,
    # by the factorial of their number.
    line = np.linspace(0, 2, 20)[None, :, None]
    terms = metrics.signatures(line)[0]
    assert len(terms) == 2 + 4 + 8 + 16 + 32
    assert np.allclose(terms[:6], [1, 2, 0.5, 1, 1, 2], atol=1e-12)
    assert np.isclose(terms[-1], 2**5 / 120)
    # A constant goes up first, and time passes later.
    terms = metrics.signatures(np.full((1, 9, 1), 3.0))[0]
    assert np.allclose(terms[:6], [1, 3, 0.5, 0, 3, 4.5])

    # Two samples of a distribution, and another one.
    for metric in (metrics.marginal_mmd, metrics.signature_mmd):
        assert abs(metric(x, y)) < 0.2 * metric(x + drifting, y)
    # A normal distribution of mean `d`, and kernels of the width of another one.
    d, num = 1.5, 2000
    normal = rng.normal(size=(2, num, 6, 1))
    exact = 2 / 3**0.5 * (1 - np.exp(-(d**2) / 6))
    assert abs(metrics.marginal_mmd(normal[0] + d, normal[1]) - exact) < 0.02

    assert metrics.ks_rejections(x, y, 0) < 0.12
    assert metrics.ks_rejections(x + drifting, y, 0) > 0.6
    both = np.concatenate([x, 5 * x], axis=-1)
    assert metrics.ks_rejections(both, np.concatenate([y, y], axis=-1), 0) > 0.3
    assert metrics.novelty(x[:100] + 1e-3, y, x) < 0.01
    assert 0.9 < metrics.novelty(z, y, x) < 1.1

    alike = metrics.classification_accuracy(
        (x[:300], y[:300]), (x[300:], y[300:]), 60, 0
    )
    assert 0.4 < alike < 0.6
    differ = (x[:300], y[:300] + drifting), (x[300:], y[300:] + drifting)
    assert metrics.classification_accuracy(*differ, 60, 0) > 0.8
    label = np.repeat([0, 1], 300)
    labelled = lambda x, slope: (x + slope * label[:, None, None] * drifting, label)
    found = lambda *both: metrics.label_accuracy(*both, 60, 0)
    assert 0.4 < found(labelled(x, 0), labelled(y, 0)) < 0.6
    assert found(labelled(x, 1), labelled(y, 1)) > 0.8
    # What comes next is learned from series that also drift, not from others.
    loss = lambda train: metrics.prediction_loss(train, z + drifting, 150, 0)
    assert loss(x + drifting) < 0.8 * loss(x - drifting)

    other = metrics.gaussian_increments(x, 5000, 0)
    assert np.allclose(other.mean(axis=0), x.mean(axis=0), atol=0.5)
    spread = np.diff(other, axis=1).std(axis=0)
    assert np.allclose(spread, np.diff(x, axis=1).std(axis=0), rtol=0.1)


def air_days(rng, num):
    """Days of sines whose phase depends on the station, and a random walk on them."""
    station = np.arange(num) % 12
    phase = 0.5 * station[:, None] + 2 * np.pi * np.arange(24) / 24
    wave = np.stack([np.sin(phase), np.cos(phase)], axis=-1)
    walk = 0.2 * np.cumsum(rng.normal(size=wave.shape), axis=1)
    return (wave + walk).astype(np.float32), station


@pytest.mark.slow
def test_latent_sde_air(example, tmp_path, monkeypatch):
    air = example("latent_sde_air")
    rng = np.random.default_rng(0)
    parts = {name: air.Days(*air_days(rng, 60)) for name in ("train", "test")}
    monkeypatch.setattr(air, "load", lambda folder: parts)
    # These have tests of their own.
    for name in ("classification_accuracy", "label_accuracy", "prediction_loss"):
        monkeypatch.setattr(air, name, lambda *_: 0.5)
    monkeypatch.setattr(air, "reconstruct", lambda _, values, *__: values)
    settings = dict(data=tmp_path, out=tmp_path)
    scores = air.main(
        **settings, hours=12, missing=0.3, steps=40, batch=16, samples=20, timed=0
    )
    assert all(map(np.isfinite, scores.values()))
    assert scores["loss: last 10 steps"] < 0.5 * scores["loss: first 10 steps"]
    errors = (
        scores[f"error of hidden hours: {x}"] for x in ("posterior", "interpolation")
    )
    assert len(set(errors)) == 1
    assert (tmp_path / "latent_sde_air.png").stat().st_size > 10_000
    assert (tmp_path / "train_40.eqx").exists()
    with pytest.raises(ValueError, match="`hours` is a divisor of 24, but is 5"):
        air.main(**settings, hours=5)
    with pytest.raises(ValueError, match="`missing` is a share"):
        air.main(**settings, missing=1.0)


@pytest.mark.slow
def test_gradients_by_the_backward_sde_for_air(example):
    """They are nearly those of steps that are made again."""
    air = example("latent_sde_air")
    values, station = map(jnp.asarray, air_days(np.random.default_rng(0), 2))
    model = eqx.filter_jit(air.LatentSDE)(jr.key(0))
    data = values, jnp.ones_like(values), air.one_hot(station)

    @eqx.filter_jit
    def grad_of(method):
        args = (*data, 1.0, method, 2, jr.key(1))
        grads = eqx.filter_grad(air.loss_fn)(model, *args)
        grads = jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])
        return grads / jnp.linalg.norm(grads)

    assert jnp.vdot(grad_of("midpoint"), grad_of("heun")) > 0.99


@pytest.mark.slow
def test_hidden_hours_of_air(example):
    air = example("latent_sde_air")
    values, station = map(jnp.asarray, air_days(np.random.default_rng(0), 3))
    model = eqx.filter_jit(air.LatentSDE)(jr.key(0))
    of = lambda values, is_seen: air.reconstruct(
        model, values, is_seen, station, "reversible-heun", 2, jr.key(0)
    )
    is_seen = jnp.ones_like(values).at[:, 5:9].set(0)
    mean = of(values, is_seen)
    assert mean.shape == (3, 24, 2) and jnp.all(jnp.isfinite(mean))


def test_days_of_air_are_split_by_time(example):
    split = example("latent_sde_air").split
    hours = np.arange(24.0 * 28 * 20).reshape(-1, 1)
    hours[24 * 3 + 5] = np.nan
    parts = {name: x[:, 0, 0] // 24 for name, x in split(hours).items()}
    days = np.concatenate(list(parts.values()))
    assert len(set(days)) == len(days) == 27 * 20 - 1 and 3 not in days
    assert np.all(days % 28 > 0)
    blocks = {name: set(x // 28 % 10) for name, x in parts.items()}
    assert blocks["validation"] == {4} and blocks["test"] == {2, 7}
    assert blocks["train"] == {0, 1, 3, 5, 6, 8, 9}


def test_hidden_hours_are_interpolated(example):
    air = example("latent_sde_air")
    values = np.arange(48, dtype=np.float32).reshape(1, 24, 2)
    is_seen = np.ones_like(values)
    is_seen[0, 3:7] = 0
    hidden = np.where(is_seen > 0, values, np.nan)
    assert np.allclose(air.interpolate(hidden, is_seen), values)
    is_seen[0, 20:] = 0
    hidden = np.where(is_seen > 0, values, np.nan)
    assert np.allclose(air.interpolate(hidden, is_seen)[0, 20:], values[0, 19])
    assert np.all(air.hide(100, 0.99, (0, 0)).sum(axis=1) >= 1)
    is_seen = air.hide(2000, 0.3, (0, 0))
    assert np.array_equal(is_seen[..., 0], is_seen[..., 1])
    assert abs(np.mean(is_seen) - 0.7) < 4.5 * (0.21 / 48_000) ** 0.5


def test_data_of_air_are_checked(example, tmp_path):
    path = tmp_path / "PRSA_Data_Aotizhongxin_20130301-20170228.csv"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"`data`: .*{path.name} is not the file"):
        example("latent_sde_air").load(tmp_path)
