"""The examples of torchsde and diffrax, against these. For torchsde's SDE-GAN and
diffrax's neural SDE, see `test_sde_gan.py`.
"""

import importlib.util
import textwrap
from pathlib import Path

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import latent_lorenz
import notebooks
import pytest
from timing import interleaved_minima

from diffrax_sde_adjoint import StochasticAdjoint


_has_torchsde = importlib.util.find_spec("torchsde") is not None
_milliseconds = lambda t: f"{1e3 * t:.0f}"


def _gradient_of(loss, *args):
    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    return lambda: gradient(*args)


@pytest.mark.parametrize("batch", (256, 1024))
def test_latent_lorenz(batch, record_row):
    inputs = latent_lorenz.initial(batch, 100)
    losses = {
        "ours": latent_lorenz.diffrax_loss(StochasticAdjoint()),
        "store_all": latent_lorenz.diffrax_loss(StochasticAdjoint(store_all=True)),
        "default": latent_lorenz.diffrax_loss(diffrax.RecursiveCheckpointAdjoint()),
        "scan": latent_lorenz.scan(None),
        "nested scans": latent_lorenz.scan(10),
    }
    gradients = {k: _gradient_of(f, inputs, jr.key(0)) for k, f in losses.items()}
    if _has_torchsde:
        for name, adjoint in (("torchsde", False), ("adjoint", True)):
            gradients[name] = latent_lorenz.torchsde_gradient(inputs, adjoint)
    times = interleaved_minima(gradients, rounds=10)
    ours = times["ours"]
    columns = {
        "StochasticAdjoint": "ours",
        "store_all": "store_all",
        "RecursiveCheckpointAdjoint, same path": "default",
        "by hand: scan": "scan",
        "by hand: nested scans": "nested scans",
        "torchsde: backpropagation": "torchsde",
        "torchsde: adjoint": "adjoint",
    }
    of = lambda name: _milliseconds(times[name]) if name in times else ""
    row = {"batch": f"{batch}", **{k: of(name) for k, name in columns.items()}}
    if _has_torchsde:
        row["backpropagation / ours"] = f"{times['torchsde'] / ours:.2f}"
        row["adjoint / ours"] = f"{times['adjoint'] / ours:.1f}"
    record_row("Gradient of torchsde's latent SDE (Lorenz), 200 steps, ms", row)
    assert times["scan"] >= 0.9 * times["store_all"]
    assert times["nested scans"] >= 0.95 * ours
    if _has_torchsde:
        assert times["torchsde"] >= ours
        assert times["torchsde"] >= 1.3 * times["store_all"]
        assert times["adjoint"] >= 8 * ours


@pytest.mark.skipif(not _has_torchsde, reason="torchsde is not installed")
def test_programs_of_the_page(record_row):
    """The two programs of `docs/torchsde.md`, as they are printed."""
    page = (Path(__file__).parents[2] / "docs" / "torchsde.md").read_text()
    blocks = (x.partition("```")[0] for x in page.split("```python\n")[1:3])
    theirs, ours = map(textwrap.dedent, blocks)
    model, _, gradient = theirs.partition("bm = ")
    of_theirs, of_ours = {}, {}
    exec(model, of_theirs)
    exec(ours, of_ours)
    # A path of torchsde remembers what it has drawn: each gradient has its own.
    compiled = compile("bm = " + gradient, "torchsde.md", "exec")
    sde, keys = of_ours["SDE"](jr.key(0)), jr.split(jr.key(1), 16)
    functions = {
        "ours": lambda: of_ours["loss"](sde, jnp.ones((16, 3)), keys),
        "torchsde": lambda: exec(compiled, of_theirs),
    }
    times = interleaved_minima(functions)
    record_row(
        "Gradient of the neural SDE of 'Coming from torchsde', ms",
        {k: f"{1e3 * t:.1f}" for k, t in times.items()},
    )
    assert times["torchsde"] >= 10 * times["ours"]


def test_length_of_context(record_row):
    """The cost of a gradient does not grow with what is indexed by time."""
    row = {}
    times = {}
    for way, kwargs in (("StochasticAdjoint", {}), ("store_all", {"store_all": True})):
        loss = latent_lorenz.diffrax_loss(StochasticAdjoint(**kwargs))
        lengths = (10, 100, 1000)
        gradients = {
            str(num): _gradient_of(loss, latent_lorenz.initial(64, num), jr.key(0))
            for num in lengths
        }
        times[way] = interleaved_minima(gradients, rounds=30)
        row.update(
            {f"{way}, {num}": _milliseconds(times[way][str(num)]) for num in lengths}
        )
    record_row("The same, batch 64, by the length of the context, ms", row)
    for x in times.values():
        assert x["1000"] <= 1.1 * x["10"]


@pytest.mark.parametrize("name", ("neural_cde", "latent_ode"))
def test_notebooks(name, record_row):
    example = getattr(notebooks, name)
    adjoints = {
        "StochasticAdjoint": StochasticAdjoint(),
        "store_all": StochasticAdjoint(store_all=True),
        "diffrax default": diffrax.RecursiveCheckpointAdjoint(),
    }
    gradients = {k: _gradient_of(*example(x)) for k, x in adjoints.items()}
    times = interleaved_minima(gradients, rounds=100)
    record_row(
        "Gradients of diffrax's notebooks, ms",
        {"notebook": name, **{k: f"{1e3 * t:.1f}" for k, t in times.items()}},
    )
    assert times["StochasticAdjoint"] <= times["diffrax default"]
