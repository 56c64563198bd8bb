"""The reversible solvers other than `ReversibleHeun`: their orders, how well steps are
undone, and the gradients that this gives.
"""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
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
    value_and_grad_in_forward_mode,
)

from diffrax_sde_adjoint import (
    EES25,
    EES27,
    BrownianInterval,
    Reversible,
    StochasticAdjoint,
)


solvers = {
    "EES25": EES25(),
    "EES27": EES27(),
    "Heun": Reversible(diffrax.Heun()),
    "Heun, coupling 0.9": Reversible(diffrax.Heun(), coupling=0.9),
    "Midpoint, coupling 1": Reversible(diffrax.Midpoint(), coupling=1),
    "EulerHeun": Reversible(diffrax.EulerHeun()),
    "StratonovichMilstein": Reversible(diffrax.StratonovichMilstein()),
    "SPaRK": Reversible(diffrax.SPaRK()),
    "Tsit5": Reversible(diffrax.Tsit5()),
    "ImplicitEuler": Reversible(
        diffrax.ImplicitEuler(root_finder=optx.Newton(1e-12, 1e-12))
    ),
}
for_odes = ("Tsit5", "ImplicitEuler")
near_exact = ("EES25", "EES27")


# The others stand for these, which run with `-m slow`.
slow = (
    "EES27",
    "Heun, coupling 0.9",
    "Midpoint, coupling 1",
    "EulerHeun",
    "StratonovichMilstein",
    "SPaRK",
    *for_odes,
)


def make_solve(name, dtype=jnp.float64, t1=1.0, num_steps=20, noise=None):
    """`solve(params, key)` for a solver, where `params` are all that there is."""
    if noise is None:
        noise = "diagonal" if "Milstein" in name else "general"
    drift, diffusion, y0, args = make_system(noise, dtype)
    t0, t1 = jnp.zeros((), dtype), jnp.array(t1, dtype)
    dt = t1 / num_steps
    levy_area = (
        diffrax.SpaceTimeLevyArea if name == "SPaRK" else diffrax.BrownianIncrement
    )

    def terms(params, key):
        drift, diffusion, *_ = params
        if name in for_odes:
            return diffrax.ODETerm(drift)
        shape = struct(noise_shapes[noise], dtype)
        path = BrownianInterval(t0, t1, shape, key, dt=dt, levy_area=levy_area)
        return make_terms(drift, diffusion, path)

    def solve(params, key, adjoint):
        *_, y0, args = params
        sol = diffrax.diffeqsolve(
            terms(params, key),
            solvers[name],
            t0,
            t1,
            dt,
            y0,
            args,
            saveat=diffrax.SaveAt(t1=True, ts=t1 * jnp.array([0.31, 0.6], dtype)),
            adjoint=adjoint,
            max_steps=num_steps,
        )
        return sol.ys

    return solve, terms, (drift, diffusion, y0, args)


@pytest.mark.parametrize("name", ("EES25", "EES27", "Heun", *for_odes))
def test_order_for_odes(name):
    @jax.jit
    def error(num_steps):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.cos(t) * y),
            solvers[name],
            0.0,
            2.0,
            2.0 / num_steps,
            jnp.array(1.0),
            max_steps=256,
        )
        assert sol.ys is not None
        return jnp.abs(sol.ys[0] - jnp.exp(jnp.sin(2.0)))

    order = dict(Tsit5=5, ImplicitEuler=1).get(name, 2)
    n = 16 if name == "Tsit5" else 128
    measured = np.log2(error(n) / error(2 * n))
    assert measured > order - 0.15


@pytest.mark.parametrize(
    "name", by_default_unless(("EES27", "SPaRK"), ("EES25", "EES27", "Heun", "SPaRK"))
)
def test_converges_to_the_stratonovich_solution(name):
    """Geometric Brownian motion, whose solution is known for each path."""
    drift, level = 0.2, 0.7
    levy_area = (
        diffrax.SpaceTimeLevyArea if name == "SPaRK" else diffrax.BrownianIncrement
    )

    @jax.jit
    @jax.vmap
    def errors(key):
        path = BrownianInterval(
            jnp.array(0.0),
            jnp.array(1.0),
            struct((), jnp.float64),
            key,
            dt=jnp.array(1 / 512),
            levy_area=levy_area,
        )
        terms = make_terms(
            lambda t, y, args: drift * y, lambda t, y, args: level * y, path
        )

        def error(num_steps):
            sol = diffrax.diffeqsolve(
                terms, solvers[name], 0.0, 1.0, 1 / num_steps, jnp.array(1.0)
            )
            assert sol.ys is not None
            w = path.evaluate(jnp.array(0.0), jnp.array(1.0))
            return jnp.abs(sol.ys[0] - jnp.exp(drift + level * w))

        return lax.map(error, jnp.array([16, 256]))

    coarse, fine = jnp.mean(errors(keys(400)), axis=0)
    # Order one at least, as a single noise commutes with itself.
    assert np.log2(coarse / fine) / 4 > 0.85


@pytest.mark.parametrize("name", by_default_unless(slow, solvers))
def test_steps_are_undone(name):
    """Over 50 steps of an SDE, or to a high order in the step."""
    _, make_terms_of, params = make_solve(name, num_steps=50)
    *_, y0, args = params
    solver = solvers[name]
    num_steps = 1 if name in near_exact else 50

    @jax.jit
    @jax.vmap
    def there_and_back(key, dt):
        terms = make_terms_of(params, key)

        def step(i, carry):
            y, state = carry
            times = (i * dt, (i + 1) * dt)
            y, _, _, state, _ = solver.step(terms, *times, y, args, state, False)
            return y, state

        def backward_step(i, carry):
            y, state = carry
            i = num_steps - 1 - i
            times = (i * dt, (i + 1) * dt)
            y, _, state, _ = solver.backward_step(terms, *times, y, args, state, False)
            return y, state

        state0 = solver.init(terms, jnp.array(0.0), dt, y0, args)
        end = lax.fori_loop(0, num_steps, step, (y0, state0))
        return (y0, state0), lax.fori_loop(0, num_steps, backward_step, end)

    if name not in near_exact:
        start, back = there_and_back(keys(8), jnp.full(8, 0.02))
        assert relative_error(back, start) < 1e-12
        return
    num = 500
    dt = jnp.repeat(jnp.array([0.2, 0.1]), num)
    start, back = there_and_back(keys(2 * num), dt)
    errors = jnp.max(jnp.abs(back[0] - start[0]), axis=-1).reshape(2, num)
    coarse, fine = jnp.median(errors, axis=-1)
    # The increments of Brownian motion are of order 1/2.
    order = dict(EES25=3, EES27=4)[name]
    assert np.log2(coarse / fine) > order - 0.3


@pytest.mark.parametrize("name", by_default_unless((*slow, "Heun"), solvers))
def test_gradients(name):
    """Of parameters that a batch shares, and of an initial value that it does not."""
    dtypes = (jnp.float64, jnp.float32) if name == "Heun" else (jnp.float64,)
    for dtype in dtypes:
        solve, _, params = make_solve(name, dtype)
        *shared, y0, args = params

        def loss(diff, adjoint, solve=solve):
            shared, y0s, args = diff
            one = lambda y0, key: solve((*shared, y0, args), key, adjoint)
            return jnp.sum(jnp.sin(jax.vmap(one)(y0s, keys(3))))

        y0s = y0 + jnp.array([[0.0], [0.3], [-0.2]], dtype)
        diff = (shared, y0s, args)
        gradient = eqx.filter_jit(eqx.filter_grad(loss))
        actual = gradient(diff, StochasticAdjoint())
        expected = grad_in_forward_mode(
            lambda diff, loss=loss: loss(diff, diffrax.ForwardMode()), diff
        )
        tol = 1e-4 if dtype == jnp.float32 else 2e-4 if name in near_exact else 1e-9
        if name == "EES25":
            tol = 2e-3
        assert relative_error(actual, expected) < tol


@pytest.mark.parametrize(
    "name,dtype",
    [
        ("EES25", jnp.float32),
        pytest.param("EES27", jnp.float64, marks=pytest.mark.slow),
        pytest.param("Heun, coupling 0.9", jnp.float32, marks=pytest.mark.slow),
        pytest.param("EES25", jnp.float64, marks=pytest.mark.slow),
        pytest.param("EES27", jnp.float32, marks=pytest.mark.slow),
        pytest.param("Heun, coupling 0.9", jnp.float64, marks=pytest.mark.slow),
    ],
)
def test_contracting_dynamics(name, dtype):
    """An OU process with rate 5 over a time of 10, where reversible Heun blows up."""
    t0, t1, dt = (jnp.array(x, dtype) for x in (0, 10, 0.01))

    def loss(rate, adjoint):
        path = BrownianInterval(t0, t1, struct((), dtype), jr.key(0), dt=dt)
        sol = diffrax.diffeqsolve(
            make_terms(lambda t, y, rate: -rate * y, lambda t, y, _: 0.5, path),
            solvers[name],
            t0,
            t1,
            dt,
            jnp.ones((), dtype),
            rate,
            adjoint=adjoint,
            max_steps=1000,
        )
        assert sol.ys is not None
        return sol.ys[0] ** 2

    rate = jnp.array(5, dtype)
    gradient = eqx.filter_jit(jax.value_and_grad(loss))
    actual = gradient(rate, StochasticAdjoint(checkpoint_every=50))
    tangent = jnp.ones((), dtype)
    expected = jax.jit(
        lambda rate: jax.jvp(
            lambda rate: loss(rate, diffrax.ForwardMode()), (rate,), (tangent,)
        )
    )(rate)
    assert relative_error(actual, expected) < 1e-3


def test_adaptive_steps():
    term = diffrax.ODETerm(lambda t, y, args: args * jnp.sin(3 * t) * y)

    def loss(inputs, adjoint):
        y0, args = inputs
        sol = diffrax.diffeqsolve(
            term,
            Reversible(diffrax.Heun()),
            0.0,
            3.0,
            None,
            y0,
            args,
            stepsize_controller=diffrax.PIDController(1e-4, 1e-4),
            adjoint=adjoint,
            max_steps=4096,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys), sol.stats["num_rejected_steps"]

    inputs = (jnp.array([1.0, 2.0]), jnp.array(1.3))
    gradient = eqx.filter_jit(jax.value_and_grad(loss, has_aux=True))
    actual = gradient(inputs, StochasticAdjoint())
    (_, num_rejected), _ = actual
    assert num_rejected > 0
    expected = value_and_grad_in_forward_mode(
        lambda inputs: loss(inputs, diffrax.ForwardMode()), inputs
    )
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.long
def test_wrapped_twice():
    """Around a solver that is a wrapper itself; half of a step is exact in binary, as
    noise is rough enough to magnify its rounding.
    """
    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=1 / 16)
    terms = make_terms(lambda t, y, args: -y, lambda t, y, args: jnp.cos(y), path)

    def loss(y0, adjoint):
        solver = Reversible(diffrax.HalfSolver(diffrax.Heun()))
        sol = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 1 / 16, y0, adjoint=adjoint)
        assert sol.ys is not None
        return sol.ys[0] ** 2

    y0 = jnp.array(0.5)
    expected = jax.grad(loss)(y0, diffrax.RecursiveCheckpointAdjoint())
    assert relative_error(jax.grad(loss)(y0, StochasticAdjoint()), expected) < 1e-10


@pytest.mark.parametrize(
    "solver", (diffrax.Heun(), pytest.param(diffrax.Tsit5(), marks=pytest.mark.slow))
)
def test_adjoints_of_diffrax(solver):
    """They replace the loop over the stages of a Runge-Kutta method."""

    def solve(y0, adjoint):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(y)),
            Reversible(solver),
            0.0,
            1.0,
            0.25,
            y0,
            adjoint=adjoint,
        ).ys[0]

    y0 = jnp.array(0.4)
    expected = jax.grad(solve)(y0, StochasticAdjoint())
    direct = jax.grad(solve)(y0, diffrax.DirectAdjoint())
    _, forward = jax.jvp(
        lambda y0: solve(y0, diffrax.ForwardMode()), (y0,), (jnp.ones(()),)
    )
    np.testing.assert_allclose([direct, forward], expected, rtol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Reversible(diffrax.Heun(), coupling=0.0)
    with pytest.raises(ValueError, match="`LeapfrogMidpoint`"):
        Reversible(diffrax.LeapfrogMidpoint())
    with pytest.raises(ValueError, match="`HalfSolver`"):
        Reversible(diffrax.HalfSolver(diffrax.QUICSORT()))
    path = BrownianInterval(0.0, 1.0, (), jr.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: y, path)
    with pytest.raises(ValueError, match="ito_to_stratonovich"):
        diffrax.diffeqsolve(noise, Reversible(diffrax.Euler()), 0.0, 1.0, 0.1, 1.0)
    with pytest.raises(ValueError, match="not marked as"):
        diffrax.diffeqsolve(noise, Reversible(diffrax.Tsit5()), 0.0, 1.0, 0.1, 1.0)
