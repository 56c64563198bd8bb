"""A neural SDE learns to generate series, by a scoring rule.

    python examples/neural_sde_score.py
    python examples/neural_sde_score.py --data ou --whole 0.125
    python examples/neural_sde_score.py --data shares --whole 0.125

There is one model, one loss and one optimiser: the loss is the energy score of windows
of the generated series, and with `--whole` of whole ones, which compares them with
series of the data, and so takes the place of the critic of `sde_gan.py`. The model is
solved by reversible Heun and differentiated by `StochasticAdjoint`. That a scoring rule
can train neural SDEs is due to Issa, Horvath, Lemercier and Salvi, "Non-adversarial
training of neural SDEs with signature kernel scores" (2023),
https://arxiv.org/abs/2305.16274.

By default the series are 16 hours of the glucose of one person, every quarter of an
hour; `--data ou` is a time-dependent Ornstein-Uhlenbeck process, and `--data shares` 64
days of the price of a share and of its daily range.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from common import train, update
from devices import Rows, gather, make_step, num_rows, sum_of_devices
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from neural_de import Generator, with_scales
from series import TIMES, Name, load
from series_metrics import evaluate

from diffrax_sde_adjoint import WindowedEnergyScore


float32 = jnp.float32
Batch = Float[Array, "batch times channels"]


class SignatureKernelScore(eqx.Module):
    """The scoring rule of Issa et al. 2023: of the kernel of signatures of series with
    time, lifted by `exp(-|x - y|^2 / sigma)`. It is called as `WindowedEnergyScore` is.
    """

    sigma: float

    def __call__(self, x: Batch, y: Batch, key: PRNGKeyArray, mask: PyTree):
        from pysiglib import jax_api  # Optional, and it needs torch.

        def gram(a, b):
            kernel = jax_api.RBFKernel(self.sigma)
            return jax_api.sig_kernel_gram(
                a, b, dyadic_order=0, static_kernel=kernel, time_aug=True
            )

        within, num = gram(y, y), len(y)
        within = (jnp.sum(within) - jnp.trace(within)) / (num * (num - 1))
        return within - 2 * jnp.mean(gram(x, y))


class Data(NamedTuple):
    """What a step takes: series, what is known of them, and how they are compared."""

    series: Batch
    is_seen: Bool[Array, "batch times channels"] | None
    score: WindowedEnergyScore | SignatureKernelScore
    key: PRNGKeyArray


class State(NamedTuple):
    """Of the training."""

    generator: Generator
    opt_state: PyTree[Any]


def make_optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    adam = optax.adam(schedule, b1=0.9, b2=0.99)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def train_step(
    state: State,
    data: Data,
    i: Int[Array, ""],
    rows: Rows,
    batch: int,
    generated: int,
    optimiser: optax.GradientTransformation,
) -> tuple[State, Float[Array, ""]]:
    """One of the optimiser, with a batch of the data and of generated series, of which
    each device generates its rows. The score is of all of them, and so on all devices.
    """
    data_key, step_key = jr.split(jr.fold_in(data.key, i))
    sample_key, score_key = jr.split(step_key)
    index = jr.choice(data_key, len(data.series), (batch,))
    real, mask = jax.tree.map(lambda x: x[index], (data.series, data.is_seen))
    num = num_rows(generated, rows)

    @eqx.filter_value_and_grad
    def loss(generator):
        x = gather(generator(num, sample_key, rows=rows), rows)
        return data.score(real, x, score_key, mask)

    value, grads = loss(state.generator)
    grads = sum_of_devices(grads, rows)
    return State(*update(optimiser, *state, grads)), value


def main(
    *,
    data: Name = "glucose",
    window: int = 8,
    windows: int = 16,
    whole: float = 0.0,
    signature_kernel: float | None = None,
    missing: float = 0.0,
    averaged: bool | None = None,
    sees_time: bool | None = None,
    steps_per_time: int = 1,
    size: int = 16,
    width: int = 16,
    steps: int = 8000,
    batch: int = 256,
    generated: int = 128,
    learning_rate: float = 2e-3,
    held_out: Literal["validation", "test"] = "test",
    metric_steps: int = 500,
    samples: int = 2048,
    devices: int = 1,
    seed: int = 0,
    out: Path = Path("neural_sde_score"),
    resume: Path | None = None,
) -> dict[str, float]:
    """Train a generator of series, and compare what it generates with held-out ones.

    Args:
        data: what to learn.
        window: the times of a window.
        windows: those of each step of the optimiser; none, if it is 0.
        whole: the weight of the score of whole series.
        signature_kernel: `sigma` of the kernel `exp(-|x - y|^2 / sigma)` that is lifted
            to signatures, for the signature kernel score in place of the energy score.
            It needs pysiglib (https://pypi.org/project/pysiglib/).
        missing: the share of values that are not seen in each of the training series.
        averaged: whether each value is of all that is generated until the next one. By
            default, for glucose, which is measured so.
        sees_time: whether networks do. By default, if the law of the data depends on
            it, as that of `ou` does.
        steps_per_time: of the solver.
        size: of the state of the neural SDE.
        width: of its networks.
        steps: of the optimiser.
        batch: series of the data in each.
        generated: series that are compared with them.
        learning_rate: at first.
        held_out: what to compare with. Choose settings by `validation`.
        metric_steps: of training, for the classifier and the predictor.
        samples: series of each kind, at most, for the metrics.
        devices: that share the generated series.
        seed: of the weights, batches, paths and missing values.
        out: where the figures and the checkpoints go.
        resume: a checkpoint of a run with the same settings, to continue.
    """
    if signature_kernel is not None and missing > 0:
        raise ValueError("`signature_kernel` takes no series with `missing` values.")
    settings = dict(locals())
    for name in ("out", "resume", "held_out", "metric_steps", "samples", "devices"):
        del settings[name]
    out.mkdir(parents=True, exist_ok=True)
    keys = jr.split(jr.key(seed), 5)
    dataset = load(data, held_out)
    series = jnp.asarray(dataset.train)
    is_seen = None
    if missing > 0:
        rng = np.random.default_rng((seed, 4))
        is_seen = jnp.asarray(rng.uniform(size=series.shape) >= missing)
    if signature_kernel is not None:
        score = SignatureKernelScore(signature_kernel)
    else:
        score = WindowedEnergyScore(
            series, is_seen, window=window, num_windows=windows, weight_of_whole=whole
        )
    optimiser = make_optimiser(learning_rate, steps)

    @eqx.filter_jit
    def start():
        generator = Generator(
            series.shape[-1],
            TIMES,
            keys[0],
            is_averaged=dataset.is_averaged if averaged is None else averaged,
            sees_time=not dataset.is_stationary if sees_time is None else sees_time,
            steps_per_time=steps_per_time,
            hidden=size,
            width=width,
        )
        generator = with_scales(generator, 4.0, 1.0)
        return State(generator, optimiser.init(eqx.filter(generator, eqx.is_array)))

    untrained = start()
    train_data = Data(series, is_seen, score, keys[2])
    step = make_step(train_step, train_data, generated, devices)
    one_step = lambda state, i: step(state, i, batch, generated, optimiser)
    state, losses = train(one_step, untrained, steps, settings, out, resume)

    return evaluate(
        data,
        dataset,
        lambda model, num, key: model(num, key),
        (state.generator, keys[3]),
        (untrained.generator, keys[4]),
        losses,
        samples=samples,
        steps=metric_steps,
        seed=seed,
        out=out,
    )


if __name__ == "__main__":
    tyro.cli(main)
