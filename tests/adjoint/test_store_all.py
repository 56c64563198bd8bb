"""`StochasticAdjoint(store_all=True)`, where it differs from other ways: what is kept
comes from the forward solve.
"""

import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers import by_default_unless, relative_error

from diffrax_sde_adjoint import StochasticAdjoint
from diffrax_sde_adjoint._autodiff.jaxprs import has_loop, inner_jaxprs


def _solve(vector_field, y0, args, adjoint, t1=1.0, solver=None, **kwargs):
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Heun() if solver is None else solver,
        t0=0.0,
        t1=t1,
        dt0=0.1,
        y0=y0,
        args=args,
        adjoint=adjoint,
        max_steps=16,
        **kwargs,
    )
    assert sol.ys is not None
    return sol.ys


both = pytest.mark.parametrize(
    "adjoint",
    (
        StochasticAdjoint(store_all=True),
        pytest.param(StochasticAdjoint(), marks=pytest.mark.slow),
    ),
    ids=("store_all", "default"),
)
reference = diffrax.DirectAdjoint()


@both
def test_elements_without_steps(adjoint):
    """What is not defined at zero is not evaluated there for them, or the gradient of
    all would be NaN.
    """

    def loss(args, adjoint):
        def one(t1):
            ys = _solve(
                lambda t, y, args: args[0] * y**-2 + args[1] * y,
                jnp.array(0.7),
                args,
                adjoint,
                t1,
                saveat=diffrax.SaveAt(
                    steps=True, t1=True, fn=lambda t, y, args: args[0] * jnp.log(y)
                ),
            )
            return jnp.sum(jnp.where(jnp.isfinite(ys), ys, 0))

        return jnp.sum(jax.vmap(one)(jnp.array([0.0, 1.0, 0.35])))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    args = jnp.array([0.3, -0.2])
    assert relative_error(gradient(args, adjoint), gradient(args, reference)) < 1e-12


def test_not_with_checkpoints():
    with pytest.raises(ValueError, match="Pass one of the two"):
        StochasticAdjoint(checkpoint_every=3, store_all=True)


@both
@pytest.mark.slow
def test_solve_in_a_vector_field(adjoint):
    """Of a batch."""

    def loss(args, adjoint):
        def vector_field(t, y, args):
            inner = lambda t, y, args: -args * y
            z = _solve(inner, y, args, adjoint, solver=diffrax.Euler())
            return jnp.sum(z) - y

        def one(y0):
            return jnp.sum(_solve(vector_field, y0, args, adjoint) ** 2)

        return jnp.sum(jax.vmap(one)(jnp.array([0.5, -0.2, 1.0])))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    args = jnp.array(0.3)
    assert relative_error(gradient(args, adjoint), gradient(args, reference)) < 1e-12


@both
@pytest.mark.slow
def test_parameters_without_derivative(adjoint):
    """It is not asked for."""

    def vector_field(t, y, args):
        weight, bound = args
        # It has a derivative in forward mode only.
        bound = jax.lax.while_loop(lambda x: x > 1, lambda x: 0.5 * x, bound)
        return -weight * y * bound

    def loss(weight, adjoint):
        ys = _solve(vector_field, jnp.array(0.7), (weight, jnp.array(3.0)), adjoint)
        return jnp.sum(ys**2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    weight = jnp.array(0.3)
    assert (
        relative_error(gradient(weight, adjoint), gradient(weight, reference)) < 1e-12
    )


@pytest.mark.slow
def test_vector_field_without_derivative():
    """It can be solved, if it is not to be differentiated."""

    def vector_field(t, y, args):
        weight, size = args
        struct = jax.ShapeDtypeStruct((), y.dtype)
        return -weight * y + jax.pure_callback(np.sin, struct, size)

    def loss(weight, adjoint):
        args = (weight, jnp.array(3.0))
        return jnp.sum(_solve(vector_field, jnp.array(0.7), args, adjoint) ** 2)

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value = jax.jit(loss, static_argnums=1)
    weight = jnp.array(0.3)
    expected = value_and_grad(weight, diffrax.RecursiveCheckpointAdjoint())
    actual = value_and_grad(weight, StochasticAdjoint())
    assert relative_error(actual, expected) < 1e-12
    assert relative_error(value(weight, StochasticAdjoint()), expected[0]) < 1e-12


_newton = optx.Newton(1e-10, 1e-10)
_implicit = {
    cls.__name__: cls(root_finder=_newton)
    for cls in (
        diffrax.ImplicitEuler,
        diffrax.Kvaerno3,
        diffrax.Kvaerno5,
        diffrax.KenCarp3,
        diffrax.Sil3,
    )
}


def _implicit_loss(solver, matrix, t1s, adjoint):
    """Of solves in a batch, of which some make fewer steps, or none."""

    def drift(t, y, matrix):
        # It is not defined at zero, where no step is.
        return jnp.tanh(matrix @ y) / jnp.sum(y**2)

    terms = diffrax.ODETerm(drift)
    if isinstance(solver, diffrax.KenCarp3 | diffrax.Sil3):
        decay = diffrax.ODETerm(lambda t, y, matrix: -matrix[0] * y)
        terms = diffrax.MultiTerm(terms, decay)

    def one(t1, y0):
        sol = diffrax.diffeqsolve(
            terms, solver, 0.0, t1, 0.1, y0, matrix, adjoint=adjoint, max_steps=16
        )
        return sol.ys

    y0s = jnp.array([[0.5, -0.2], [0.1, 0.4], [-1.0, 2.0]])
    return jnp.sum(jax.vmap(one)(t1s, y0s) ** 2)


_matrix = jnp.array([[0.3, -0.2], [0.7, 1.1]])
_t1s = jnp.array([1.0, 0.0, 0.33])


@pytest.mark.parametrize(
    "name, store_all",
    by_default_unless(
        lambda name, store_all: (name, store_all) != ("Kvaerno3", True),
        itertools.product(_implicit, (True, False)),
        long=lambda name, store_all: (
            name == "Kvaerno5" or (name == "Sil3" and not store_all)
        ),
    ),
)
def test_batch_of_implicit_steps(name, store_all):
    loss = functools.partial(_implicit_loss, _implicit[name])
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    ours = gradient(_matrix, _t1s, StochasticAdjoint(store_all=store_all))
    theirs = gradient(_matrix, _t1s, diffrax.RecursiveCheckpointAdjoint())
    assert relative_error(ours, theirs) < 1e-11


def _num_root_finds(fn, *args):
    """Loops that have a derivative by the implicit function theorem."""

    def count(jaxpr):
        is_one = lambda x: x.primitive.name == "custom_jvp_call" and has_loop(x)
        return sum(is_one(x) or sum(map(count, inner_jaxprs(x))) for x in jaxpr.eqns)

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize("name, num_roots", (("ImplicitEuler", 1), ("Kvaerno3", 3)))
def test_roots_are_found_once(name, num_roots):
    """Those of the solve, and on the way back none; by default those of one step."""
    loss = functools.partial(_implicit_loss, _implicit[name])

    def num(fn, **kwargs):
        adjoint = StochasticAdjoint(**kwargs)
        return _num_root_finds(lambda matrix: fn(matrix, _t1s, adjoint), _matrix)

    assert num(jax.grad(loss), store_all=True) == num(loss, store_all=True) > 0
    # The stages of a solve are a loop, and those of the step made again are not.
    assert num(loss) == 1
    assert num(jax.grad(loss)) == 1 + num_roots
