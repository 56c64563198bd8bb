"""Whether a function depends on its argument, as its trace says."""

import jax
import jax.lax as lax
import jax.numpy as jnp
import pytest

from diffrax_sde_adjoint._autodiff.dependence import depends_on


x = jnp.array([0.5, -0.2])
other = jnp.array([1.0, 2.0])


def scan(step, init, xs=None):
    return lax.scan(step, init, xs, length=2)


def while_loop(body, init):
    _, out = lax.while_loop(
        lambda val: val[0] < 2, lambda val: (val[0] + 1, body(val[1])), (0, init)
    )
    return out


dependent = {
    "itself": lambda x: x,
    "direct": lambda x: jnp.sin(x),
    "indirect": lambda x: jnp.sum(jnp.cos(other * (x + 1))) + other,
    "one of two outputs": lambda x: (other, x * other),
    "part": lambda x: other + x[0],
    "without derivative": lambda x: jnp.where(x > 0, other, 0),
    "stopped derivative": lambda x: lax.stop_gradient(x) * other,
    "as an index": lambda x: other[jnp.argmax(x)],
    "jit": lambda x: jax.jit(lambda x, y: x * y)(x, other),
    "jit of a closure": lambda x: jax.jit(lambda y: x * y)(other),
    "start of scan": lambda x: scan(lambda y, _: (y * other, None), x),
    "what scan goes over": lambda x: scan(lambda y, x: (y * x, None), other, x),
    "closure of scan": lambda x: scan(lambda y, _: (y * x, None), other),
    "outputs of scan": lambda x: scan(lambda y, _: (y, y * x), other)[1],
    "start of loop": lambda x: while_loop(lambda y: y * other, x),
    "closure of loop": lambda x: while_loop(lambda y: y * x, other),
    "length of loop": lambda x: lax.while_loop(
        lambda y: jnp.sum(y) < x[0], lambda y: 2 * y, other
    ),
    "branch": lambda x: lax.cond(other[0] > 0, lambda: other, lambda: x),
    "condition": lambda x: lax.cond(x[0] > 0, lambda: other, lambda: 2 * other),
    "vmap": lambda x: jax.vmap(lambda x: x * other)(x),
    "derivative": lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(x)))(x),
}

independent = {
    "constant": lambda x: other,
    "number": lambda x: 1.0,
    "nothing": lambda x: None,
    "not used": lambda x: (jnp.sin(x), jnp.cos(other))[1],
    "shape": lambda x: jnp.ones(x.shape, x.dtype),
    "like": lambda x: jnp.zeros_like(x),
    "jit": lambda x: jax.jit(jnp.sin)(other),
    "scan": lambda x: scan(lambda y, _: (y * other, jnp.sin(y)), other),
    "loop": lambda x: while_loop(lambda y: y * other, other),
    "cond": lambda x: lax.cond(other[0] > 0, lambda: other, lambda: 2 * other),
    "derivative of a linear function": lambda x: jax.grad(lambda x: jnp.sum(2 * x))(x),
}


@pytest.mark.parametrize("name", dependent)
def test_dependent(name):
    assert depends_on(dependent[name], x) is True


@pytest.mark.parametrize("name", independent)
def test_independent(name):
    assert depends_on(independent[name], x) is False


def test_leaves_of_a_tree():
    """That are arrays, of any dtype; others are not looked at."""
    tree = {"x": x, "count": jnp.array(1), "number": 2.0}
    for name in ("x", "count"):
        assert depends_on(lambda tree: tree[name], tree)
        assert depends_on(lambda tree: (other, tree[name] + 1), tree)
    assert not depends_on(lambda tree: tree["number"] * other, tree)
    assert not depends_on(lambda tree: other, tree)
    assert not depends_on(lambda x: other, None)


def test_outputs_that_are_no_arrays():
    assert not depends_on(lambda x: ("name", jnp.sin, None), x)
    assert depends_on(lambda x: ("name", jnp.sin, x), x)


def test_traced_arrays_of_a_closure():
    """They are not what is asked about, whatever they were computed from."""

    def fn(x):
        y = jnp.sin(x)
        assert not depends_on(lambda z: y * x, x)
        assert depends_on(lambda z: y * z, x)
        return jnp.sum(y)

    for transform in (jax.jit, jax.grad, jax.vmap):
        transform(fn)(x)
