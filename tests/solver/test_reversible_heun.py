"""`ReversibleHeun`: equal to diffrax's, undone by `backward_step`, and its orders."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from helpers import (
    SmoothPath,
    by_default_unless,
    keys,
    make_system,
    make_terms,
    noise_shapes,
    relative_error,
    struct,
    value_and_grad_in_forward_mode,
)

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


def make_solve(noise, dtype, num_steps=100):
    drift, diffusion, y0, args = make_system(noise, dtype)
    t0, t1 = jnp.zeros((), dtype), jnp.ones((), dtype)
    dt = t1 / num_steps

    def terms(key):
        shape = struct(noise_shapes[noise], dtype)
        return make_terms(drift, diffusion, BrownianInterval(t0, t1, shape, key, dt=dt))

    return terms, t0, t1, dt, y0, args


noises_and_dtypes = by_default_unless(
    (
        ("general", jnp.float64),
        ("additive", jnp.float64),
        ("scalar", jnp.float64),
        ("diagonal", jnp.float32),
    ),
    [
        *((noise, jnp.float64) for noise in noise_shapes),
        ("general operator", jnp.float32),
        ("diagonal", jnp.float32),
    ],
)


@pytest.mark.parametrize("noise,dtype", noises_and_dtypes)
def test_equals_diffrax_to_the_bit(noise, dtype):
    terms, t0, t1, dt, y0, args = make_solve(noise, dtype)

    def solve(key, solver):
        saveat = diffrax.SaveAt(
            t1=True, ts=jnp.array([0.1, 0.105, 0.7], dtype), solver_state=True
        )
        sol = diffrax.diffeqsolve(
            terms(key), solver, t0, t1, dt, y0, args, saveat=saveat
        )
        return sol.ys, sol.solver_state

    key = jr.key(0)
    ours = solve(key, ReversibleHeun())
    assert eqx.tree_equal(ours, solve(key, diffrax.ReversibleHeun()))


def test_equals_diffrax_with_adaptive_steps():
    """On the steps that it has chosen itself."""
    term = diffrax.ODETerm(lambda t, y, args: jnp.sin(3 * t) * y)

    def solve(solver, controller):
        sol = diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            3.0,
            None,
            jnp.array([1.0, 2.0]),
            saveat=diffrax.SaveAt(t0=True, steps=True),
            stepsize_controller=controller,
            max_steps=256,
        )
        num = sol.stats["num_accepted_steps"] + 1
        return sol.ts[:num], sol.ys[:num]

    pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    ts, ys = solve(ReversibleHeun(), pid)
    assert len(ts) > 20
    expected = solve(diffrax.ReversibleHeun(), diffrax.StepTo(ts))
    assert relative_error((ts, ys), expected) < 1e-14


def test_number_of_adaptive_steps():
    """About that of Heun's method, and diffrax's takes many times as many: for a
    contracting geometric Brownian motion.
    """

    @eqx.filter_jit
    def num_tries(solver, key):
        path = BrownianInterval(0.0, 2.0, (), key, dt=0.05)
        terms = make_terms(lambda t, y, args: -2 * y, lambda t, y, args: 0.5 * y, path)
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            2.0,
            0.05,
            jnp.array(1.0),
            stepsize_controller=diffrax.PIDController(
                rtol=1e-2, atol=1e-2, pcoeff=0.1, icoeff=0.3, dcoeff=0
            ),
            max_steps=5000,
            throw=False,
        )
        return sol.stats["num_steps"]

    tries = lambda solver: sum(int(num_tries(solver, key)) for key in keys(16))
    heun = tries(diffrax.Heun())
    assert tries(ReversibleHeun()) < 2 * heun
    assert tries(diffrax.ReversibleHeun()) > 3 * heun


@pytest.mark.parametrize("noise,dtype", noises_and_dtypes)
def test_backward_step_undoes_step(noise, dtype):
    """Over 1000 steps, at the state of every one of them."""
    num_steps = 1000
    make, t0, _, dt, y0, args = make_solve(noise, dtype, num_steps)
    # Not contracting: rounding errors are not amplified on the way back.
    args = args | dict(rate=jnp.zeros((), dtype))
    solver = ReversibleHeun()

    @jax.jit
    @jax.vmap
    def forwards_and_backwards(key):
        terms = make(key)
        times = lambda i: (t0 + i.astype(dtype) * dt, t0 + (i + 1).astype(dtype) * dt)

        def step(carry, i):
            y, state = carry
            y1, _, info, state1, _ = solver.step(
                terms, *times(i), y, args, state, made_jump=False
            )
            return (y1, state1), (y, info, state)

        def backward_step(carry, i):
            y, state = carry
            y0, info, state0, _ = solver.backward_step(
                terms, *times(i), y, args, state, made_jump=False
            )
            return (y0, state0), (y0, info, state0)

        i = jnp.arange(num_steps, dtype=jnp.int32)
        state0 = solver.init(terms, t0, t0 + dt, y0, args)
        final, forwards = lax.scan(step, (y0, state0), i)
        _, backwards = lax.scan(backward_step, final, i, reverse=True)
        return forwards, backwards

    forwards, backwards = forwards_and_backwards(keys(8))
    tol = 1e-13 if dtype == jnp.float64 else 1e-4
    assert relative_error(backwards, forwards) < tol


@pytest.mark.parametrize("traced", (False, True))
def test_backward_step_undoes_step_at_a_jump(traced):
    """All comes back but the vector field on the left of the jump."""
    make, t0, _, dt, y0, args = make_solve("diagonal", jnp.float64)
    terms, solver = make(jr.key(0)), ReversibleHeun()

    def run(made_jump):
        yhat0, vf0 = y0 + 0.1, terms.vf(t0 - 1, y0, args)
        y1, _, _, state1, _ = solver.step(
            terms, t0, t0 + dt, y0, args, (yhat0, vf0), made_jump
        )
        undone = solver.backward_step(terms, t0, t0 + dt, y1, args, state1, made_jump)
        y0_, _, state0, _ = undone
        return (y0_, state0), (y0, (yhat0, terms.vf(t0, yhat0, args)))

    actual, expected = jax.jit(run)(True) if traced else run(True)
    assert relative_error(actual, expected) < 1e-15


def test_order_for_odes():
    def error(num_steps):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.cos(t) * y),
            ReversibleHeun(),
            0.0,
            2.0,
            2.0 / num_steps,
            1.0,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return float(jnp.abs(sol.ys[0] - jnp.exp(jnp.sin(2.0))))

    order = np.log2(error(64) / error(128))
    assert 1.9 < order < 2.1


def test_converges_to_the_stratonovich_solution():
    """Geometric Brownian motion, whose solution is known for each path."""
    drift, level, num_paths = 0.2, 0.7, 200

    def error(num_steps):
        def solve(key):
            path = BrownianInterval(0.0, 1.0, (), key, dt=1 / num_steps)
            terms = make_terms(
                lambda t, y, args: drift * y, lambda t, y, args: level * y, path
            )
            sol = diffrax.diffeqsolve(
                terms, ReversibleHeun(), 0.0, 1.0, 1 / num_steps, 1.0
            )
            assert sol.ys is not None
            exact = jnp.exp(drift + level * path.evaluate(1.0))
            return jnp.abs(sol.ys[0] - exact)

        return float(jnp.mean(jax.jit(jax.vmap(solve))(keys(num_paths))))

    # Order one, as a single noise commutes with itself.
    order = np.log2(error(32) / error(512)) / 4
    assert 0.8 < order < 1.2


matrix = jnp.array([[0.5, -0.8], [0.9, 0.3]])
operators = {
    "multiple": (lambda y: 0.5 * lx.MatrixLinearOperator(y * matrix)),
    "quotient": (lambda y: lx.MatrixLinearOperator(y * matrix) / (1 + y[0] ** 2)),
    "product": (
        lambda y: lx.MatrixLinearOperator(matrix) @ lx.DiagonalLinearOperator(y)
    ),
    "identity": (lambda y: lx.IdentityLinearOperator(jax.eval_shape(lambda: y))),
    "function": (
        lambda y: lx.FunctionLinearOperator(
            lambda x: jnp.sin(y) * x, jax.eval_shape(lambda: y)
        )
    ),
    "Jacobian": (lambda y: lx.JacobianLinearOperator(lambda x, _: jnp.sin(x), y)),
    "product of functions": (
        lambda y: (
            lx.DiagonalLinearOperator(y)
            @ lx.FunctionLinearOperator(lambda x: matrix @ x, jax.eval_shape(lambda: y))
        )
    ),
}


adjoints = {
    "ours": StochasticAdjoint(),
    "diffrax's": diffrax.RecursiveCheckpointAdjoint(),
}


@pytest.mark.parametrize(
    "name,adjoint",
    by_default_unless(
        lambda name, adjoint: (
            name in ("quotient", "product", "identity", "Jacobian")
            or (adjoint == "diffrax's" and name != "function")
        ),
        itertools.product(operators, adjoints),
    ),
)
def test_operators_that_do_not_add_leaf_by_leaf(name, adjoint):
    """The same as with the operator's matrix, forwards and in the gradient."""
    operator = operators[name]
    path = SmoothPath(struct((2,), jnp.float64), jr.key(0))

    def loss(y0, diffusion, adjoint):
        return diffrax.diffeqsolve(
            make_terms(lambda t, y, args: -y, lambda t, y, args: diffusion(y), path),
            ReversibleHeun(),
            0.0,
            1.0,
            0.05,
            y0,
            adjoint=adjoint,
        ).ys[0, 0]

    y0 = jnp.array([0.6, -0.3])
    actual = jax.jit(
        lambda y0: jax.value_and_grad(loss)(y0, operator, adjoints[adjoint])
    )(y0)
    expected = value_and_grad_in_forward_mode(
        lambda y0: (
            loss(y0, lambda y: operator(y).as_matrix(), diffrax.ForwardMode()),
            None,
        ),
        y0,
    )
    assert relative_error(actual, (expected[0][0], expected[1])) < 1e-13


def solve_with_function(solver, **kwargs):
    path = BrownianInterval(0.0, 1.0, (2,), jr.key(0), dt=0.05)
    terms = make_terms(
        lambda t, y, args: -y, lambda t, y, args: operators["function"](y), path
    )
    return diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        1.0,
        0.05,
        jnp.array([0.6, -0.3]),
        adjoint=StochasticAdjoint(),
        **kwargs,
    ).ys


def test_functions_in_diffrax_reversible_heun():
    """Which `StochasticAdjoint` replaces by ours, state and all."""
    expected = solve_with_function(ReversibleHeun())
    actual = solve_with_function(diffrax.ReversibleHeun())
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "kwargs",
    (
        {"event": diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0)},
        {"saveat": diffrax.SaveAt(t1=True, dense=True)},
    ),
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_functions_where_diffrax_looks_at_a_step(kwargs):
    """It does so before it calls an adjoint, so that its own solver is an error."""
    solve = lambda solver: jax.eval_shape(lambda: solve_with_function(solver, **kwargs))
    assert solve(ReversibleHeun()).shape == (1, 2)
    with pytest.raises(TypeError, match="not a valid JAX type"):
        solve(diffrax.ReversibleHeun())


@pytest.mark.parametrize("checkpoint_every", by_default_unless((3,), (None, 3)))
def test_diffusion_that_is_a_number(checkpoint_every):
    """Of Python, and not an array."""

    def loss(args, level, adjoint):
        path = SmoothPath(struct((), jnp.float64), jr.key(0))
        terms = make_terms(lambda t, y, args: -args * y, lambda t, y, args: level, path)
        return diffrax.diffeqsolve(
            terms,
            ReversibleHeun(),
            0.0,
            1.0,
            0.1,
            1.0,
            args,
            adjoint=adjoint,
            max_steps=16,
        ).ys[0]

    adjoint = StochasticAdjoint(checkpoint_every=checkpoint_every)
    actual = jax.jit(lambda x: jax.grad(loss)(x, 0.4, adjoint))(0.7)
    expected = jax.jacfwd(loss)(0.7, jnp.array(0.4), diffrax.ForwardMode())
    assert abs(actual - expected) < 1e-12
