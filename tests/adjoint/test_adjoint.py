"""`StochasticAdjoint`: its gradients against those of other adjoints."""

import functools as ft
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest
from helpers import (
    SmoothPath,
    by_default_unless,
    grad_in_forward_mode,
    keys,
    make_system,
    make_terms,
    noise_shapes,
    relative_error,
    struct,
)
from jaxtyping import Array

from diffrax_sde_adjoint import (
    AbstractReversibleSolver,
    BackwardSDEAdjoint,
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
)
from diffrax_sde_adjoint._sweep import rule


def weigh(ys) -> Array:
    """A scalar of a solution, to which each of its entries contributes differently."""
    leaves = [x for x in jtu.tree_leaves(ys) if x.size > 0]
    weights = [jnp.cos(1 + jnp.arange(x.size, dtype=x.dtype)) for x in leaves]
    terms = [jnp.sum(w * jnp.ravel(x**2)) for w, x in zip(weights, leaves, strict=True)]
    return jnp.sum(jnp.stack([x.astype(jnp.float64) for x in terms]))


def assert_equal_gradients(loss, *args, tol=1e-10):
    """Compares the gradient of `loss(adjoint, *args)` to that in forward mode."""
    actual = eqx.filter_jit(
        eqx.filter_grad(lambda args: loss(StochasticAdjoint(), *args))
    )(args)
    expected = grad_in_forward_mode(
        lambda args: loss(diffrax.ForwardMode(), *args), args
    )
    assert any(np.any(x != 0) for x in jtu.tree_leaves(expected))
    assert relative_error(actual, expected) < tol


# On the grid (of 20 steps over [0, 1]), off it, repeated, and at both ends.
ts = (0.0, 0.0, 0.05, 0.12, 0.13, 0.13, 0.5, 0.99, 1.0, 1.0)
saveats = {
    "t1": dict(t1=True),
    "ts": dict(ts=ts),
    "t0, ts, t1": dict(t0=True, ts=ts, t1=True),
    "t0, few ts": dict(t0=True, ts=(0.37, 0.4)),
}


def make_loss(noise, saveat, backward=False, dtype=jnp.float64):
    """A function of everything that can be differentiated, for a batch of paths."""
    drift, diffusion, y0, args = make_system(noise, dtype)
    shape = struct(noise_shapes[noise], dtype)
    t0, t1, dt = (jnp.array(x, dtype) for x in (0, 1, 0.05))
    if "ts" in saveat:
        times = jnp.array(saveat["ts"], dtype)
        saveat = saveat | dict(ts=times[::-1] if backward else times)

    def loss(adjoint, drift, diffusion, y0, args):
        def solve(key):
            path = BrownianInterval(t0, t1, shape, key, dt=dt)
            sol = diffrax.diffeqsolve(
                make_terms(drift, diffusion, path),
                ReversibleHeun(),
                t1 if backward else t0,
                t0 if backward else t1,
                -dt if backward else dt,
                y0,
                args,
                saveat=diffrax.SaveAt(**saveat),
                adjoint=adjoint,
                max_steps=32,
            )
            return sol.ys

        return weigh(jax.vmap(solve)(keys(3)))

    return loss, drift, diffusion, y0, args


def is_slow(noise, saveat, direction):
    """Each is two programs to compile, and random programs meet them as well."""
    return (
        noise in ("general operator", "diagonal", "additive", "scalar")
        or saveat in ("t0, ts, t1", "t0, few ts")
        or (noise, saveat) == ("general", "t1")
        or direction != ("forward" if saveat == "ts" else "backward")
    )


@pytest.mark.parametrize(
    "noise,saveat,direction",
    by_default_unless(
        is_slow,
        itertools.product(noise_shapes, saveats, ("forward", "backward")),
        long=lambda noise, *_: noise in ("scalar", "additive"),
    ),
)
def test_gradients(noise, saveat, direction):
    assert_equal_gradients(*make_loss(noise, saveats[saveat], direction == "backward"))


@pytest.mark.slow
@pytest.mark.parametrize("noise", ("general", "diagonal"))
def test_gradients_in_float32(noise):
    loss = make_loss(noise, saveats["t0, ts, t1"], dtype=jnp.float32)
    assert_equal_gradients(*loss, tol=1e-4)


def scalar_solve(y0, args, key, adjoint, *, num_steps=20, **kwargs):
    path = SmoothPath(struct((), jnp.float64), key)
    terms = make_terms(
        lambda t, y, args: jnp.sin(args["rate"] * y),
        lambda t, y, args: args["level"] * jnp.cos(y),
        path,
    )
    kwargs = dict(max_steps=4096, solver=ReversibleHeun(), terms=terms) | kwargs
    return diffrax.diffeqsolve(
        t0=0.0, t1=1.0, dt0=1 / num_steps, y0=y0, args=args, adjoint=adjoint, **kwargs
    )


scalar_args = dict(rate=jnp.array(1.3), level=jnp.array(0.6))


def scalar_loss(adjoint, y0, args, key=None, **kwargs):
    key = jr.key(0) if key is None else key
    return weigh(scalar_solve(y0, args, key, adjoint, **kwargs).ys)


@pytest.mark.parametrize("num_steps", by_default_unless((1, 127), (1, 63, 127)))
def test_any_number_of_steps(num_steps):
    """Also around the length of a page of the tape."""
    loss = lambda *args: scalar_loss(
        *args,
        num_steps=num_steps,
        max_steps=num_steps,
        saveat=diffrax.SaveAt(t0=True, ts=[0.0, 0.2, 0.5, 0.99, 1.0], t1=True),
    )
    assert_equal_gradients(loss, 0.3 * jnp.ones(()), scalar_args)


def grad_of_vmaps(solve, y0, args, grad=jax.grad):
    batched = jax.vmap(solve, in_axes=(0, None, 0))
    twice = jax.vmap(batched, in_axes=(None, None, 0))
    nested = lambda y0, args: jnp.sum(twice(y0, args, keys(6).reshape(2, 3)))
    return grad(nested, argnums=(0, 1))(y0, args)


def jacobian_of_vmap(solve, y0, args, jacobian=jax.jacrev):
    batched = jax.vmap(solve, in_axes=(0, None, 0))
    return jacobian(batched, argnums=1)(y0, args, keys(3))


def vmap_of_grad(solve, y0, args, grad=jax.grad):
    of_each = grad(solve, argnums=(0, 1))
    return jax.vmap(of_each, in_axes=(0, None, 0))(y0, args, keys(3))


def vmap_of_grad_with_many_args(solve, y0, args, grad=jax.grad):
    many = jtu.tree_map(lambda x: jnp.stack([x, 0.5 * x, 1.5 * x]), args)
    return jax.vmap(grad(solve, argnums=(0, 1)))(y0, many, keys(3))


@pytest.mark.parametrize(
    "derivative",
    by_default_unless(
        (grad_of_vmaps, jacobian_of_vmap, vmap_of_grad_with_many_args),
        (
            grad_of_vmaps,
            jacobian_of_vmap,
            vmap_of_grad,
            vmap_of_grad_with_many_args,
        ),
    ),
)
def test_all_orders_of_vmap_and_grad(derivative):
    y0 = jnp.array([0.1, 0.5, 0.9])
    of = jax.jit(derivative, static_argnums=(0, 3))
    actual = of(ft.partial(scalar_loss, StochasticAdjoint()), y0, scalar_args)
    solve = ft.partial(scalar_loss, diffrax.ForwardMode())
    expected = of(solve, y0, scalar_args, jax.jacfwd)
    assert relative_error(actual, expected) < 1e-10


def test_without_jit():
    """`jax.grad` alone, of a solve that is not within a `jit` of the user's: by this
    adjoint, and by the default one of diffrax.
    """
    grads = [
        jax.grad(lambda y0: scalar_loss(adjoint, y0, scalar_args))(0.3)
        for adjoint in (StochasticAdjoint(), diffrax.RecursiveCheckpointAdjoint())
    ]
    np.testing.assert_allclose(*grads, rtol=1e-10)


def test_pytree_states():
    """Several leaves of different shapes, one of them empty."""
    y0 = {"x": jnp.array([0.3, -0.2]), "v": (jnp.array([[0.1], [0.4]]), jnp.ones((0,)))}

    def drift(t, y, args):
        x, (v, empty) = y["x"], y["v"]
        return {"x": args * v[:, 0], "v": (-jnp.sin(x)[:, None] - 0.1 * v, empty)}

    def diffusion(t, y, args):
        x, (v, _) = y["x"], y["v"]
        noise = (jnp.stack([jnp.cos(v)] * 3, axis=-1), jnp.ones((0, 2)))
        return {"x": args * jnp.stack([jnp.sin(x)] * 2, axis=-1), "v": noise}

    f64 = jnp.float64
    shape = {"x": struct((2,), f64), "v": (struct((3,), f64), struct((2,), f64))}

    def loss(adjoint, y0, args):
        path = SmoothPath(shape, jr.key(0))
        sol = diffrax.diffeqsolve(
            make_terms(drift, diffusion, path),
            ReversibleHeun(),
            0.0,
            1.0,
            0.05,
            y0,
            args,
            saveat=diffrax.SaveAt(t0=True, t1=True, ts=[0.5, 0.52]),
            adjoint=adjoint,
        )
        return weigh(sol.ys)

    assert_equal_gradients(loss, y0, jnp.array(0.7))


@pytest.mark.slow
def test_ode_and_cde():
    """A control with a derivative: its coefficients are differentiated as well."""
    ts = jnp.linspace(0, 1, 6)
    xs = jnp.stack([jnp.sin(3 * ts), ts**2], axis=-1)

    def loss(adjoint, xs, y0, args):
        control = diffrax.CubicInterpolation(
            ts, diffrax.backward_hermite_coefficients(ts, xs)
        )
        cde = diffrax.ControlTerm(
            lambda t, y, args: jnp.stack([jnp.sin(y), args * y], axis=-1), control
        )
        ode = diffrax.ODETerm(lambda t, y, args: jnp.cos(args * t) * y)
        for terms in (ode, cde, diffrax.MultiTerm(ode, cde)):
            sol = diffrax.diffeqsolve(
                terms, ReversibleHeun(), 0.0, 1.0, 0.05, y0, args, adjoint=adjoint
            )
            y0 = sol.ys[0]
        return weigh(y0)

    assert_equal_gradients(loss, xs, jnp.array([0.3, 0.4]), jnp.array(0.8))


class ScaledTerm(diffrax.ControlTerm):
    """Its product with a control has a parameter."""

    scale: Array

    def __init__(self, vector_field, control, scale):
        super().__init__(vector_field, control)
        self.scale = scale

    def prod(self, vf, control):
        return self.scale * super().prod(vf, control)


@pytest.mark.slow
def test_products_with_a_control():
    """They have parameters of their own, or another dtype than the solution."""
    ts = jnp.linspace(0, 1, 6)

    def loss(adjoint, xs, scale):
        line = diffrax.LinearInterpolation(ts, xs)

        def vf(t, y, args):
            return jnp.cos(y)

        def solve(term):
            return diffrax.diffeqsolve(
                term,
                ReversibleHeun(),
                0.0,
                1.0,
                0.1,
                jnp.array(0.5),
                adjoint=adjoint,
            ).ys

        single_precision = diffrax.ControlTerm(
            lambda t, y, args: vf(t, y, args).astype(jnp.float32),
            jtu.Partial(
                lambda line, t0, t1: line.evaluate(t0, t1).astype(jnp.float32), line
            ),
        )
        return weigh([solve(ScaledTerm(vf, line, scale)), solve(single_precision)])

    with jax.numpy_dtype_promotion("standard"):
        assert_equal_gradients(loss, jnp.sin(3 * ts), jnp.array(1.2), tol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ("undo_staggered", "undo_carried"))
def test_batch_of_cdes(monkeypatch, way):
    """What drives them is differentiated, be it shared or each element's own; they
    have different numbers of steps and of pages of them, and one has none. The vector
    field is evaluated once a step.
    """
    ways = []
    undo = getattr(rule, way)

    def spy(*args):
        ways.append(way)
        return undo(*args)

    monkeypatch.setattr(rule, way, spy)

    def saveat(t1):
        if way == "undo_staggered":
            return diffrax.SaveAt(t0=True, t1=True)
        # What is saved inside of steps is not linear in the solution.
        fn = lambda t, y, args: args * y**2
        return diffrax.SaveAt(t0=True, ts=t1 * jnp.array([0.3, 0.9]), fn=fn)

    ts = jnp.linspace(0, 1, 6)
    others = jr.normal(jr.key(0), (4, 6))
    t1s = jnp.array([0.3, 1.0, 0.0, 0.5])

    def loss(adjoint, shared, others, y0, args):
        def solve(own, y0, t1):
            xs = jnp.stack([shared, own], axis=-1)
            cde = diffrax.ControlTerm(
                lambda t, y, args: jnp.stack([jnp.sin(y + t), args * y], axis=-1),
                diffrax.LinearInterpolation(ts, xs),
            )
            return diffrax.diffeqsolve(
                cde,
                ReversibleHeun(),
                0.0,
                t1,
                0.04,
                y0,
                args,
                saveat=saveat(t1),
                adjoint=adjoint,
                max_steps=32,
            ).ys

        return weigh(jax.vmap(solve)(others, y0, t1s))

    inputs = (others[0] - 1, others, jr.normal(jr.key(1), (4, 2)), jnp.array(0.8))
    expected = grad_in_forward_mode(
        lambda inputs: loss(diffrax.ForwardMode(), *inputs), inputs
    )
    for checkpoint_every in (None, 4):
        adjoint = StochasticAdjoint(checkpoint_every=checkpoint_every)
        actual = jax.jit(jax.grad(lambda inputs, a=adjoint: loss(a, *inputs)))(inputs)
        assert relative_error(actual, expected) < 1e-10
        assert ways
        ways.clear()


def grad_of_all(solve, rate, y0, data):
    return jax.grad(solve, argnums=(0, 1, 2))(rate, y0, data[0])


def grad_with_a_traced_rate(solve, rate, y0, data):
    return jax.grad(lambda y0: solve(rate, y0, data[0]))(y0)


def vmap_of_grad_of_rate(solve, rate, y0, data):
    return jax.vmap(jax.grad(solve), in_axes=(None, None, 0))(rate, y0, data)


def grad_of_vmap_over_data(solve, rate, y0, data):
    mapped = jax.vmap(solve, in_axes=(None, None, 0))
    return jax.grad(lambda rate: jnp.sum(mapped(rate, y0, data)))(rate)


@pytest.mark.parametrize(
    "derivative",
    by_default_unless(
        (grad_of_all, grad_with_a_traced_rate, vmap_of_grad_of_rate),
        (
            grad_of_all,
            grad_with_a_traced_rate,
            vmap_of_grad_of_rate,
            grad_of_vmap_over_data,
        ),
    ),
)
def test_closures(derivative):
    """Vector fields that refer to arrays that are differentiated, mapped or traced."""

    def loss(adjoint, rate, y0, data):
        path = SmoothPath({"x": struct((2,), y0.dtype)}, jr.key(0))
        drift = lambda t, y, args: {"x": jnp.sin(rate * y["x"] + t) * data}
        diffusion = lambda t, y, args: {"x": jnp.stack([rate * y["x"]] * 2, axis=-1)}
        sol = diffrax.diffeqsolve(
            make_terms(drift, diffusion, path),
            ReversibleHeun(),
            0.0,
            1.0,
            1.0,
            {"x": y0},
            adjoint=adjoint,
        )
        return weigh(sol.ys)

    y0, data = jnp.array([0.3, 0.5]), jnp.array([[1.0, 2.0], [3.0, -1.0]])

    rate = jnp.array(0.7)

    # There is one step, so what is expected can be written down.
    def heun(rate, y0, data):
        path = SmoothPath({"x": struct((2,), y0.dtype)}, jr.key(0))
        dw = path.evaluate(0.0, 1.0)["x"]
        increment = lambda t, y: jnp.sin(rate * y + t) * data + rate * y * jnp.sum(dw)
        yhat1 = y0 + increment(0.0, y0)
        return weigh(
            {"x": (y0 + 0.5 * (increment(0.0, y0) + increment(1.0, yhat1)))[None]}
        )

    of = jax.jit(derivative, static_argnums=0)
    ours = of(ft.partial(loss, StochasticAdjoint()), rate, y0, data)
    assert relative_error(ours, of(heun, rate, y0, data)) < 1e-10


@pytest.mark.parametrize(
    "saveat",
    (
        dict(t1=True),
        pytest.param(dict(ts=[5.0, 5.03, 5.9], t0=True), marks=pytest.mark.slow),
    ),
)
def test_batch_of_different_step_sizes(saveat):
    """Elements that have fewer steps, or fewer pages of them, are left alone."""

    def loss(adjoint, y0, args):
        def solve(dt):
            path = SmoothPath(struct((), jnp.float64), jr.key(0))
            terms = make_terms(
                lambda t, y, args: jnp.sin(args["rate"] * y),
                lambda t, y, args: args["level"] * jnp.cos(y),
                path,
            )
            return diffrax.diffeqsolve(
                terms,
                ReversibleHeun(),
                5.0,
                6.0,
                dt,
                y0,
                args,
                saveat=diffrax.SaveAt(**saveat),
                adjoint=adjoint,
                max_steps=200,
            ).ys

        return weigh(jax.vmap(solve)(1 / jnp.array([1.0, 20.0, 100.0, 200.0])))

    assert_equal_gradients(loss, jnp.array(0.3), scalar_args)


def test_diffrax_reversible_heun_is_accepted():
    value_and_grad = lambda solver: jax.value_and_grad(
        lambda y0: scalar_loss(StochasticAdjoint(), y0, scalar_args, solver=solver)
    )(0.3)
    assert value_and_grad(diffrax.ReversibleHeun()) == value_and_grad(ReversibleHeun())


def test_solver_state_in_and_out():
    """Two solves, of which the second continues from the state of the first."""

    def loss(adjoint, y0, args):
        kwargs = dict(adjoint=adjoint, num_steps=20)
        save = diffrax.SaveAt(t1=True, solver_state=True)
        first = scalar_solve(y0, args, jr.key(0), saveat=save, **kwargs)
        second = scalar_solve(
            first.ys[0],
            args,
            jr.key(1),
            saveat=save,
            solver_state=first.solver_state,
            **kwargs,
        )
        return weigh((second.ys, second.solver_state))

    assert_equal_gradients(loss, jnp.array(0.3), scalar_args)


@pytest.mark.parametrize("max_steps", by_default_unless((19,), (1, 19)))
def test_incomplete_solve(max_steps):
    """What was saved before the solve ran out of steps has its gradient."""

    def loss(adjoint, y0, args):
        saveat = diffrax.SaveAt(t0=True, ts=[0.0, 0.02, 0.2, 0.23, 0.9], t1=True)
        sol = scalar_solve(
            y0,
            args,
            jr.key(0),
            adjoint,
            max_steps=max_steps,
            throw=False,
            saveat=saveat,
        )
        ys = sol.ys
        return weigh(jnp.where(jnp.isfinite(ys), ys, 0))

    assert_equal_gradients(loss, jnp.array(0.3), scalar_args)


def test_no_steps():
    """`t0 == t1`, where every output is `y0`."""

    def loss(adjoint, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: y),
            ReversibleHeun(),
            1.0,
            1.0,
            0.1,
            y0,
            saveat=diffrax.SaveAt(t0=True, ts=[1.0, 1.0], t1=True),
            adjoint=adjoint,
        )
        return weigh(sol.ys)

    assert_equal_gradients(loss, jnp.array([0.3, 0.4]), tol=1e-14)


def test_closed_form():
    """Geometric Brownian motion: `y(1) = y0 exp(a + b W(1))`."""

    def grads(key):
        num_steps = 2000
        path = BrownianInterval(0.0, 1.0, (), key, dt=1 / num_steps)

        def loss(y0, a_b):
            terms = make_terms(
                lambda t, y, args: args[0] * y, lambda t, y, args: args[1] * y, path
            )
            sol = diffrax.diffeqsolve(
                terms,
                ReversibleHeun(),
                0.0,
                1.0,
                1 / num_steps,
                y0,
                a_b,
                adjoint=StochasticAdjoint(),
            )
            assert sol.ys is not None
            return sol.ys[0]

        a_b = (0.2, 0.5)
        grad_y0, grad_a_b = jax.grad(loss, argnums=(0, 1))(1.5, a_b)
        w = path.evaluate(1.0)
        y1 = 1.5 * jnp.exp(a_b[0] + a_b[1] * w)
        return (grad_y0, *grad_a_b), (y1 / 1.5, y1, w * y1)

    actual, exact = jax.jit(jax.vmap(grads))(keys(10))
    assert relative_error(actual, exact) < 5e-3


def test_orbit_through_zero():
    """A solve that starts and ends at zero has not drifted for that."""

    def loss(adjoint, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.cos(t)),
            ReversibleHeun(),
            0.0,
            2 * jnp.pi,
            2 * jnp.pi / 100,
            y0,
            adjoint=adjoint,
        ).ys[0]

    assert_equal_gradients(loss, jnp.array(0.0))


class NoState(AbstractReversibleSolver):
    """The Euler method for a vector field of time alone; `state` is of no use to it."""

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation
    state: Any = None

    def init(self, terms, t0, t1, y0, args):
        return self.state

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1 = y0 + terms.vf_prod(t0, y0, args, terms.contr(t0, t1))
        info = dict(y0=y0, y1=y1)
        return y1, None, info, solver_state, diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        y0 = y1 - terms.vf_prod(t0, y1, args, terms.contr(t0, t1))
        return y0, dict(y0=y0, y1=y1), solver_state, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


@pytest.mark.parametrize("state", (None, (), 2.5, 3), ids=str)
def test_solver_state_that_is_not_an_array(state):
    def loss(adjoint, y0, args):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(args * t) + 0 * y),
            NoState(state),
            0.0,
            1.0,
            0.1,
            y0,
            args,
            adjoint=adjoint,
        ).ys[0]

    assert_equal_gradients(loss, jnp.array(0.3), jnp.array(0.9))


class TwoStep(AbstractReversibleSolver):
    """The leapfrog (explicit midpoint) method, as a user would add it: its state has
    the previous value, a time, and a count, which has no gradient.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation
    fails_at: int = -1

    def init(self, terms, t0, t1, y0, args):
        return y0, t0, jnp.array(0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        ym1, tm1, count = solver_state
        control = terms.contr(tm1, t1)
        y1 = ym1 + terms.vf_prod(t0, y0, args, control)
        info = dict(y0=y0, y1=y1)
        return y1, None, info, (y0, t0, count + 1), diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        y0, _, count = solver_state
        # Its steps are uniform, but for the first one, which is an Euler step.
        tm1 = jnp.where(count == 1, t0, t0 - (t1 - t0))
        ym1 = y1 - terms.vf_prod(t0, y0, args, terms.contr(tm1, t1))
        info = dict(y0=y0, y1=y1)
        result = diffrax.RESULTS.where(
            count == self.fails_at,
            diffrax.RESULTS.internal_error,
            diffrax.RESULTS.successful,
        )
        return y0, info, (ym1, tm1, count - 1), result

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def two_step_loss(adjoint, y0, args, solver=None, **kwargs):
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.sin(args * y + t)),
        TwoStep() if solver is None else solver,
        0.0,
        1.0,
        0.125,
        y0,
        args,
        saveat=diffrax.SaveAt(t1=True, ts=[0.3, 0.5]),
        adjoint=adjoint,
        **kwargs,
    )
    return weigh(sol.ys)


def test_solver_of_a_user():
    assert_equal_gradients(two_step_loss, jnp.array([0.2, 0.4]), jnp.array(0.9))


class WithBadInverse(TwoStep):
    """What `backward_step` returns, changed by a function."""

    change: Callable = eqx.field(static=True, default=lambda out: out)

    def backward_step(self, *args, **kwargs):
        return self.change(super().backward_step(*args, **kwargs))


bad_inverses = {
    "three things": (lambda out: out[:3], "must return a tuple of four things"),
    "a list": (lambda out: list(out), "must return a tuple of four things"),
    "no state": (
        lambda out: (*out[:2], None, out[3]),
        "a solver state of the same structure as it was given",
    ),
    "another dtype": (
        lambda out: (out[0].astype(jnp.float32), *out[1:]),
        "a solver state of the same structure as it was given",
    ),
}


@pytest.mark.parametrize("name", bad_inverses)
def test_what_backward_step_returns(name):
    change, match = bad_inverses[name]
    solver = WithBadInverse(change=change)
    loss = lambda y0: two_step_loss(StochasticAdjoint(), y0, 0.9, solver)
    with pytest.raises(ValueError, match=f"`WithBadInverse.backward_step` .*{match}"):
        jax.grad(loss)(jnp.array(0.2))


def test_backward_step_that_is_not_the_inverse():
    """It is not blamed on the dynamics."""

    def off(out):
        y0, info, (ym1, *others), result = out
        return y0, info, (ym1 + 0.1, *others), result

    def loss(y0, solver):
        return two_step_loss(StochasticAdjoint(), y0, 0.9, solver)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    match = "`WithBadInverse.backward_step` is not the inverse of `WithBadInverse.step`"
    with pytest.raises(RuntimeError, match=match):
        gradient(jnp.array(0.2), WithBadInverse(change=off))
    assert jnp.isfinite(gradient(jnp.array(0.2), WithBadInverse()))


def test_step_that_cannot_be_undone():
    loss = lambda y0, throw: two_step_loss(
        StochasticAdjoint(), y0, 0.9, TwoStep(fails_at=3), throw=throw
    )
    loss(jnp.array(0.2), throw=True)
    with pytest.raises(RuntimeError):
        eqx.filter_jit(eqx.filter_grad(loss))(jnp.array(0.2), throw=True)
    grad = eqx.filter_jit(eqx.filter_grad(loss))(jnp.array(0.2), throw=False)
    assert jnp.isnan(grad)


def ou_solution(adjoint, args, horizon, dt, dtype, key=None, **kwargs):
    """The final value of an OU process; `args` are its rate and its diffusion."""
    t0, t1, dt = (jnp.asarray(x, dtype) for x in (0, horizon, dt))
    key = jr.key(0) if key is None else key
    path = BrownianInterval(t0, t1, struct((), dtype), key, dt=dt)
    terms = make_terms(
        lambda t, y, args: -args[0] * y, lambda t, y, args: args[1], path
    )
    y0 = jnp.ones((), dtype)
    return diffrax.diffeqsolve(
        terms, ReversibleHeun(), t0, t1, dt, y0, args, adjoint=adjoint, **kwargs
    ).ys


@pytest.mark.parametrize(
    "dtype", (jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.slow))
)
def test_contracting_dynamics(dtype):
    """The gradient is right, or there is an error: for an OU process over horizons in
    which undoing its steps amplifies rounding errors by `exp(5 * horizon)`.
    """
    args = (jnp.array(5, dtype), jnp.array(0.5, dtype))

    @eqx.filter_jit
    def grad(horizon, adjoint, throw):
        loss = lambda args: ou_solution(
            adjoint, args, horizon, 0.01, dtype, throw=throw
        )[0]
        is_forward = isinstance(adjoint, diffrax.ForwardMode)
        return jnp.stack((jax.jacfwd if is_forward else jax.grad)(loss)(args))

    returned = []
    for horizon in jnp.array([1, 2, 4, 10], dtype):
        expected = grad(horizon, diffrax.ForwardMode(), True)
        quiet = grad(horizon, StochasticAdjoint(), False)
        returned.append(bool(jnp.all(jnp.isfinite(quiet))))
        if returned[-1]:
            tol = float(jnp.finfo(dtype).eps) ** (1 / 3)
            assert relative_error(quiet, expected) < tol
            loud = grad(horizon, StochasticAdjoint(), True)
            np.testing.assert_array_equal(loud, quiet)
        else:
            assert jnp.all(jnp.isnan(quiet))
            with pytest.raises(RuntimeError, match=r"not stable|could not undo"):
                grad(horizon, StochasticAdjoint(), True)
    assert returned == [True, dtype == jnp.float64, False, False]


def test_reconstruction_error_of_a_part():
    """One component is found far from where it was, but it hardly matters."""
    f32 = jnp.float32

    @jax.jit
    @jax.grad
    def grad(rate):
        decay = lambda t, y, args: jnp.stack([-rate * y[0], 0 * y[1]])
        ys = diffrax.diffeqsolve(
            diffrax.ODETerm(decay),
            ReversibleHeun(),
            f32(0),
            f32(1),
            f32(1 / 1024),
            jnp.ones(2, f32),
            adjoint=StochasticAdjoint(),
            saveat=diffrax.SaveAt(ts=jnp.array([0.05, 1], f32)),
            max_steps=1024,
        ).ys
        return f32(1e-3) * ys[0, 0] ** 2 + ys[1, 1]

    with pytest.raises(RuntimeError, match="could not undo the steps"):
        grad(f32(20))


@pytest.mark.slow
def test_harmless_reconstruction_errors():
    """States found inaccurately are no error where the loss hardly depends on them."""
    f32 = jnp.float32

    def loss(adjoint, args):
        solve = lambda key: ou_solution(
            adjoint, args, 10, 1e-3, f32, key=key, max_steps=10_000
        )
        return weigh(jax.vmap(solve)(keys(8)))

    # Errors in the first state are 4e-4.
    assert_equal_gradients(loss, (f32(0.7), f32(0.5)), tol=1e-4)


def test_memory_does_not_grow():
    """At most 16 bytes a step."""

    def temporary_bytes(num_steps):
        loss = lambda y0, args: scalar_loss(
            StochasticAdjoint(), y0, args, num_steps=num_steps, max_steps=num_steps
        )
        compiled = jax.jit(jax.grad(loss)).lower(0.3, scalar_args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, more, many = map(temporary_bytes, (10, 1000, 100_000))
    assert more - few <= 16 * 990
    assert many - more <= 16 * 99_000


@pytest.mark.parametrize("num", (0, -1))
def test_bad_checkpoint_every(num):
    with pytest.raises(ValueError, match="`StochasticAdjoint\\(checkpoint_every"):
        StochasticAdjoint(checkpoint_every=num)


def test_unsafe_brownian_path():
    terms = make_terms(
        lambda t, y, args: y,
        lambda t, y, args: y,
        diffrax.UnsafeBrownianPath((), jr.key(0)),
    )
    with pytest.raises(ValueError, match="`UnsafeBrownianPath`"):
        scalar_loss(StochasticAdjoint(), 0.3, scalar_args, terms=terms)


def test_max_steps_none():
    loss = lambda y0: scalar_loss(StochasticAdjoint(), y0, scalar_args, max_steps=None)
    expected = scalar_loss(StochasticAdjoint(), 0.3, scalar_args)
    np.testing.assert_allclose(loss(0.3), expected, rtol=1e-14)
    with pytest.raises(ValueError, match="max_steps=None"):
        jax.grad(loss)(0.3)


ode = diffrax.ODETerm(lambda t, y, args: y)


def test_closures_of_controls():
    """They are an error; what is a part of a control is differentiated."""

    def loss(adjoint, rate, is_part):
        increment = lambda rate, t0, t1: rate * (t1 - t0)
        if is_part:
            control = jtu.Partial(
                lambda rate, t0, t1=None, left=True: increment(rate, t0, t1), rate
            )
        else:
            control = lambda t0, t1=None, left=True: increment(rate, t0, t1)
        term = diffrax.ControlTerm(lambda t, y, args: y, control)
        return diffrax.diffeqsolve(
            term, ReversibleHeun(), 0.0, 1.0, 0.25, 1.0, adjoint=adjoint
        ).ys[0]

    part_of_control = lambda adjoint, rate: loss(adjoint, rate, True)
    assert_equal_gradients(part_of_control, jnp.array(0.7))
    with pytest.raises(RuntimeError, match="what a control refers to by closure"):
        jax.grad(lambda rate: loss(StochasticAdjoint(), rate, False))(0.7)


def test_solvers_are_not_differentiated():
    def solve(numbers):
        solver = eqx.tree_at(
            lambda s: s.state, NoState(0.0), numbers, is_leaf=lambda x: x is None
        )
        return diffrax.diffeqsolve(
            ode, solver, 0.0, 1.0, 0.1, 1.0, adjoint=StochasticAdjoint()
        ).ys[0]

    with pytest.raises(RuntimeError, match="does not differentiate `solver`"):
        jax.grad(solve)(0.5)


def test_times_of_a_solve_with_a_brownian_path():
    def solve(t1):
        path = BrownianInterval(0.0, 2.0, (), jr.key(0))
        terms = make_terms(lambda t, y, args: y, lambda t, y, args: y, path)
        return diffrax.diffeqsolve(
            terms, ReversibleHeun(), 0.0, t1, 0.1, 1.0, adjoint=StochasticAdjoint()
        ).ys[0]

    with pytest.raises(RuntimeError, match="times of a Brownian increment"):
        jax.grad(solve)(1.0)


def test_times_with_progress_meter():
    def solve(t1, y0):
        return diffrax.diffeqsolve(
            ode,
            ReversibleHeun(),
            0.0,
            t1,
            0.1,
            y0,
            adjoint=StochasticAdjoint(),
            progress_meter=diffrax.TextProgressMeter(),
        ).ys[0]

    assert np.isfinite(jax.grad(solve, argnums=1)(1.0, 1.0))
    with pytest.raises(ValueError, match="progress_meter"):
        jax.grad(solve)(1.0, 1.0)


def test_parameters_that_are_also_in_the_controller():
    """What is differentiated may be found in several places."""

    def loss(adjoint, x):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(args * y)),
            diffrax.Heun(),
            x,
            3 * x,
            x / 8,
            x,
            x,
            adjoint=adjoint,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmax=x),
        ).ys[0]

    assert_equal_gradients(loss, jnp.array(0.4))


@pytest.mark.slow
def test_times_with_outputs_that_are_not_numbers():
    """They have no part in the derivative, as they are not written or not used."""

    def loss(adjoint, t1):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(y) + t),
            diffrax.HalfSolver(diffrax.Heun()),
            0.0,
            t1,
            0.11,
            1.2,
            saveat=diffrax.SaveAt(steps=True),
            adjoint=adjoint,
            max_steps=32,
            # Never happens; its derivative is infinite.
            event=diffrax.Event(
                lambda t, y, args, **kwargs: jnp.sqrt(jnp.maximum(y - 100, 0)) - 1
            ),
        )
        return jnp.sum(jnp.where(jnp.isfinite(sol.ts), sol.ys**2, 0))

    ours, expected = (
        jax.grad(loss, argnums=1)(adjoint, 1.0)
        for adjoint in (StochasticAdjoint(), diffrax.RecursiveCheckpointAdjoint())
    )
    assert expected != 0
    assert relative_error(ours, expected) < 1e-10


def test_class_for_an_instance(monkeypatch):
    # Users do not have the type checks that the tests have.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"was given the class. Pass an instance"):
        two_step_loss(StochasticAdjoint, jnp.array(0.2), 0.9)


forward_mode = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
}


@pytest.mark.parametrize("jit", (False, True))
@pytest.mark.parametrize("name", forward_mode)
def test_forward_mode(name, jit):
    loss = lambda y0: two_step_loss(StochasticAdjoint(), y0, 0.9, ReversibleHeun())
    fn = lambda y0: forward_mode[name](loss, y0)
    with pytest.raises(ValueError, match=r"not support forward mode .*ForwardMode"):
        (jax.jit(fn) if jit else fn)(jnp.array([0.2, 0.4]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "adjoint", (StochasticAdjoint(), None), ids=("ours", "default")
)
@pytest.mark.parametrize("name", ("ReversibleHeun", "Heun"))
def test_element_without_length(name, adjoint):
    """In a batch, also where this is the end of the path. diffrax's own adjoint has the
    solver take a step from there, which is not used, and which only ours keeps from
    leaving the path.
    """
    solver = dict(ReversibleHeun=ReversibleHeun(), Heun=diffrax.Heun())[name]
    t0 = jnp.array([0.0, 0.4, 1.0 if adjoint is not None else 0.5])
    t1 = jnp.array([0.3, 1.0, 1.0 if adjoint is not None else 0.5])
    kwargs = {} if adjoint is None else dict(adjoint=adjoint)

    @ft.partial(jax.jit, static_argnames="adjoint")
    def solve(t0, t1, y0, **kwargs):
        path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=0.1)
        terms = make_terms(lambda t, y, args: -y, lambda t, y, args: 0.5 * y, path)
        return diffrax.diffeqsolve(terms, solver, t0, t1, 0.1, y0, **kwargs).ys[-1]

    def loss(y0):
        return jnp.sum(jax.vmap(lambda *x: solve(*x, **kwargs))(t0, t1, y0) ** 2)

    y0 = jnp.array([1.0, 2.0, 3.0])
    value, grad = jax.jit(jax.value_and_grad(loss))(y0)
    # The third solution stays where it is.
    assert grad[2] == 6
    expected = sum(solve(*x) ** 2 for x in zip(t0[:2], t1[:2], y0[:2], strict=True))
    np.testing.assert_allclose(value, expected + 9, rtol=1e-12)


def far_from_the_solution(y0):
    """With steps that are too long for the backward SDE."""
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -5 * y),
        diffrax.Heun(),
        0.0,
        4.0,
        0.01,
        y0,
        adjoint=BackwardSDEAdjoint(dt0=1.0),
    )
    return sol.ys[0] ** 2


@pytest.mark.parametrize(
    "loss,match",
    (
        (
            lambda y0: two_step_loss(
                StochasticAdjoint(),
                y0,
                0.9,
                WithBadInverse(change=lambda out: (out[0] + 1, *out[1:])),
            ),
            "backward_step",
        ),
        (far_from_the_solution, "from where the forward solve had been"),
    ),
    ids=("StochasticAdjoint", "BackwardSDEAdjoint"),
)
def test_errors_are_short(loss, match, caplog, capfd):
    """Under `jax.jit`, JAX adds a traceback of its own; but not twice."""
    with pytest.raises(RuntimeError) as info:
        jax.jit(jax.grad(loss))(jnp.array(0.2))
    assert len(caplog.records) == 0
    assert "pure_callback failed" not in capfd.readouterr().err
    assert match in str(info.value)
