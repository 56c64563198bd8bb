"""The divergence between the laws of two SDEs, against closed forms."""

import inspect

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from helpers import (
    by_default_unless,
    grad_in_forward_mode,
    keys,
    make_system,
    make_terms,
    noise_shapes,
    relative_error,
    struct,
)

from diffrax_sde_adjoint import (
    BackwardSDEAdjoint,
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
    ito_to_stratonovich,
    path_kl,
    path_kl_of_shift,
)


def constant(matrix):
    return lambda t, y, args: jnp.asarray(matrix)


def diagonal(fn):
    return lambda t, y, args: lx.DiagonalLinearOperator(fn(t, y, args))


def _ou_closed_form(p):
    """`E[(a + b y)^2] / (2 scale^2)` over time, with `y` normal at each."""
    x, weights = np.polynomial.legendre.leggauss(20)
    t = 0.5 * (jnp.asarray(x) + 1)
    decay = jnp.exp(-p["rate"] * t)
    mean = p["mean"] + (_y0 - p["mean"]) * decay
    variance = p["scale"] ** 2 * (1 - decay**2) / (2 * p["rate"])
    b = p["prior_rate"] - p["rate"]
    a = p["rate"] * p["mean"] - p["prior_rate"] * p["prior_mean"]
    square = (a + b * mean) ** 2 + b**2 * variance
    return 0.5 * jnp.sum(0.5 * jnp.asarray(weights) * square) / p["scale"] ** 2


_y0 = 0.4
_ou = dict(rate=0.8, mean=1.5, prior_rate=1.4, prior_mean=-1.0, scale=0.5)
_matrix = [[1.0, 0.3, 0.2], [0.0, 1.0, 0.5]]
# Shape of state and noise; drifts of posterior and prior; diffusion; parameters; the
# divergence, over paths of unit length.
problems = {
    "Brownian motion with drift": (
        (),
        (),
        lambda t, y, p: p["drift"] + 0 * y,
        lambda t, y, p: 0 * y,
        lambda t, y, p: p["scale"] + 0 * y,
        dict(drift=0.7, scale=0.5),
        lambda p: 0.5 * (p["drift"] / p["scale"]) ** 2,
    ),
    "Ornstein-Uhlenbeck": (
        (),
        (),
        lambda t, y, p: p["rate"] * (p["mean"] - y),
        lambda t, y, p: p["prior_rate"] * (p["prior_mean"] - y),
        lambda t, y, p: p["scale"] + 0 * y,
        _ou,
        _ou_closed_form,
    ),
    "geometric Brownian motion": (
        (2,),
        (2,),
        lambda t, y, p: p["drift"] * y,
        lambda t, y, p: 0.1 * y,
        diagonal(lambda t, y, p: p["scale"] * y),
        dict(drift=0.7, scale=0.5),
        lambda p: ((p["drift"] - 0.1) / p["scale"]) ** 2,
    ),
    "scalar noise": (
        (2,),
        (),
        lambda t, y, p: p["drift"] * y,
        lambda t, y, p: 0.1 * y,
        lambda t, y, p: p["scale"] * y,
        dict(drift=0.7, scale=0.5),
        lambda p: 0.5 * ((p["drift"] - 0.1) / p["scale"]) ** 2,
    ),
    "general noise": (
        (2,),
        (3,),
        lambda t, y, p: p["drift"] * jnp.ones(2) - y,
        lambda t, y, p: -y,
        constant(_matrix),
        dict(drift=0.7),
        lambda p: (
            0.5 * p["drift"] ** 2 * np.sum((np.linalg.pinv(_matrix) @ np.ones(2)) ** 2)
        ),
    ),
}


slow = (
    "Brownian motion with drift",
    "Ornstein-Uhlenbeck",
    "scalar noise",
    "general noise",
)


@pytest.mark.parametrize("name", by_default_unless(slow, problems))
def test_closed_form(name):
    """The mean over paths, and its gradient. The one over paths of two OU processes
    varies: 40 000 paths give it an error of 5e-4 (one standard deviation, relative).
    The others do not.
    """
    shape, noise_shape, posterior, prior, diffusion, params, closed_form = problems[
        name
    ]
    num_paths = 40_000 if name == "Ornstein-Uhlenbeck" else 4
    num_steps = 32
    params = jtu.tree_map(jnp.asarray, params)

    def one(params, key):
        path = BrownianInterval(0.0, 1.0, noise_shape, key, dt=1 / num_steps)
        terms = path_kl(make_terms(posterior, diffusion, path), prior)
        sol = diffrax.diffeqsolve(
            terms,
            ReversibleHeun(),
            0.0,
            1.0,
            1 / num_steps,
            (jnp.full(shape, _y0), jnp.array(0.0)),
            params,
            adjoint=StochasticAdjoint(),
            max_steps=num_steps,
        )
        assert sol.ys is not None
        _, divergence = sol.ys
        return divergence[0]

    @jax.jit
    def estimate(params, keys):
        all_paths = lambda params: jax.vmap(one, (None, 0))(params, keys)
        mean = lambda params: jnp.mean(all_paths(params))
        return jax.value_and_grad(mean)(params), jnp.std(all_paths(params))

    all_keys = keys(num_paths)
    (mean, gradient), std = estimate(params, all_keys)
    expected, expected_gradient = jax.value_and_grad(closed_form)(params)
    assert std / np.sqrt(num_paths) < 5e-4 * expected
    assert abs(mean - expected) < 1e-3 * expected
    for x in params:
        assert abs(gradient[x] - expected_gradient[x]) < 5e-3 * abs(expected)
        # And the derivative of the estimate itself.
        moved = lambda sign, x=x: estimate(
            params | {x: params[x] + sign * 1e-5}, all_keys
        )[0][0]
        difference = (moved(1) - moved(-1)) / 2e-5
        assert abs(gradient[x] - difference) < 1e-6 * abs(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver,sense",
    (
        (ReversibleHeun(), "stratonovich"),
        (diffrax.Euler(), "ito"),
        (diffrax.ItoMilstein(), "ito"),
        (diffrax.Heun(), "converted"),
    ),
)
def test_log_ratio(solver, sense):
    """Of a Brownian motion to the process with drift `-y`: the stochastic integral is
    that of the motion along itself, in the sense of Itô whichever the solver. And as a
    weight, its inverse has the mean one.
    """
    num_steps = 64

    def log_ratio(key):
        path = BrownianInterval(0.0, 1.0, (2,), key, dt=1 / num_steps)
        terms = make_terms(
            lambda t, y, args: 0 * y, diagonal(lambda t, y, args: 1 + 0 * y), path
        )
        prior = lambda t, y, args: -y
        both = (
            path_kl(terms, prior),
            path_kl(terms, prior, log_ratio="ito" if sense == "converted" else sense),
        )
        if sense == "converted":
            both = map(ito_to_stratonovich, both)
        out = []
        for terms in both:
            sol = diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, 1 / num_steps, (jnp.zeros(2), jnp.array(0.0))
            )
            assert sol.ys is not None
            out.append(sol.ys[1][0])
        divergence, whole = out
        w = path.evaluate(0.0, 1.0)
        return whole, whole - divergence - jnp.sum((w**2 - 1) / 2)

    whole, error = jax.jit(jax.vmap(log_ratio))(keys(4096))
    # Euler's sum differs from the integral by a sum of squares, which varies.
    tol = 6 / np.sqrt(num_steps) if isinstance(solver, diffrax.Euler) else 1e-12
    assert jnp.max(jnp.abs(error)) < tol
    weights = jnp.exp(-whole)
    assert abs(jnp.mean(weights) - 1) < 4 * jnp.std(weights) / 64


@pytest.mark.parametrize(
    "noise, dtype",
    by_default_unless(
        lambda *_: True,
        (*((noise, jnp.float64) for noise in noise_shapes), ("diagonal", jnp.float32)),
        long=lambda noise, _: noise in ("scalar", "additive", "general operator"),
    ),
)
def test_shifts_and_adjoints(noise, dtype):
    """A posterior given by its drift and by the shift of the noise is the same, if that
    is the smallest one. All adjoints agree, and so do batches.
    """
    drift, diffusion, y0, args = make_system(noise, dtype)
    t0, t1, dt = (jnp.array(x, dtype) for x in (0, 1, 1 / 16))
    shape = struct(noise_shapes[noise], dtype)

    def shift(t, y, args):
        vf = diffusion(t, y, args)
        matrix = vf.as_matrix() if isinstance(vf, lx.AbstractLinearOperator) else vf
        matrix = matrix.reshape(2, -1)
        u = matrix.T @ (jnp.sin(y) * args["level"])
        return u.reshape(noise_shapes[noise])

    def posterior(t, y, args):
        vf = diffusion(t, y, args)
        u = shift(t, y, args)
        return drift(t, y, args) + (
            vf.mv(u)
            if isinstance(vf, lx.AbstractLinearOperator)
            else jnp.tensordot(vf, u, axes=u.ndim)
        )

    def loss(args, key, adjoint, is_shift):
        path = BrownianInterval(t0, t1, shape, key, dt=dt)
        if is_shift:
            terms = path_kl_of_shift(make_terms(drift, diffusion, path), shift)
        else:
            terms = path_kl(make_terms(posterior, diffusion, path), drift)
        sol = diffrax.diffeqsolve(
            terms,
            ReversibleHeun(),
            t0,
            t1,
            dt,
            (y0, jnp.zeros((), dtype)),
            args,
            adjoint=adjoint,
            max_steps=16,
        )
        assert sol.ys is not None
        y, divergence = sol.ys
        return divergence[0] + jnp.sum(y)

    def total(args, adjoint, is_shift):
        of_one = lambda key: loss(args, key, adjoint, is_shift)
        return jnp.sum(jax.vmap(of_one)(keys(3)))

    gradient = eqx.filter_jit(eqx.filter_grad(total))
    tol = 1e-9 if dtype == jnp.float64 else 2e-4
    expected = grad_in_forward_mode(
        lambda args: total(args, diffrax.ForwardMode(), True), args
    )
    for is_shift in (True, False):
        actual = gradient(args, StochasticAdjoint(), is_shift)
        assert relative_error(actual, expected) < tol
    if dtype == jnp.float64:
        backward = BackwardSDEAdjoint()
        assert 1e-7 < relative_error(gradient(args, backward, False), expected) < 0.2


@pytest.mark.slow
def test_batch_and_pytree():
    """A batch in one state, of a PyTree with two kinds of leaves, beside single ones;
    and a control that is not noise.
    """
    dt = 1 / 8
    control = lambda t0, t1: dict(a=t1**2 - t0**2, b=t1 - t0)
    y0 = dict(a=jnp.array([[0.3, 0.2], [0.5, -0.4], [1.0, 0.0]]), b=jnp.arange(3.0))
    scale = lambda t, y, args: jtu.tree_map(lambda x: 0.5 + 0.1 * jnp.sin(x), y)
    drift = lambda t, y, args: jtu.tree_map(lambda x: jnp.cos(x + t), y)
    prior = lambda t, y, args: jtu.tree_map(lambda x: -x, y)

    def solve(noise, y0, divergence):
        terms = diffrax.MultiTerm(
            diffrax.ControlTerm(lambda t, y, args: y, control),
            diffrax.ControlTerm(diagonal(scale), noise),
            diffrax.ODETerm(drift),
        )
        sol = diffrax.diffeqsolve(
            path_kl(terms, prior),
            diffrax.Heun(),
            0.0,
            1.0,
            dt,
            (y0, divergence),
            max_steps=16,
        )
        assert sol.ys is not None
        return sol.ys[1][0]

    like = jtu.tree_map(lambda x: struct(x.shape, x.dtype), y0)
    path = BrownianInterval(0.0, 1.0, like, jr.key(0), dt=dt)

    class Element(diffrax.AbstractBrownianPath):
        i: jax.Array
        t0: float = 0.0
        t1: float = 1.0
        levy_area: type = diffrax.BrownianIncrement

        def evaluate(self, t0, t1=None, left=True, use_levy=False):
            w = path.evaluate(t0, t1, left, use_levy)
            return jtu.tree_map(lambda x: x[self.i], w)

    @jax.jit
    def both():
        single = lambda i, y0: solve(Element(i=i), y0, jnp.array(0.0))
        return (
            solve(path, y0, jnp.zeros(3)),
            solve(path, y0, jnp.array(0.0)),
            jax.vmap(single)(jnp.arange(3), y0),
        )

    of_each, of_all, expected = both()
    assert relative_error(of_each, expected) < 1e-12
    assert relative_error(of_all, jnp.sum(expected)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("diagonal", "matrix"))
def test_singular_diffusion(kind):
    """Where the diffusion is zero: no divergence if drifts are equal there, and an
    error or NaN otherwise.
    """
    path = BrownianInterval(0.0, 1.0, (2,), jr.key(0), dt=1 / 8)
    drift = lambda t, y, p: -y + p * jnp.array([1.0, 0.0])
    matrix = jnp.diag(jnp.array([0.5, 0.0]))

    def divergence(p, other, diffusion, throw):
        prior = lambda t, y, p: -y + other * jnp.array([0.0, 1.0])
        terms = path_kl(make_terms(drift, diffusion, path), prior, throw=throw)
        sol = diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            0.0,
            1.0,
            1 / 8,
            (jnp.ones(2), jnp.array(0.0)),
            p,
            adjoint=StochasticAdjoint(),
        )
        assert sol.ys is not None
        return sol.ys[1][0]

    diffusion = constant(matrix)
    if kind == "diagonal":
        diffusion = diagonal(lambda t, y, p: jnp.diag(matrix))
    fn = eqx.filter_jit(
        lambda p, other, throw: jax.value_and_grad(divergence)(
            p, other, diffusion, throw
        )
    )
    zero, one = jnp.array(0.0), jnp.array(1.0)
    value, gradient = fn(jnp.array(0.7), zero, True)
    assert abs(value - 0.5 * 1.4**2) < 1e-12
    assert abs(gradient - 1.4 / 0.5) < 1e-12
    with pytest.raises(eqx.EquinoxRuntimeError, match="would be infinite"):
        fn(jnp.array(0.7), one, True)
    value, _ = fn(jnp.array(0.7), one, False)
    assert np.isnan(value)


def test_no_drift():
    """A posterior that is noise alone, and a prior that is not."""
    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=1 / 4)
    noise = diffrax.ControlTerm(lambda t, y, args: jnp.array(0.5), path)
    terms = path_kl(noise, lambda t, y, args: jnp.array(0.3))
    assert len(terms.terms) == 2
    sol = diffrax.diffeqsolve(
        terms, diffrax.Euler(), 0.0, 1.0, 1 / 4, (jnp.array(0.0), jnp.array(0.0))
    )
    assert sol.ys is not None
    y, divergence = sol.ys
    assert abs(y[0] - 0.5 * path.evaluate(0.0, 1.0)) < 1e-12
    assert abs(divergence[0] - 0.5 * 0.6**2) < 1e-12


def test_errors():
    path = BrownianInterval(0.0, 1.0, (2,), jr.key(0))
    drift = lambda t, y, args: -y
    noise = diffrax.ControlTerm(constant(jnp.ones((2, 2))), path)
    terms = diffrax.MultiTerm(diffrax.ODETerm(drift), noise)
    with pytest.raises(ValueError, match="is the sense in which"):
        # Without the check of types that the tests add.
        inspect.unwrap(path_kl)(terms, drift, log_ratio="Ito")  # pyright: ignore
    with pytest.raises(ValueError, match="driven by a Brownian path"):
        path_kl(diffrax.ODETerm(drift), drift)
    with pytest.raises(ValueError, match="the same Brownian path"):
        path_kl(diffrax.MultiTerm(noise, noise), drift)
    with pytest.raises(ValueError, match="`UnderdampedLangevinDriftTerm`"):
        langevin = diffrax.UnderdampedLangevinDriftTerm(1.0, 1.0, lambda x: x)
        path_kl(diffrax.MultiTerm(langevin, noise), drift)

    def run(y0, divergence, diffusion):
        terms = make_terms(drift, diffusion, path)
        diffrax.diffeqsolve(
            path_kl(terms, drift), diffrax.Heun(), 0.0, 1.0, 0.1, (y0, divergence)
        )

    with pytest.raises(ValueError, match="for diagonal noise only"):
        run(jnp.ones(2), jnp.zeros(2), constant(jnp.ones((2, 2))))
    with pytest.raises(ValueError, match="`y0 = \\(y, divergence\\)`"):
        run(jnp.ones(2), jnp.zeros(3), diagonal(lambda t, y, args: y))
    for y0 in (jnp.ones(2), (jnp.ones(2),)):
        # Without the check of types that the tests add.
        drift_of_pair = path_kl(terms, drift).terms[0].vector_field
        with pytest.raises(ValueError, match="are for a pair"):
            inspect.unwrap(type(drift_of_pair).__call__)(drift_of_pair, 0.0, y0, None)
    # It tells of the term that was passed.
    with pytest.raises(ValueError, match="of a `ControlTerm` and its control does not"):
        run(jnp.ones(2), jnp.zeros(()), constant(jnp.ones((2, 3))))


@pytest.mark.parametrize(
    "solver", (diffrax.ShARK(), pytest.param(diffrax.SEA(), marks=pytest.mark.slow))
)
def test_solvers_for_additive_noise(solver):
    """The noise of what `path_kl` returns is additive if that of the terms is."""
    path = BrownianInterval(
        0.0, 1.0, (2,), jr.key(0), dt=0.25, levy_area=diffrax.SpaceTimeLevyArea
    )
    terms = make_terms(lambda t, y, args: -y, constant(jnp.eye(2)), path)
    converted = (
        path_kl(terms, lambda t, y, args: -y - jnp.ones(2)),
        path_kl_of_shift(terms, lambda t, y, args: jnp.ones(2)),
    )
    for terms in converted:
        y0 = (jnp.ones(2), jnp.array(0.0))
        sol = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.25, y0)
        assert abs(sol.ys[1][0] - 1) < 1e-12
