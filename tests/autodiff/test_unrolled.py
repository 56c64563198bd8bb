"""Short loops written out, and the branches that are then known."""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers import by_default_unless

from diffrax_sde_adjoint._autodiff.jaxprs import evaluate, has_loop, primitives
from diffrax_sde_adjoint._autodiff.unrolled import unrolled


def _halved(x):
    """Until it is below one: a loop whose length depends on `x`."""
    return lax.while_loop(lambda x: x > 1, lambda x: x / 2, x)


def _stages(length, reverse=False, start=0):
    """A loop, all of which but the first iteration have one inside."""

    @jax.jit
    def fn(x, ys):
        def stage(carry, y):
            i, x = carry
            x = lax.cond(i == start, lambda x: x + 1, _halved, x * y)
            return (i + 1, x), x - y

        (_, x), out = lax.scan(stage, (start, x), ys, length, reverse)
        return x, out

    return fn


def _written_out(fn, *args):
    """What is left of it, having checked that it is the same function."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    out = unrolled(jaxpr)
    flat = jax.tree.leaves(args)
    expected = jax.jit(lambda *x: evaluate(jaxpr, *x))(*flat)
    actual = jax.jit(lambda *x: evaluate(out, *x))(*flat)
    assert out.out_avals == jaxpr.out_avals
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-15)
    return out.jaxpr


def _names(jaxpr):
    return [x.primitive.name for x in jaxpr.eqns]


@pytest.mark.parametrize("reverse", (False, True))
def test_branches_are_known(reverse):
    ys = jnp.array([3.0, 5.0, 7.0, 2.0])
    jaxpr = _written_out(_stages(4, reverse), jnp.array(1.5), ys)
    assert not {"scan", "cond", "jit", "pjit"}.intersection(_names(jaxpr))
    assert _names(jaxpr).count("while") == 3


def test_branches_that_depend_on_arguments():
    fn = lambda x, ys, start: _stages(2, start=start)(x, ys)
    jaxpr = _written_out(fn, jnp.array(1.5), jnp.array([3.0, 5.0]), jnp.array(0))
    assert _names(jaxpr).count("cond") == 2 and "scan" not in _names(jaxpr)


def test_long_loops_and_those_without_others_stay():
    ys = jnp.ones(17)
    assert "scan" in _names(_written_out(_stages(17), jnp.array(1.5), ys))
    plain = lambda x, ys: lax.scan(lambda x, y: (x * y, x), x, ys)
    assert "scan" in _names(_written_out(plain, jnp.array(1.5), ys[:3]))


def test_indices_that_a_loop_goes_along():
    def stage(x, i):
        return lax.cond(i == 0, lambda x: x + 1, _halved, x), i

    fn = lambda x: lax.scan(stage, x, jnp.arange(3))
    jaxpr = _written_out(fn, jnp.array(1.5))
    assert not {"scan", "cond"}.intersection(_names(jaxpr))
    _written_out(lambda x: lax.scan(stage, x, jnp.arange(0)), jnp.array(1.5))


@pytest.fixture
def single_precision():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.usefixtures("single_precision")
def test_large_numbers():
    bits = np.uint32(0xFFFFFFFF)
    fn = lambda x: (x & bits, jnp.uint32(7) & bits)
    _written_out(fn, jnp.array(0xF0000001, jnp.uint32))


def test_numbers_keep_their_types():
    """A number in Python is weakly typed, by which functions are told apart."""

    @jax.custom_jvp
    def strict(x, i, j):
        return x * i + j

    @strict.defjvp
    def _(primals, tangents):
        x, i, j = primals
        assert jax.typeof(i).weak_type and not jax.typeof(j).weak_type
        return strict(x, i, j), i * tangents[0]

    fn = lambda x: strict(x, jax.jit(lambda: 2.0)(), jnp.zeros((), jnp.int32) + 1)
    with jax.numpy_dtype_promotion("standard"):
        out = unrolled(jax.make_jaxpr(fn)(jnp.array(1.5)))
        derivative = jax.grad(lambda x: evaluate(out, x)[0])(jnp.array(1.5))
    assert derivative == 2


@pytest.mark.parametrize(
    "solver, num_roots",
    by_default_unless(
        lambda solver, num_roots: solver is not diffrax.Kvaerno3,
        ((diffrax.Kvaerno3, 3), (diffrax.Kvaerno5, 6), (diffrax.Sil3, 3)),
    ),
)
def test_stages_of_implicit_methods(solver, num_roots):
    """Nothing but their roots is found by iterations, and these are apart."""
    solver = solver(root_finder=optx.Newton(1e-9, 1e-9), scan_kind="bounded")
    term = diffrax.ODETerm(lambda t, y, args: jnp.tanh(args @ y))
    if isinstance(solver, diffrax.Sil3):
        linear = diffrax.ODETerm(lambda t, y, args: -y)
        term = diffrax.MultiTerm(term, linear)
    y, args = jnp.array([0.3, -0.2]), jnp.array([[0.3, -0.2], [0.7, 1.1]])

    def step(t0, t1, y, args):
        state = solver.init(term, t0, t1, y, args)
        if state is not None:
            state = (False, solver.func(term, t0, y, args))
        out = solver.step(term, t0, t1, y, args, state, False)
        return eqx.filter(out, eqx.is_inexact_array)

    jaxpr = _written_out(step, jnp.array(0.0), jnp.array(0.1), y, args)
    loops = [x.primitive.name for x in jaxpr.eqns if has_loop(x)]
    assert loops == num_roots * ["custom_jvp_call"]
    assert "cond" not in _names(jaxpr)
    assert list(primitives(jaxpr)).count("while") == num_roots
