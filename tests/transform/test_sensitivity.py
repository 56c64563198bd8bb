"""Derivatives of a solution, solved forwards with it."""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import pytest
from helpers import (
    SmoothPath,
    by_default_unless,
    make_system,
    make_terms,
    noise_shapes,
    relative_error,
    struct,
)

from diffrax_sde_adjoint import (
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    forward_sensitivity,
    ito_to_stratonovich,
)


class Method(NamedTuple):
    solver: diffrax.AbstractSolver
    noise: str = "diagonal"  # that is tried by default; the others are slow
    slow: bool = False


solvers = {
    "ReversibleHeun": Method(ReversibleHeun(), noise="general"),
    "ItoMilstein": Method(diffrax.ItoMilstein()),
    "Heun": Method(diffrax.Heun(), slow=True),
    "StratonovichMilstein": Method(diffrax.StratonovichMilstein(), slow=True),
    "Euler": Method(diffrax.Euler(), slow=True),
    "SPaRK": Method(diffrax.SPaRK(), slow=True),
    "ShARK": Method(diffrax.ShARK(), noise="additive", slow=True),
}
cases = [
    (noise, name)
    for noise in noise_shapes
    for name in solvers
    if name != "ShARK" or noise == "additive"
]


def is_slow(noise, name):
    return solvers[name].slow or noise != solvers[name].noise


def make_problem(noise, dtype, levy_area=None):
    drift, diffusion, y0, args = make_system(noise, dtype)
    t0, t1, dt = (jnp.array(x, dtype) for x in (0, 1, 1 / 16))
    shape = struct(noise_shapes[noise], dtype)
    path = (
        SmoothPath(shape, jr.key(0))
        if levy_area is None
        else BrownianInterval(t0, t1, shape, jr.key(0), dt=dt, levy_area=levy_area)
    )

    def solve(terms, solver, y0, args, **kwargs):
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            t0,
            t1,
            dt,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=jnp.array([0.3, 1.0], dtype)),
            **kwargs,
        )
        assert sol.ys is not None
        return sol.ys

    normal = lambda key, *shape: jr.normal(jr.key(key), shape, dtype)
    dot_y0 = normal(1, 3, 2)
    dot_args = dict(rate=normal(2, 3), level=normal(3, 3))
    return solve, make_terms(drift, diffusion, path), (y0, dot_y0), (args, dot_args)


@pytest.mark.parametrize(
    "noise,name,dtype",
    by_default_unless(
        lambda noise, name, dtype: dtype == jnp.float32 or is_slow(noise, name),
        [(*case, dtype) for case in cases for dtype in (jnp.float64, jnp.float32)],
        long=lambda noise, name, dtype: dtype == jnp.float32 and is_slow(noise, name),
    ),
)
def test_equals_jvp(noise, name, dtype):
    if name == "ItoMilstein" and dtype == jnp.float32:
        pytest.skip("diffrax's `ItoMilstein` mixes float32 and float64")
    needs_levy_area = name in ("SPaRK", "ShARK")
    levy_area = diffrax.SpaceTimeLevyArea if needs_levy_area else None
    solve, terms, (y0, dot_y0), (args, dot_args) = make_problem(noise, dtype, levy_area)
    solver = solvers[name].solver

    @jax.jit
    def both(y0, args):
        actual = solve(
            forward_sensitivity(terms), solver, (y0, dot_y0), (args, dot_args)
        )

        def jvp(*tangents):
            fn = lambda *x: solve(terms, solver, *x, adjoint=diffrax.ForwardMode())
            return jax.jvp(fn, (y0, args), tangents)

        return actual, jax.vmap(jvp, out_axes=(None, 1))(dot_y0, dot_args)

    (ys, dot_ys), (expected_ys, expected_dot_ys) = both(y0, args)
    tol = 1e-12 if dtype == jnp.float64 else 1e-5
    assert relative_error(ys, expected_ys) < tol
    assert relative_error(dot_ys, expected_dot_ys) < tol


@pytest.mark.slow
def test_of_an_ito_model_and_differentiated():
    """The gradient of a sensitivity is a second derivative."""
    solve, terms, (y0, _), (args, _) = make_problem("diagonal", jnp.float64)
    eye = jnp.eye(2)

    @jax.jit
    @jax.jacfwd
    def expected(y0):
        def of_one(y0):
            ys = solve(
                ito_to_stratonovich(terms),
                ReversibleHeun(),
                y0,
                args,
                adjoint=diffrax.ForwardMode(),
            )
            return jnp.sum(ys[-1])

        return jax.jacfwd(of_one)(y0)

    @jax.jit
    def actual(y0):
        def gradient(y0):
            converted = forward_sensitivity(ito_to_stratonovich(terms))
            _, dot_ys = solve(
                converted,
                ReversibleHeun(),
                (y0, eye),
                (args, None),
                adjoint=StochasticAdjoint(),
            )
            return jnp.sum(dot_ys[-1], axis=1)

        return jax.jacrev(gradient)(y0)

    assert relative_error(actual(y0), expected(y0)) < 1e-9


def test_noise_that_nothing_moves():
    """Derivatives are zero where a term depends on nothing that has a direction."""
    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=1 / 4)
    terms = make_terms(
        lambda t, y, args: -args * y, lambda t, y, args: jnp.array(0.5), path
    )
    sol = diffrax.diffeqsolve(
        forward_sensitivity(terms),
        diffrax.Heun(),
        0.0,
        1.0,
        1 / 4,
        (jnp.array(1.0), jnp.ones(1)),
        (jnp.array(0.7), None),
    )
    assert sol.ys is not None
    expected = (1 - 0.7 / 4 + (0.7 / 4) ** 2 / 2) ** 4
    assert abs(sol.ys[1][0, 0] - expected) < 1e-12


def test_numbers_of_python():
    """In `args`, with a derivative beside each; and what has none is let be."""
    solve, terms, y0, (args, dot_args) = make_problem("diagonal", jnp.float64)
    run = jax.jit(
        lambda args, dot_args: solve(
            forward_sensitivity(terms), diffrax.Heun(), y0, (args, dot_args)
        )
    )
    expected = run(args, dot_args)
    others = dict(f=jnp.sin, n=3, none=None)
    numbers = {name: float(x) for name, x in args.items()} | others
    actual = solve(
        forward_sensitivity(terms),
        diffrax.Heun(),
        y0,
        (numbers, dot_args | dict.fromkeys(others)),
    )
    assert relative_error(actual, expected) < 1e-13
    assert jnp.all(expected[1][-1] != 0)


def test_errors():
    solve, terms, (y0, dot_y0), (args, dot_args) = make_problem("scalar", jnp.float64)
    run = lambda *x: solve(forward_sensitivity(terms), diffrax.Heun(), *x)
    with pytest.raises(ValueError, match="`y0 = \\(y0, dot_y0\\)`"):
        run((y0, dot_y0[0]), (args, dot_args))
    with pytest.raises(ValueError, match="`args = \\(args, dot_args\\)`"):
        wrong = jtu.tree_map(lambda x: x[0], dot_args)
        run((y0, dot_y0), (args, wrong))
    with pytest.raises(ValueError, match="must be a pair"):
        run(y0, (args, dot_args))
    with pytest.raises(ValueError, match="of `dot_y0`, no part may be `None`"):
        run((y0, None), (args, dot_args))
    with pytest.raises(ValueError, match="of 1, which is not floating-point"):
        run((y0, dot_y0), (args | dict(rate=1), dot_args))
    with pytest.raises(ValueError, match="must be a term"):
        forward_sensitivity((terms,))  # pyright: ignore


operators = {
    "product": lambda y: (
        lx.DiagonalLinearOperator(1 + 0.5 * jnp.cos(y))
        @ lx.MatrixLinearOperator(jnp.stack([jnp.cos(y), jnp.sin(y)], axis=-1))
    ),
    "function": lambda y: lx.FunctionLinearOperator(
        lambda x: jnp.cos(y) * x, struct((2,), jnp.float64)
    ),
}


@pytest.mark.parametrize("name", operators)
def test_operators_that_are_not_linear_in_their_arrays(name):
    """Also for a solver that takes vector field and product apart."""
    path = BrownianInterval(0.0, 1.0, (2,), jr.key(0), dt=0.1)
    terms = make_terms(
        lambda t, y, args: -y, lambda t, y, args: operators[name](y), path
    )
    y0, dot_y0 = jnp.array([0.6, -0.3]), jnp.eye(2)

    def solve(terms, y0, args, **kwargs):
        sol = diffrax.diffeqsolve(
            terms, ReversibleHeun(), 0.0, 1.0, 0.1, y0, args, **kwargs
        )
        assert sol.ys is not None
        return sol.ys

    _, actual = solve(forward_sensitivity(terms), (y0, dot_y0), (None, None))
    expected = jax.jacfwd(
        lambda y0: solve(terms, y0, None, adjoint=diffrax.ForwardMode())[-1]
    )(y0)
    assert relative_error(actual[-1], expected.T) < 1e-13
