"""What a gradient costs: in evaluations of the vector field, and by the length of what
is indexed by time.
"""

import time

import diffrax
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import by_default_unless
from jax.interpreters import ad, mlir

from diffrax_sde_adjoint import (
    EES25,
    Reversible,
    ReversibleHeun,
    StochasticAdjoint,
)


class _Counter:
    """A product that counts how often it is evaluated, as it is and in derivatives."""

    def __init__(self):
        self.num = 0
        self.primitive = jex.core.Primitive("counted_product")
        self.primitive.def_impl(self._impl)
        self.primitive.def_abstract_eval(lambda x, y: x)
        mlir.register_lowering(
            self.primitive, mlir.lower_fun(self._impl, multiple_results=False)
        )
        times = self.primitive.bind
        ad.defbilinear(
            self.primitive, lambda ct, x, y: times(ct, y), lambda ct, x, y: times(ct, x)
        )

    def _impl(self, x, y):
        return jax.pure_callback(
            self._multiply, jax.ShapeDtypeStruct((), x.dtype), x, y
        )

    def _multiply(self, x, y):
        self.num += 1
        return np.asarray(x * y)


def evaluations(solver, num_steps, adjoint, **kwargs):
    """How often a gradient evaluates the vector field."""
    counter = _Counter()
    vector_field = lambda t, y, args: jnp.tanh(counter.primitive.bind(args, y))

    @jax.jit
    @jax.grad
    def gradient(args):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            t0=0.0,
            t1=1.0,
            dt0=1 / num_steps,
            y0=jnp.array(0.5),
            args=args,
            saveat=diffrax.SaveAt(ts=jnp.array([0.5, 1.0]), **kwargs),
            adjoint=adjoint,
            max_steps=num_steps,
        )
        return jnp.sum(sol.ys)

    jax.block_until_ready(gradient(jnp.array(0.7)))
    return counter.num


def assert_evaluations(solver, num_stages, adjoint, expected, **kwargs):
    num_steps = 60
    more = evaluations(solver, 2 * num_steps, adjoint, **kwargs)
    more -= evaluations(solver, num_steps, adjoint, **kwargs)
    # There may be one more where a page begins, and at every tenth step of reversible
    # Heun, where its stability is looked at.
    assert abs(more - expected * num_steps * num_stages) <= num_steps * num_stages / 10


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    "solver, num_stages, adjoint, expected",
    (
        (ReversibleHeun(), 1, StochasticAdjoint(), 4),
        (diffrax.Heun(), 2, StochasticAdjoint(store_all=True), 3),
        *(
            pytest.param(*case, marks=_slow)
            for case in (
                (Reversible(diffrax.Heun()), 4, StochasticAdjoint(), 4),
                (diffrax.Euler(), 1, StochasticAdjoint(), 4),
                (diffrax.Heun(), 2, StochasticAdjoint(), 4),
                (diffrax.Heun(), 2, StochasticAdjoint(checkpoint_every=1), 4),
                (ReversibleHeun(), 1, StochasticAdjoint(store_all=True), 3),
                (diffrax.Tsit5(), 6, StochasticAdjoint(store_all=True), 3),
                # It is undone by another step, which evaluates at other points.
                (EES25(), 3, StochasticAdjoint(), 5),
            )
        ),
    ),
    ids=str,
)
def test_evaluations(solver, num_stages, adjoint, expected):
    """For each stage of a step: one on the way forward; one as it is undone or made
    again, if its residuals were not kept; and two in the transpose.
    """
    assert_evaluations(solver, num_stages, adjoint, expected)


@_slow
def test_evaluations_of_a_function_of_the_solution():
    """Its cotangent is not known before the solution at both ends of a step is."""
    fn = lambda t, y, args: y**2
    assert_evaluations(ReversibleHeun(), 1, StochasticAdjoint(), 4, fn=fn)


def _gather(t, y, args):
    weight, ts, series = args
    return jnp.tanh(weight @ y + series[jnp.searchsorted(ts, t, side="right") - 1])


def _take(t, y, args):
    weight, ts, series = args
    return jnp.tanh(weight @ y + jnp.take(series, jnp.searchsorted(ts, t), axis=0))


def _slice(t, y, args):
    weight, ts, series = args
    index = jnp.searchsorted(ts, t, side="right") - 1
    return jnp.tanh(weight @ y + lax.dynamic_slice_in_dim(series, index, 1)[0])


def _linear(t, y, args):
    weight, ts, series = args
    return jnp.tanh(weight @ y + diffrax.LinearInterpolation(ts, series).evaluate(t))


def _cubic(t, y, args):
    weight, ts, coeffs = args
    return jnp.tanh(weight @ y + diffrax.CubicInterpolation(ts, coeffs).evaluate(t))


def _of_series(vector_field, solver, adjoint, vmapped):
    """The gradient of a solve with respect to a series, as a function of the latter."""

    def loss(series, y0):
        weight = 0.3 * jnp.eye(len(y0))
        (length, _) = series.shape
        ts = jnp.linspace(0, 1, length)
        if vector_field == "control":
            # A controlled differential equation.
            terms = diffrax.ControlTerm(
                lambda t, y, args: jnp.tanh(args @ y), _Sum(ts, series)
            )
            args = weight
        else:
            terms = diffrax.ODETerm(vector_field)
            args = (weight, ts, series)
            if vector_field is _cubic:
                args = (weight, ts, 4 * (series[1:],))
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            t0=0.0,
            t1=1.0,
            dt0=1 / 50,
            y0=y0,
            args=args,
            adjoint=adjoint,
            max_steps=50,
        )
        return jnp.sum(sol.ys**2)

    if vmapped:
        batch = jax.vmap(loss, in_axes=(2, 1))
        return jax.jit(jax.grad(lambda *x: jnp.sum(batch(*x)))), (3,)
    return jax.jit(jax.grad(loss)), ()


class _Sum(diffrax.AbstractPath):
    """The sum of a series, interpolated."""

    interpolation: diffrax.LinearInterpolation
    t0 = 0.0
    t1 = 1.0

    def __init__(self, ts, series):
        self.interpolation = diffrax.LinearInterpolation(ts, series)

    def evaluate(self, t0, t1=None, left=True):
        return jnp.sum(self.interpolation.evaluate(t0, t1, left))


@pytest.mark.parametrize(
    "vmapped, vector_field, solver, adjoint",
    by_default_unless(
        lambda vmapped, vector_field, *_: not (vmapped and vector_field is _gather),
        [
            (vmapped, *case)
            for vmapped in (True, False)
            for case in (
                (_gather, diffrax.Heun(), StochasticAdjoint()),
                (_take, diffrax.Heun(), StochasticAdjoint()),
                (_slice, ReversibleHeun(), StochasticAdjoint()),
                (_linear, diffrax.Heun(), StochasticAdjoint()),
                (_linear, ReversibleHeun(), StochasticAdjoint()),
                (_linear, diffrax.Tsit5(), StochasticAdjoint()),
                (_cubic, Reversible(diffrax.Midpoint()), StochasticAdjoint()),
                (_cubic, diffrax.Euler(), StochasticAdjoint(store_all=True)),
                ("control", diffrax.Heun(), StochasticAdjoint()),
                ("control", ReversibleHeun(), StochasticAdjoint()),
                ("control", diffrax.Heun(), StochasticAdjoint(store_all=True)),
            )
        ],
        long=lambda vmapped, vector_field, *_: not (vmapped or vector_field is _gather),
    ),
)
def test_length_of_what_is_indexed_by_time(vmapped, vector_field, solver, adjoint):
    """It adds what it takes to read it and to return its cotangent, but none to a
    step.
    """
    gradient, batch = _of_series(vector_field, solver, adjoint, vmapped)

    def seconds(length):
        series = jnp.ones((length, 4, *batch))
        y0 = jnp.ones((4, *batch))
        jax.block_until_ready(gradient(series, y0))
        times = []
        for _ in range(5):
            start = time.process_time()
            jax.block_until_ready(gradient(series, y0))
            times.append(time.process_time() - start)
        return min(times)

    length = 200_000
    size = jnp.ones((length, 4, *batch))
    copy = jax.jit(lambda x: x + 1)
    copy(size)
    start = time.process_time()
    for _ in range(5):
        jax.block_until_ready(copy(size))
    seconds_of_copy = (time.process_time() - start) / 5
    # With a cotangent of its length, each of 50 steps would take some.
    assert seconds(length) < seconds(20) + 25 * seconds_of_copy
