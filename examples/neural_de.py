"""The neural SDE that generates series, and the neural CDE that may read them."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from devices import Rows, normal
from diffrax import (
    AbstractAdjoint,
    AbstractPath,
    AbstractSolver,
    ControlTerm,
    MultiTerm,
    ODETerm,
    SaveAt,
    diffeqsolve,
)
from jaxtyping import Array, Float, PRNGKeyArray

from diffrax_sde_adjoint import (
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    lipswish,
)


INITIAL_NOISE, NOISE, HIDDEN, WIDTH = 5, 3, 16, 16
float32 = jnp.float32


def brownian_interval(t0, t1, shape, key: PRNGKeyArray, dt, rows: Rows) -> AbstractPath:
    return BrownianInterval(t0, t1, shape, key, dt=dt, rows=rows)


class Method(NamedTuple):
    """How an equation is solved and differentiated. They are short, so memory is no
    concern; and 63 steps of reversible Heun could not be undone in single precision.
    """

    solver: AbstractSolver = ReversibleHeun()
    adjoint: AbstractAdjoint = StochasticAdjoint(store_all=True)
    brownian: Callable[..., AbstractPath] = brownian_interval


REVERSIBLE = Method()


class NeuralDE(eqx.Module):
    """`dh = f(t, h) dt + g(t, h) dX` from `h(0) = initial(x)`, and a linear map of it,
    or of `h` at both ends of each step.

    As a generator, `X` is Brownian motion and `x` noise. As a critic, `X` is a series
    and `x` its start. `X` drives the first `driven` entries of `h`, by default all.
    """

    initial: eqx.nn.MLP
    drift: eqx.nn.MLP
    field: eqx.nn.MLP
    readout: eqx.nn.Linear
    end: float | None = eqx.field(static=True)  # of the times that networks see
    reads_both_ends: bool = eqx.field(static=True)

    def __init__(
        self,
        num_x: int,
        control: int,
        out: int,
        key: PRNGKeyArray,
        *,
        end: float | None,
        hidden: int = HIDDEN,
        width: int = WIDTH,
        driven: int | None = None,
        reads_both_ends: bool = False,
    ):
        driven = hidden if driven is None else driven
        keys = jr.split(key, 4)

        def mlp(num_in, num_out, last, key):
            return eqx.nn.MLP(
                num_in, num_out, width, 1, lipswish, last, dtype=float32, key=key
            )

        inputs = hidden if end is None else 1 + hidden
        self.initial = mlp(num_x, hidden, lambda x: x, keys[0])
        self.drift = mlp(inputs, hidden, jnp.tanh, keys[1])
        self.field = mlp(inputs, driven * control, jnp.tanh, keys[2])
        num_read = 2 * hidden if reads_both_ends else hidden
        self.readout = eqx.nn.Linear(num_read, out, dtype=float32, key=keys[3])
        self.end = end
        self.reads_both_ends = reads_both_ends

    def __call__(
        self,
        x: Float[Array, "batch x"],
        control: AbstractPath,
        steps: int,
        dt: float,
        saveat: SaveAt,
        method: Method,
    ) -> Float[Array, "times batch out"]:
        hidden = self.initial.out_size
        assert isinstance(hidden, int)
        sol = diffeqsolve(
            MultiTerm(ODETerm(drift), FieldTerm(control, hidden)),
            method.solver,
            0.0,
            steps * dt,
            dt,
            jax.vmap(self.initial)(x),
            self,
            saveat=saveat,
            adjoint=method.adjoint,
            max_steps=steps,
        )
        h = sol.ys
        assert h is not None
        if self.reads_both_ends:
            h = jnp.concatenate([h[:-1], h[1:]], axis=-1)
        return jax.vmap(jax.vmap(self.readout))(h)

    def evaluate(self, network: eqx.nn.MLP, t, h: Float[Array, "batch hidden"]):
        if self.end is not None:
            time = jnp.broadcast_to(t / self.end, (len(h), 1))
            h = jnp.concatenate([time, h], axis=1)
        return jax.vmap(network)(h)


def drift(t, h, model: NeuralDE):
    return model.evaluate(model.drift, t, h)


def field(t, h, model: NeuralDE):
    return model.evaluate(model.field, t, h)


class FieldTerm(ControlTerm):
    """`g(t, h) dX`, for a batch of `h` of size `hidden` and of `X`."""

    hidden: int = eqx.field(static=True)

    def __init__(self, control: AbstractPath, hidden: int):
        super().__init__(field, control)
        self.hidden = hidden

    def prod(self, vf, control):
        # Written out, as XLA is slow to sum over short axes on a CPU.
        columns = jnp.split(vf, control.shape[-1], axis=1)
        driven = sum(x * control[:, i : i + 1] for i, x in enumerate(columns))
        rest = self.hidden - columns[0].shape[1]
        return jnp.pad(driven, ((0, 0), (0, rest)))


class Generator(eqx.Module):
    """A neural SDE that makes series of noise, at times 0, 1, ..., `times` - 1.

    What is read from a state that Brownian motion drives is as rough. If `is_averaged`,
    as are data that were measured more often, a value is read from the states at both
    ends of the steps until the time after it; and Brownian motion drives half of the
    state only, so that the other half is smooth. If not `sees_time`, networks do not
    see what time it is.
    """

    sde: NeuralDE
    times: int = eqx.field(static=True)
    is_averaged: bool = eqx.field(static=True)
    steps_per_time: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        times: int,
        key: PRNGKeyArray,
        *,
        is_averaged: bool = False,
        sees_time: bool = True,
        steps_per_time: int = 1,
        hidden: int = HIDDEN,
        width: int = WIDTH,
    ):
        self.sde = NeuralDE(
            INITIAL_NOISE,
            NOISE,
            channels,
            key,
            end=times - 1.0 if sees_time else None,
            hidden=hidden,
            width=width,
            driven=hidden // 2 if is_averaged else None,
            reads_both_ends=is_averaged,
        )
        self.times = times
        self.is_averaged = is_averaged
        self.steps_per_time = steps_per_time

    def __call__(
        self,
        num: int,
        key: PRNGKeyArray,
        method: Method = REVERSIBLE,
        rows: Rows = None,
    ) -> Float[Array, "num times channels"]:
        """Series, each of its own noise."""
        start_key, path_key = jr.split(key)
        every = self.steps_per_time
        steps = every * (self.times - 1 + self.is_averaged)
        dt = 1 / every
        struct = jax.ShapeDtypeStruct((num, NOISE), float32)
        path = method.brownian(0.0, steps * dt, struct, path_key, dt, rows)
        start = normal(start_key, (num, INITIAL_NOISE), rows)
        saveat = SaveAt(t0=True, steps=True)
        series = self.sde(start, path, steps, dt, saveat, method)
        if self.is_averaged:
            series = jnp.mean(series.reshape(-1, every, *series.shape[1:]), axis=1)
        else:
            series = series[::every]
        return jnp.swapaxes(series, 0, 1)


def scaled(layers, factor: float):
    return jax.tree.map(lambda x: factor * x if eqx.is_array(x) else x, layers)


def with_scales(generator: Generator, of_start: float, of_field: float) -> Generator:
    """With other weights of the network of the start, so that series start about as far
    apart as those of the data do, and of those of the vector field.
    """
    parts = lambda x: (x.sde.initial, x.sde.drift, x.sde.field)
    new = map(scaled, parts(generator), (of_start, of_field, of_field))
    return eqx.tree_at(parts, generator, tuple(new))
