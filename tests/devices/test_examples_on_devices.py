"""The examples train on several devices as on one."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from collectives import collectives

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


root = Path(__file__).parents[2]
small = dict(steps=20, batch=8, dim=2, width=8, samples=1)


@pytest.fixture
def example(monkeypatch):
    """Imports an example, as if it was run from its folder, with the dtypes of then."""
    monkeypatch.syspath_prepend(root / "examples")
    jax.config.update("jax_enable_x64", False)
    yield importlib.import_module
    jax.config.update("jax_enable_x64", True)


class Stop(Exception):
    """Ends an example after its training."""


def losses_of(checkpoint):
    with checkpoint.open("rb") as file:
        return json.loads(file.readline())[2]


def train_on_devices(example, monkeypatch, out, **settings):
    """The losses, by `main` of the latent SDE, without what it does after them."""
    module, train = example("latent_sde"), example("common").train

    def train_and_stop(*args):
        train(*args)
        raise Stop

    monkeypatch.setattr(module, "train", train_and_stop)
    out.mkdir()
    with pytest.raises(Stop):
        module.main(**small, **settings, out=out)
    return losses_of(out / "train_20.eqx")


def run_processes(*arguments):
    """Two, of two devices each: what they print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    launch = [sys.executable, root / "examples" / "launch.py"]
    launch += ["--coordinator", address, "--processes", 2, "--process"]
    runs = [
        subprocess.Popen(
            [str(x) for x in (*launch, i, *arguments)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in (0, 1)
    ]
    try:
        outputs = [run.communicate(timeout=300)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], outputs
    return outputs


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_devices(example, monkeypatch, tmp_path):
    on_one = train_on_devices(example, monkeypatch, tmp_path / "1")
    on_two = train_on_devices(example, monkeypatch, tmp_path / "2", devices=2)
    np.testing.assert_allclose(on_two, on_one, rtol=1e-5)
    # The second half on four, and the first on two.
    resume = tmp_path / "2" / "train_10.eqx"
    on_four = train_on_devices(
        example, monkeypatch, tmp_path / "4", devices=4, resume=resume
    )
    np.testing.assert_allclose(on_four, on_one, rtol=1e-5)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(
    example, monkeypatch, tmp_path
):
    on_one = train_on_devices(example, monkeypatch, tmp_path / "1")
    flags = [x for name, value in small.items() for x in (f"--{name}", value)]
    # From step five on.
    resume = ["--resume", tmp_path / "1" / "train_5.eqx"]
    first, second = run_processes(
        root / "examples" / "latent_sde.py",
        *flags,
        *resume,
        *("--devices", 4, "--out", tmp_path / "4"),
    )
    np.testing.assert_allclose(
        losses_of(tmp_path / "4" / "train_20.eqx"), on_one, rtol=1e-5
    )
    # One of them prints.
    assert "CRPS: latent SDE" in first and "CRPS: latent SDE" not in second


def glucose(example, run):
    run(example("latent_sde"), batch=8, dim=2, width=8)


def synthetic(example, run):
    run(example("latent_sde_synthetic"), batch=8)


def diffusion_limit(example, run):
    run(example("dlgm_diffusion_limit"), batch=8, width=8, layers=())


def gan(example, run):
    run(example("sde_gan"), data="ou", batch=8, penalty=10.0)


def scoring_rule(example, run):
    run(example("neural_sde_score"), data="ou", batch=8, generated=8)


def mocap(example, run):
    module = example("latent_sde_mocap")
    phase = np.random.default_rng(0).uniform(0, 6, (4, 1, module.ANGLES))
    walks = 6 * np.sin(0.3 * np.arange(40)[:, None] + phase).astype(np.float32)
    module.load = lambda path: dict(train=walks, test=walks)
    recipe = module.OURS._replace(windows=((4, 10),))
    run(module, recipe, data=Path(), held_out="test")


def air(example, run):
    module = example("latent_sde_air")
    rng = np.random.default_rng(0)
    days = rng.normal(size=(8, module.HOURS, 2)).astype(np.float32)
    part = module.Days(days, np.arange(8), *[None] * (len(module.Days._fields) - 2))
    module.load = lambda path: dict.fromkeys(("train", "validation", "test"), part)
    run(module, data=Path(), batch=8)


@pytest.mark.parametrize(
    "of_example",
    [
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (glucose, gan, scoring_rule)
        ),
        *(
            pytest.param(x, marks=pytest.mark.long)
            for x in (synthetic, diffusion_limit, mocap, air)
        ),
    ],
)
def test_a_training_step_adds_up_gradients_once(
    example, monkeypatch, tmp_path, of_example
):
    Step, hlo, losses = example("devices").Step, [], []
    call = Step.__call__

    def compile_and_call(step, *args):
        if not hlo:
            hlo.append(step.lower(*args).compile().compiled.as_text())
        return call(step, *args)

    def two_steps(step, state, *_):
        # The second loss depends on the gradients.
        for i in range(2):
            state, loss = step(state, i)
            losses.append(float(loss))
        raise Stop

    monkeypatch.setattr(Step, "__call__", compile_and_call)

    def run(module, *args, **settings):
        monkeypatch.setattr(module, "train", two_steps)
        for devices in (4, 1):
            with pytest.raises(Stop):
                module.main(*args, **settings, devices=devices, out=tmp_path)

    of_example(example, run)
    on_four, on_one = losses[:2], losses[2:]
    np.testing.assert_allclose(on_four, on_one, rtol=1e-5, atol=1e-6)
    in_loops, others = collectives(hlo[0])
    assert in_loops == []
    # The score is of all series: those of other devices are gathered.
    gathered = ["all-gather"] if of_example is scoring_rule else []
    assert sorted(others) == [*gathered, "all-reduce"]


def test_numbers_of_devices_that_cannot_be(example):
    make_step = example("devices").make_step
    step = lambda state, data, i, rows: (state, 0.0)
    with pytest.raises(ValueError, match="`devices`: 6 rows are not the same number"):
        make_step(step, None, 6, 4)
    with pytest.raises(ValueError, match="`devices`: there are 8, not 16"):
        make_step(step, None, 32, 16)
    with pytest.raises(ValueError, match="`devices`: there are 8, not 0"):
        make_step(step, None, 32, 0)


@pytest.mark.slow
def test_function_of_the_docs():
    """The first of the page, with a loss that is a solve."""
    page = (root / "docs" / "many_devices.md").read_text()
    namespace = {}
    exec(page.partition("```python\n")[2].partition("```")[0], namespace)

    def loss(model, x, key):
        path = BrownianInterval(0.0, 1.0, (), key, dt=0.25)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, model: jnp.tanh(model * y)),
            diffrax.ControlTerm(lambda t, y, model: jnp.cos(model * y), path),
        )
        sol = diffrax.diffeqsolve(
            terms,
            ReversibleHeun(),
            0.0,
            1.0,
            0.25,
            x,
            model,
            adjoint=StochasticAdjoint(),
        )
        return sol.ys[0] ** 2

    batch, model = jr.normal(jr.key(0), (16,)), jnp.array(0.7)

    @jax.jit
    def on_one(model, key):
        keys = jax.vmap(jr.fold_in, (None, 0))(key, jnp.arange(16))
        mean = lambda model: jnp.mean(
            jax.vmap(lambda x, k: loss(model, x, k))(batch, keys)
        )
        return jax.value_and_grad(mean)(model)

    got = namespace["value_and_grad"](loss, model, np.asarray(batch), jr.key(1))
    np.testing.assert_allclose(got, on_one(model, jr.key(1)), rtol=1e-12)
    lowered = namespace["value_and_grad"].lower(loss, model, batch, jr.key(1))
    hlo = lowered.compile().compiled.as_text()
    assert collectives(hlo) == ([], ["all-reduce"])


@pytest.mark.slow
def test_jit_of_a_vmap_over_parts():
    """The other way of the page: its gradients, and no collective in a loop."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("devices",))
    spec = jax.sharding.PartitionSpec("devices")
    y0 = jr.normal(jr.key(0), (8, 2))
    sharded = jax.device_put(y0, jax.sharding.NamedSharding(mesh, spec))

    @jax.value_and_grad
    def value_and_grad_of_rows(model, y0, first, key):
        rows = (first, 8)
        path = BrownianInterval(0.0, 1.0, y0.shape, key, dt=0.25, rows=rows)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, model: jnp.tanh(model * y)),
            diffrax.ControlTerm(
                lambda t, y, model: lx.DiagonalLinearOperator(jnp.cos(model * y)), path
            ),
        )
        adjoint = StochasticAdjoint()
        sol = diffrax.diffeqsolve(
            terms, ReversibleHeun(), 0.0, 1.0, 0.25, y0, model, adjoint=adjoint
        )
        return jnp.sum(sol.ys**2)

    page = (root / "docs" / "many_devices.md").read_text()
    snippet = page.partition("parts = y0.reshape")[2].partition("```")[0]
    snippet = "parts = y0.reshape" + snippet

    @jax.jit
    def in_parts(params, y0, key):
        names = dict(num_devices=4, dim=2, y0=y0, params=params, key=key)
        names |= dict(value_and_grad_of_rows=value_and_grad_of_rows, jax=jax, jnp=jnp)
        exec(snippet, names)
        return jnp.sum(names["values"]), names["grads"]

    args = jnp.array(0.7), sharded, jr.key(1)
    compiled = in_parts.lower(*args).compile()
    expected = value_and_grad_of_rows(args[0], y0, 0, args[2])
    np.testing.assert_allclose(compiled(*args), expected, rtol=1e-12)
    in_loops, others = collectives(compiled.as_text())
    assert in_loops == [] and others != []
