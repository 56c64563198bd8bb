"""Conversion between the Itô and the Stratonovich form of an SDE."""

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from helpers import keys, make_system, make_terms, noise_shapes, relative_error, struct

from diffrax_sde_adjoint import (
    EES25,
    BrownianInterval,
    Reversible,
    ReversibleHeun,
    StochasticAdjoint,
    ito_to_stratonovich,
    stratonovich_to_ito,
)
from diffrax_sde_adjoint._transform.ito import correction


def make_path(shape, dtype=jnp.float64, dt=None, key=None):
    t0, t1 = jnp.zeros((), dtype), jnp.ones((), dtype)
    key = jr.key(0) if key is None else key
    return BrownianInterval(t0, t1, struct(shape, dtype), key, dt=dt)


def drift_of(terms, t, y, args):
    first, *_ = terms.terms
    return first.vf(t, y, args)


@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
@pytest.mark.parametrize("noise", noise_shapes)
def test_correction(noise, dtype):
    """Against the sum of the Jacobians of the columns times the columns."""
    drift, diffusion, y, args = make_system(noise, dtype)
    terms = make_terms(drift, diffusion, make_path(noise_shapes[noise], dtype))
    t = jnp.array(0.3, dtype)

    def matrix(y):
        out = diffusion(t, y, args)
        if isinstance(out, lx.AbstractLinearOperator):
            out = out.as_matrix()
        return out.reshape(2, -1)

    jacobian = jax.jacfwd(matrix)(y)
    correction = 0.5 * jnp.einsum("ijk,kj->i", jacobian, matrix(y))
    assert jnp.any(correction != 0) == (noise != "additive")
    tol = 1e-13 if dtype == jnp.float64 else 1e-5
    for convert, sign in ((ito_to_stratonovich, -1), (stratonovich_to_ito, 1)):
        actual = jax.jit(lambda y, c=convert: drift_of(c(terms), t, y, args))(y)
        assert relative_error(actual, drift(t, y, args) + sign * correction) < tol


def test_inverse():
    drift, diffusion, y, args = make_system("general")
    terms = make_terms(drift, diffusion, make_path((3,)))
    there_and_back = stratonovich_to_ito(ito_to_stratonovich(terms))
    t = jnp.array(0.3)
    actual = drift_of(there_and_back, t, y, args)
    assert relative_error(actual, drift(t, y, args)) < 1e-15


def test_additive_noise_has_no_correction():
    drift, diffusion, y, args = make_system("additive")
    terms = make_terms(drift, diffusion, make_path((3,)))
    t = jnp.array(0.3)
    derivatives = lambda noise: correction(noise, t, y, args)
    *_, noise = terms.terms
    assert derivatives(noise) is None
    # It is what the trace of the diffusion says, and not its value.
    times_y = lambda t, y, args: diffusion(t, y, args) * y[0] * 0
    assert derivatives(diffrax.ControlTerm(times_y, noise.control)) is not None


def test_elementwise():
    """One derivative, whatever the dimension."""
    shape = dict(a=struct((3,), jnp.float64), b=struct((), jnp.float64))
    path = BrownianInterval(jnp.array(0.0), jnp.array(1.0), shape, jr.key(0))

    def noise(t, y, args):
        return lx.DiagonalLinearOperator(jtu.tree_map(jnp.sin, y))

    drift = lambda t, y, args: y
    terms = make_terms(drift, noise, path)
    y = dict(a=jnp.array([0.3, -0.2, 1.1]), b=jnp.array(0.4))
    t = jnp.array(0.0)
    expected = jtu.tree_map(lambda x: x - 0.5 * jnp.sin(x) * jnp.cos(x), y)
    for elementwise in (False, True):
        converted = ito_to_stratonovich(terms, elementwise=elementwise)
        assert relative_error(drift_of(converted, t, y, None), expected) < 1e-14
    path = make_path((3,))
    terms = make_terms(drift, lambda t, y, args: jnp.ones((2, 3)) * y[0], path)
    converted = ito_to_stratonovich(terms, elementwise=True)
    with pytest.raises(ValueError, match="is for diagonal noise"):
        drift_of(converted, t, jnp.ones(2), None)


def test_several_terms():
    """Two noises, a control that is not noise, and no drift."""
    one, other = make_path((), key=jr.key(1)), make_path((), key=jr.key(2))
    smooth = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0]))
    noises = [
        diffrax.ControlTerm(lambda t, y, args: y**2, one),
        diffrax.ControlTerm(lambda t, y, args: jnp.sin(y), smooth),
        diffrax.ControlTerm(lambda t, y, args: jnp.cos(y), other),
    ]
    y = jnp.array(0.7)
    expected = -(y**3) + 0.5 * jnp.sin(y) * jnp.cos(y)
    converted = ito_to_stratonovich(diffrax.MultiTerm(*noises))
    assert len(converted.terms) == 4
    actual = drift_of(converted, jnp.array(0.0), y, None)
    assert relative_error(actual, expected) < 1e-15
    single = ito_to_stratonovich(noises[0])
    assert relative_error(drift_of(single, jnp.array(0.0), y, None), -(y**3)) < 1e-15


def test_solution_and_gradient_are_those_of_the_ito_solution():
    """Geometric Brownian motion, by a Stratonovich solver."""

    def exact(params, path):
        rate, level = params
        return jnp.exp(rate - level**2 / 2 + level * path.evaluate(*path_ends))

    path_ends = (jnp.array(0.0), jnp.array(1.0))

    @jax.jit
    @jax.vmap
    def errors(key):
        path = make_path((), dt=jnp.array(1 / 512), key=key)

        def solve(params, num_steps):
            rate, level = params
            terms = make_terms(
                lambda t, y, args: rate * y, lambda t, y, args: level * y, path
            )
            sol = diffrax.diffeqsolve(
                ito_to_stratonovich(terms),
                ReversibleHeun(),
                *path_ends,
                1 / num_steps,
                jnp.array(1.0),
                adjoint=StochasticAdjoint(),
                max_steps=512,
            )
            assert sol.ys is not None
            return sol.ys[0]

        params = (jnp.array(0.3), jnp.array(0.7))
        expected = jax.value_and_grad(exact)(params, path)

        def error(num_steps):
            actual = jax.value_and_grad(solve)(params, num_steps)
            return jtu.tree_map(lambda a, b: jnp.abs(a - b), actual, expected)

        return lax.map(error, jnp.array([16, 256]))

    for error in jtu.tree_leaves(errors(keys(200))):
        coarse, fine = jnp.mean(error, axis=0)
        assert np.log2(coarse / fine) / 4 > 0.85


def test_errors():
    drift, diffusion, *_ = make_system("general")
    for convert in (ito_to_stratonovich, stratonovich_to_ito):
        with pytest.raises(ValueError, match="nothing to convert"):
            convert(diffrax.ODETerm(drift))
        terms = make_terms(drift, diffusion, make_path((3,)))
        with pytest.raises(ValueError, match="must be a term"):
            convert(tuple(terms.terms))
        with pytest.raises(ValueError, match=r"\(terms\)`: they come from it already"):
            convert(convert(terms))
        path = make_path(())
        noise = diffrax.ControlTerm(lambda t, y, args: y, path)
        with pytest.raises(ValueError, match="the same Brownian path"):
            convert(diffrax.MultiTerm(noise, noise))

        class Scaled(diffrax.AbstractPath):
            path: BrownianInterval
            t0: float = 0.0
            t1: float = 1.0

            def evaluate(self, t0, t1=None, left=True):
                return 2 * self.path.evaluate(t0, t1)

        scaled = diffrax.ControlTerm(lambda t, y, args: y, Scaled(path))
        with pytest.raises(ValueError, match="not as its control"):
            convert(diffrax.MultiTerm(diffrax.ODETerm(drift), scaled))
        langevin = diffrax.MultiTerm(
            diffrax.UnderdampedLangevinDriftTerm(1.0, 1.0, lambda x, args: x),
            diffrax.UnderdampedLangevinDiffusionTerm(1.0, 1.0, make_path(())),
        )
        with pytest.raises(ValueError, match="noise is additive"):
            convert(langevin)


def test_solver_of_the_other_kind():
    """Converted terms are for solvers that converge to the other solution."""
    path = make_path((), dt=0.1)
    terms = make_terms(lambda t, y, args: y, lambda t, y, args: 0.5 * y, path)

    def solve(terms, solver, adjoint=None):
        adjoint = adjoint or StochasticAdjoint()
        of_y0 = lambda y0: diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 0.1, y0, adjoint=adjoint
        )
        return jax.eval_shape(of_y0, jnp.array(1.0))

    stratonovich, ito = ito_to_stratonovich(terms), stratonovich_to_ito(terms)
    of_ito_solver = "from `ito_to_stratonovich`, and are for a solver that converges to"
    for solver in (diffrax.Euler(), diffrax.HalfSolver(diffrax.Euler())):
        with pytest.raises(ValueError, match=of_ito_solver):
            solve(stratonovich, solver)
        solve(ito, solver)
    for solver in (diffrax.Heun(), diffrax.ReversibleHeun()):
        with pytest.raises(ValueError, match="from `stratonovich_to_ito`, and are for"):
            solve(ito, solver)
        solve(stratonovich, solver)
    # Ours are with any adjoint.
    for solver in (ReversibleHeun(), EES25(), Reversible(diffrax.Heun())):
        with pytest.raises(ValueError, match="from `stratonovich_to_ito`, and are for"):
            solve(ito, solver, diffrax.RecursiveCheckpointAdjoint())
    # It is the last conversion that counts.
    there_and_back = stratonovich_to_ito(stratonovich)
    solve(there_and_back, diffrax.Euler())
    with pytest.raises(ValueError, match="from `stratonovich_to_ito`"):
        solve(there_and_back, diffrax.Heun())
