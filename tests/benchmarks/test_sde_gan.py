"""The cost of training an SDE-GAN, the model of `examples/sde_gan.py`.

What is compared: reversible Heun and clipping with Midpoint and a gradient penalty, as
in Kidger et al. 2021; and all of ours with the set-up of diffrax's notebook on neural
SDEs.
"""

import importlib
from functools import partial
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from timing import interleaved_minima

from diffrax_sde_adjoint import ReversibleHeun, clip_lipschitz


TIMES, NOISE, INITIAL_NOISE, HIDDEN = 64, 3, 5, 16
times = jnp.arange(TIMES, dtype=jnp.float32)


@pytest.fixture
def gan(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("sde_gan")


def _models(gan):
    generator_key, critic_key = jr.split(jr.key(0))
    critic = clip_lipschitz(gan.make_critic(1, critic_key))
    return gan.Pair(gan.make_generator(1, generator_key), critic)


class _Notebook:
    """The same models, as diffrax's notebook solves them: `vmap` of solves of single
    series, each with its own times; `VirtualBrownianTree`, and the default adjoint.
    """

    def _solve(self, model, x, control, ts, saveat):
        def network(name, t, h, model):
            return model.evaluate(getattr(model, name), t, h[None])[0]

        def field(t, h, model):
            return network("field", t, h, model).reshape(-1, HIDDEN).T

        terms = diffrax.MultiTerm(
            diffrax.ODETerm(partial(network, "drift")),
            diffrax.ControlTerm(field, control),
        )
        sol = diffrax.diffeqsolve(
            terms,
            diffrax.ReversibleHeun(),
            ts[0],
            ts[-1],
            jnp.float32(1),
            model.initial(x),
            model,
            saveat=saveat,
        )
        return jax.vmap(model.readout)(sol.ys)

    def generate(self, generator, ts, key):
        start_key, path_key = jr.split(key)
        struct = jax.ShapeDtypeStruct((NOISE,), jnp.float32)
        path = diffrax.VirtualBrownianTree(ts[0], ts[-1], 0.5, struct, path_key)
        start = jr.normal(start_key, (INITIAL_NOISE,), jnp.float32)
        return self._solve(generator.sde, start, path, ts, diffrax.SaveAt(ts=ts))

    def criticise(self, critic, ts, series):
        path = diffrax.LinearInterpolation(ts, series)
        saveat = diffrax.SaveAt(t0=True, t1=True)
        return jnp.sum(self._solve(critic, series[0], path, ts, saveat))

    def score(self, generator, critic, ts, keys):
        in_axes = (None, 0 if ts.ndim == 2 else None, 0)
        series = jax.vmap(self.generate, in_axes)(generator, ts, keys)
        scores = jax.vmap(self.criticise, in_axes)(critic, ts, series)
        return jnp.mean(scores)


def test_notebook_solves_the_same_equations(gan):
    saveat = diffrax.SaveAt(t1=True)
    generator, critic = _models(gan)
    for model in (generator.sde, critic):
        x_key, path_key = jr.split(jr.key(1))
        x = jr.normal(x_key, (3, model.initial.in_size), jnp.float32)
        num = model.field.out_size // HIDDEN
        steps = jr.normal(path_key, (3, TIMES, num), jnp.float32)
        paths = 0.3 * jnp.cumsum(steps, axis=1)
        control = diffrax.LinearInterpolation(times, jnp.swapaxes(paths, 0, 1))
        ours = model(x, control, TIMES - 1, 1.0, saveat, gan.REVERSIBLE)[0]

        def theirs(x, path, model=model):
            control = diffrax.LinearInterpolation(times, path)
            return _Notebook()._solve(model, x, control, times, saveat)[0]

        assert jnp.allclose(ours, jax.vmap(theirs)(x, paths), rtol=1e-3, atol=1e-3)


def _compiled(function, *args):
    function = eqx.filter_jit(function)
    return lambda: function(*args)


# The notebook's batch is the larger one.
@pytest.mark.parametrize("batch, promised", [(128, 4), (1024, 5)])
def test_generator_step(gan, batch, promised, record_row):
    generator, critic = _models(gan)
    notebook = _Notebook()
    key = jr.key(1)
    keys = jr.split(key, batch)
    own_times = jnp.broadcast_to(times, (batch, TIMES))

    def score(generator, critic, method, key):
        series = generator(batch, key, method)
        return jnp.mean(gan.criticise(critic, series, method))

    tree = gan.REVERSIBLE._replace(
        brownian=lambda t0, t1, struct, key, dt, rows: diffrax.VirtualBrownianTree(
            t0, t1, 0.5, struct, key
        ),
        adjoint=diffrax.RecursiveCheckpointAdjoint(),
    )
    default_adjoint = gan.REVERSIBLE._replace(adjoint=tree.adjoint)
    ours = gan.REVERSIBLE
    cases = {
        "ours": (score, critic, ours, key),
        "its path, default adjoint": (score, critic, default_adjoint, key),
        "tree, default adjoint": (score, critic, tree, key),
        "notebook, one set of times": (notebook.score, critic, times, keys),
        "notebook": (notebook.score, critic, own_times, keys),
    }
    seconds = interleaved_minima(
        {
            name: _compiled(eqx.filter_grad(loss), generator, *args)
            for name, (loss, *args) in cases.items()
        }
    )
    row = {name: f"{1e3 * value:.0f}" for name, value in seconds.items()}
    ratio = seconds["notebook"] / seconds["ours"]
    row["notebook / ours"] = f"{ratio:.1f}"
    record_row("Gradient of an SDE-GAN's generator, ms", {"batch": str(batch), **row})
    assert ratio >= promised


def test_training_step(gan, record_row):
    models = _models(gan)
    series = jnp.asarray(gan.load("ou", "validation").train[:128])
    optimiser = gan.make_optimiser(gan.RECIPES["ours"], 1e-4)
    optimisers = gan.Pair(optimiser, optimiser)
    state = gan.initial_state(models, optimisers)
    methods = {
        "Midpoint, penalty": (gan.Method(diffrax.Midpoint()), 10.0),
        "ReversibleHeun, penalty": (gan.Method(ReversibleHeun()), 10.0),
        "Midpoint, clipping": (gan.Method(diffrax.Midpoint()), None),
        "ReversibleHeun, clipping": (gan.Method(ReversibleHeun()), None),
    }
    seconds = interleaved_minima(
        {
            name: _compiled(
                partial(
                    gan.train_step,
                    optimisers=optimisers,
                    method=method,
                    penalty=penalty,
                    averaged_from=0,
                ),
                state,
                series,
                jnp.asarray(1),
                jr.key(0),
            )
            for name, (method, penalty) in methods.items()
        }
    )
    best = seconds["ReversibleHeun, clipping"]
    for name, value in seconds.items():
        row = {"": name, "ms": f"{1e3 * value:.1f}", "/ ours": f"{value / best:.2f}"}
        record_row("Training step of an SDE-GAN, 128 series", row)
    assert best == min(seconds.values())
