"""`BackwardSDEAdjoint`: convergence to the gradient of SDEs whose solution is known."""

import itertools
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from closed_forms import gradient_errors, problems
from helpers import (
    by_default_unless,
    grad_in_forward_mode,
    keys,
    make_system,
    make_terms,
    noise_shapes,
    relative_error,
    struct,
    value_and_grad_in_forward_mode,
)

from diffrax_sde_adjoint import (
    EES25,
    BackwardSDEAdjoint,
    BrownianInterval,
    Reversible,
    ReversibleHeun,
    StochasticAdjoint,
)
from diffrax_sde_adjoint._term.reversed import reversed_control


adjoint = BackwardSDEAdjoint()


class Method(NamedTuple):
    solver: diffrax.AbstractSolver
    levy_area: type[diffrax.AbstractBrownianIncrement] = diffrax.BrownianIncrement
    order: float = 1  # for noise that commutes
    problem: str = "arctan"  # that is tried by default; the others are slow
    slow: bool = False


_h = diffrax.SpaceTimeLevyArea
solvers = {
    "EulerHeun": Method(diffrax.EulerHeun()),
    "Euler": Method(diffrax.Euler(), order=0.5, problem="general", slow=True),
    "Heun": Method(diffrax.Heun(), slow=True),
    "Midpoint": Method(diffrax.Midpoint(), slow=True),
    "Ralston": Method(diffrax.Ralston(), slow=True),
    "StratonovichMilstein": Method(diffrax.StratonovichMilstein(), slow=True),
    "ReversibleHeun": Method(ReversibleHeun(), slow=True),
    "EES25": Method(EES25(), slow=True),
    "Reversible": Method(Reversible(diffrax.Heun()), slow=True),
    "SPaRK": Method(diffrax.SPaRK(), _h, slow=True),
    "GeneralShARK": Method(diffrax.GeneralShARK(), _h, slow=True),
    "SlowRK": Method(diffrax.SlowRK(), _h, slow=True),
    "ShARK": Method(diffrax.ShARK(), _h, slow=True),
    "SRA1": Method(diffrax.SRA1(), _h, slow=True),
    "SEA": Method(diffrax.SEA(), _h, slow=True),
    "ItoMilstein": Method(diffrax.ItoMilstein(), slow=True),
}
for_additive_noise = ("ShARK", "SRA1", "SEA")


def is_slow(name, problem):
    return solvers[name].slow or problem != solvers[name].problem


def is_long(name, problem):
    in_full = ("EulerHeun", "ReversibleHeun")
    return name not in in_full and problem != solvers[name].problem


@pytest.mark.parametrize(
    "name,problem",
    by_default_unless(is_slow, itertools.product(solvers, problems), long=is_long),
)
def test_converges(name, problem):
    solver, levy_area, order, *_ = solvers[name]
    if problem == "damped":
        order = 1
    errors = lambda: gradient_errors(
        problems[problem],
        solver,
        adjoint,
        keys(64),
        jnp.array([16.0, 256.0]),
        levy_area,
    )
    if name in for_additive_noise and not problems[problem].is_additive:
        with pytest.raises(ValueError, match="constant, independent of y"):
            errors()
        return
    coarse, fine = errors()
    # Over few paths, the measured order of Euler's method varies.
    assert np.log2(coarse / fine) / 4 > order - (0.2 if order == 0.5 else 0.15)
    assert fine < 0.1


def make_loss(noise, dtype, solver, saveat, dt=1 / 512, levy_area=None, **kwargs):
    """A function of all parameters, and of a key."""
    drift, diffusion, y0, args = make_system(noise, dtype)
    t0, t1, dt = (jnp.array(x, dtype) for x in (0, 1, dt))
    shape = struct(noise_shapes[noise], dtype)

    def loss(params, key, adjoint, **others):
        drift, diffusion, y0, args = params
        path = BrownianInterval(
            t0,
            t1,
            shape,
            key,
            dt=dt,
            levy_area=levy_area or diffrax.BrownianIncrement,
        )
        all_kwargs = dict(dt0=dt, max_steps=1024) | kwargs | others
        backward = all_kwargs.pop("backward_in_time", False)
        if backward:
            all_kwargs["dt0"] = -all_kwargs["dt0"]
        sol = diffrax.diffeqsolve(
            make_terms(drift, diffusion, path),
            solver,
            t1 if backward else t0,
            t0 if backward else t1,
            y0=y0,
            args=args,
            saveat=saveat,
            adjoint=adjoint,
            **all_kwargs,
        )
        leaves = [x.ravel() for x in jtu.tree_leaves(sol.ys)]
        x = jnp.concatenate(leaves)
        return jnp.sum(jnp.cos(jnp.arange(x.size).astype(dtype)) * (x + x**2))

    return loss, (drift, diffusion, y0, args)


_ts = (0.0, 0.25, 0.25, 0.4999, 1.0)


@pytest.mark.parametrize(
    "case",
    (
        pytest.param("general", marks=pytest.mark.slow),
        pytest.param("float32", marks=pytest.mark.slow),
        pytest.param("backward in time", marks=pytest.mark.slow),
        pytest.param("checkpoint_every", marks=pytest.mark.slow),
        pytest.param("subs", marks=pytest.mark.slow),
        pytest.param("Euler", marks=pytest.mark.slow),
    ),
)
def test_close_to_the_exact_gradient(case):
    """For small steps; with a batch that shares parameters, and outputs on the grid and
    off it, repeated, and at both ends.
    """
    dtype = jnp.float32 if case == "float32" else jnp.float64
    backward = case == "backward in time"
    ts = jnp.array(_ts[::-1] if backward else _ts, dtype)
    saveat = diffrax.SaveAt(t0=True, ts=ts, t1=True)
    if case == "subs":
        sub = diffrax.SubSaveAt
        saveat = diffrax.SaveAt(subs=dict(a=sub(ts=ts), b=[sub(t1=True, ts=ts[1:2])]))
    solver = diffrax.Euler() if case == "Euler" else diffrax.Heun()
    noise = "diagonal" if case == "float32" else "general"
    loss, params = make_loss(noise, dtype, solver, saveat, backward_in_time=backward)
    every = 100 if case == "checkpoint_every" else None

    def total(params, adjoint):
        return jnp.sum(jax.vmap(lambda key: loss(params, key, adjoint))(keys(4)))

    adjoint = BackwardSDEAdjoint(checkpoint_every=every)
    actual = eqx.filter_jit(eqx.filter_grad(total))(params, adjoint)
    expected = grad_in_forward_mode(
        lambda params: total(params, diffrax.ForwardMode()), params
    )
    # Both have an error of this size as approximations of the SDE's.
    error = relative_error(actual, expected)
    assert error < (0.3 if case == "Euler" else 0.03)
    # And it is not that exact gradient itself.
    assert error > 1e-7


@pytest.mark.slow
def test_per_element_gradients_are_kept_apart():
    saveat = diffrax.SaveAt(t1=True)
    loss, params = make_loss("scalar", jnp.float64, diffrax.Heun(), saveat, dt=1 / 32)
    gradient = eqx.filter_jit(lambda key: eqx.filter_grad(loss)(params, key, adjoint))
    together = jax.vmap(gradient)(keys(2))
    for i, key in enumerate(keys(2)):
        one = jtu.tree_map(lambda x, i=i: x[i], together)
        assert relative_error(one, gradient(key)) < 1e-12


@pytest.mark.slow
def test_numerics_of_its_own():
    """Other steps, and adaptive ones of another method, along the path of the forward
    solve.
    """
    saveat = diffrax.SaveAt(t1=True, ts=jnp.array([0.25]))
    loss, params = make_loss("scalar", jnp.float64, diffrax.Heun(), saveat)
    gradient = eqx.filter_jit(
        lambda adjoint: eqx.filter_grad(loss)(params, jr.key(4), adjoint)
    )
    flat = lambda grads: jfu.ravel_pytree(grads)[0]
    expected = flat(
        grad_in_forward_mode(
            lambda params: loss(params, jr.key(4), diffrax.ForwardMode()), params
        )
    )

    def error(**kwargs):
        actual = flat(gradient(BackwardSDEAdjoint(**kwargs)))
        return jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)

    coarse = error(dt0=1 / 8)
    assert error(dt0=1 / 64) < coarse / 4 < 0.05
    adaptive = error(
        dt0=1 / 8,
        solver=diffrax.HalfSolver(diffrax.Heun()),
        stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
        max_steps=16384,
    )
    assert adaptive < coarse / 4


@pytest.mark.slow
@pytest.mark.parametrize("solver", ("Heun", "Tsit5", "Kvaerno3"))
def test_odes(solver):
    """Also with jumps, and beside a control that is not noise."""
    _, _, y0, args = make_system("diagonal")
    ts, xs = jnp.linspace(0.0, 2.0, 5), jnp.array([0.0, 1.0, 0.5, 0.7, 0.0])
    control = diffrax.LinearInterpolation(ts, xs)
    tol = 1e-5 if solver == "Kvaerno3" else 1e-8
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(tol, tol), jump_ts=ts[1:-1]
    )
    drift = lambda t, y, args: -args["rate"] * jnp.sin(y + t)

    @jax.jit
    def gradient(y0, args):
        def loss(y0, args, adjoint):
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(drift),
                diffrax.ControlTerm(lambda t, y, args: args["level"] * y, control),
            )
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(drift) if solver == "Kvaerno3" else terms,
                getattr(diffrax, solver)(),
                0.0,
                2.0,
                0.01,
                y0,
                args,
                saveat=diffrax.SaveAt(ts=jnp.array([0.7, 2.0])),
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=16384,
            )
            return jnp.sum(sol.ys**2)

        grad = jax.grad(loss, (0, 1))
        return grad(y0, args, adjoint), grad(y0, args, StochasticAdjoint())

    actual, expected = gradient(y0, args)
    assert relative_error(actual, expected) < 1e3 * tol


def test_reversed_levy_areas():
    """Of a path, against integrals of the reversed path."""
    num = 4096
    w = jnp.cumsum(jnp.concatenate([jnp.zeros(1), jr.normal(jr.key(0), (num,))]))
    w = w / np.sqrt(num)

    def increment(w):
        r = jnp.linspace(0.0, 1.0, num + 1)
        bridge = w - w[0] - r * (w[-1] - w[0])
        return diffrax.SpaceTimeTimeLevyArea(
            dt=jnp.array(1.0),
            W=w[-1] - w[0],
            H=jnp.mean(bridge),
            K=jnp.mean(bridge * (0.5 - r)),
        )

    expected = increment(w[::-1])
    actual = reversed_control(increment(w))
    for name in ("W", "H", "K"):
        error = getattr(actual, name) - getattr(expected, name)
        assert jnp.abs(error) < 1e-12
        assert jnp.abs(getattr(expected, name)) > 1e-3
    assert actual.dt == -1

    class Other(diffrax.AbstractBrownianIncrement):
        dt: float
        W: float
        A: float

    with pytest.raises(ValueError, match="`Other`"):
        reversed_control([Other(1.0, 2.0, 3.0)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "noise,throw", (("general", True), ("general", False), ("diagonal", True))
)
def test_milstein_needs_commutative_noise(noise, throw):
    saveat = diffrax.SaveAt(t1=True)
    milstein = BackwardSDEAdjoint(solver=diffrax.StratonovichMilstein())
    loss, params = make_loss(noise, jnp.float64, diffrax.Heun(), saveat, dt=1 / 16)
    gradient = eqx.filter_jit(
        lambda: eqx.filter_grad(loss)(params, jr.key(0), milstein, throw=throw)
    )
    if noise == "diagonal":
        gradient()
    elif throw:
        with pytest.raises(eqx.EquinoxRuntimeError, match="needs commutative noise"):
            gradient()
    else:
        assert all(np.all(np.isnan(x)) for x in jtu.tree_leaves(gradient()))


@pytest.mark.slow
def test_a_backward_solve_that_goes_astray_is_an_error():
    """Steps that are too long for the backward dynamics, unless the solution starts
    anew every so many steps of the forward solve.
    """

    def loss(y0, dt0, throw, every):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -5 * y),
            diffrax.Heun(),
            0.0,
            4.0,
            0.01,
            y0,
            adjoint=BackwardSDEAdjoint(dt0=dt0, checkpoint_every=every),
            throw=throw,
        )
        assert sol.ys is not None
        return sol.ys[0] ** 2

    def gradient(dt0, throw=True, every=None):
        return eqx.filter_jit(jax.grad(loss))(jnp.array(1.0), dt0, throw, every)

    expected = 2 * np.exp(-40)
    assert abs(gradient(0.01) - expected) < 0.05 * expected
    with pytest.raises(eqx.EquinoxRuntimeError, match="gradients would be wrong"):
        gradient(0.4)
    assert np.isnan(gradient(0.4, throw=False))
    assert abs(gradient(0.4, every=2) - expected) < 0.05 * expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ("two noises", "ends early"),
)
def test_states_that_are_pytrees(case):
    """With an empty leaf, two noises, and a solve that ends before the last output."""
    t0, t1, dt = 0.0, 1.0, 1 / 512
    y0 = dict(a=jnp.array([0.5, -0.3]), b=[jnp.array(0.2), jnp.zeros((0, 2))])
    params = dict(y0=y0, rate=jnp.array(0.7), scale=jnp.array([0.3, 0.2]))
    like = lambda x: struct(x.shape, x.dtype)
    scalars = jtu.tree_map(lambda x: struct((), x.dtype), y0)

    def drift(t, y, args):
        total = jnp.sum(y["a"]) + y["b"][0]
        return jtu.tree_map(lambda x: jnp.sin(t + total) - args["rate"] * x, y)

    def mixed(t, y, args):
        return jtu.tree_map(lambda x: args["scale"][1] * jnp.cos(x) * y["b"][0], y)

    def diagonal(t, y, args):
        return lx.DiagonalLinearOperator(
            jtu.tree_map(lambda x: args["scale"][0] * jnp.sin(x), y)
        )

    max_steps = 400 if case == "ends early" else 1024
    saveat = diffrax.SaveAt(ts=jnp.array([0.25, 0.5, 1.0]))

    def loss(params, adjoint):
        keys = jr.split(jr.key(3), 2)
        path0 = BrownianInterval(t0, t1, jtu.tree_map(like, y0), keys[0], dt=dt)
        path1 = BrownianInterval(t0, t1, scalars, keys[1], dt=dt)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift),
            diffrax.ControlTerm(diagonal, path0),
            diffrax.ControlTerm(mixed, path1),
        )
        sol = diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            t0,
            t1,
            dt,
            params["y0"],
            params,
            saveat=saveat,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
        finite = jtu.tree_map(lambda x: jnp.where(jnp.isfinite(x), x, 0), sol.ys)
        leaves = [jnp.sum(jnp.cos(x)) for x in jtu.tree_leaves(finite)]
        return sum(leaves), sol.result == diffrax.RESULTS.successful

    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    (_, is_successful), actual = gradient(params, adjoint)
    assert is_successful == (case == "two noises")
    _, expected = value_and_grad_in_forward_mode(
        lambda params: loss(params, diffrax.ForwardMode()), params
    )
    assert 1e-7 < relative_error(actual, expected) < 0.03


@pytest.mark.slow
def test_edges():
    """A solve of no length, one that starts from a NaN, and a second derivative."""
    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=1 / 16)
    terms = make_terms(lambda t, y, args: -y, lambda t, y, args: jnp.cos(y), path)

    def loss(y0, t1):
        sol = diffrax.diffeqsolve(
            terms, diffrax.Heun(), 0.0, t1, 1 / 16, y0, adjoint=adjoint, throw=False
        )
        assert sol.ys is not None
        return sol.ys[0] ** 2

    gradient = jax.grad(loss)
    assert gradient(jnp.array(3.0), 0.0) == 6
    assert np.isnan(gradient(jnp.array(jnp.nan), 1.0))
    with pytest.raises(Exception, match="does not support second derivatives"):
        jax.grad(gradient)(jnp.array(3.0), 1.0)
    compiled = jax.jit(lambda y0: gradient(y0, 1.0))
    _, second = jax.jvp(compiled, (jnp.array(3.0),), (jnp.array(1.0),))
    difference = (compiled(jnp.array(3 + 1e-5)) - compiled(jnp.array(3 - 1e-5))) / 2e-5
    np.testing.assert_allclose(second, difference, rtol=1e-6)


def test_unsupported():
    loss, params = make_loss(
        "scalar", jnp.float64, diffrax.Heun(), diffrax.SaveAt(t1=True)
    )

    def run(match, adjoint=adjoint, solver=None, saveat=None, diff=params, **kwargs):
        new, _ = make_loss(
            "scalar",
            jnp.float64,
            solver or diffrax.Heun(),
            saveat or diffrax.SaveAt(t1=True),
            dt=1 / 16,
        )
        with pytest.raises(ValueError, match=match):
            eqx.filter_eval_shape(
                eqx.filter_grad(lambda p: new(p, jr.key(0), adjoint, **kwargs)), diff
            )

    saveat = diffrax.SaveAt
    run("dense=True", saveat=saveat(dense=True, t1=True))
    run("steps=", saveat=saveat(steps=True))
    run("fn=", saveat=saveat(t1=True, fn=lambda t, y, args: y[0]))
    run("events", event=diffrax.Event(lambda t, y, args, **kwargs: y[0] > 5))
    with_solver = lambda x: BackwardSDEAdjoint(solver=x)
    run("is for additive noise", with_solver(diffrax.SRA1()))
    run("not a solver for SDEs", with_solver(diffrax.Tsit5()))
    run("`LeapfrogMidpoint`", with_solver(diffrax.LeapfrogMidpoint()))
    run("`QUICSORT`", with_solver(diffrax.QUICSORT()))
    run(
        "adaptive steps of `Euler`",
        BackwardSDEAdjoint(
            solver=diffrax.HalfSolver(diffrax.Euler()),
            stepsize_controller=diffrax.PIDController(1e-3, 1e-3),
        ),
    )
    run(
        "to know how many states to keep",
        BackwardSDEAdjoint(checkpoint_every=5),
        max_steps=None,
    )
    run(
        "`StepTo`",
        dt0=None,
        stepsize_controller=diffrax.StepTo(jnp.linspace(0.0, 1.0, 5)),
    )
    with pytest.raises(ValueError, match="which is positive"):
        BackwardSDEAdjoint(dt0=-0.1)

    def of_times(ts):
        return loss(params, jr.key(0), adjoint, dt0=ts)

    with pytest.raises(Exception, match="does not differentiate with respect to the"):
        jax.grad(of_times)(jnp.array(0.1))

    def of_path(w):
        control = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.stack([w, w]))
        sol = diffrax.diffeqsolve(
            diffrax.ControlTerm(lambda t, y, args: y, control),
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            jnp.array(1.0),
            adjoint=adjoint,
        )
        assert sol.ys is not None
        return sol.ys[0]

    with pytest.raises(ValueError, match="what is in a control"):
        jax.grad(of_path)(jnp.array(0.1))

    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=0.1)
    terms = make_terms(lambda t, y, args: 0 * y, lambda t, y, args: y, path)
    _, noise = terms.terms

    for solver, backward in (
        (diffrax.Euler(), diffrax.Heun()),
        (diffrax.Heun(), diffrax.Euler()),
    ):

        def without_drift(y0, solver=solver, backward=backward):
            sol = diffrax.diffeqsolve(
                noise,
                solver,
                0.0,
                1.0,
                0.1,
                y0,
                adjoint=BackwardSDEAdjoint(solver=backward),
            )
            assert sol.ys is not None
            return sol.ys[0]

        with pytest.raises(ValueError, match="needs a drift"):
            jax.grad(without_drift)(jnp.array(1.0))
