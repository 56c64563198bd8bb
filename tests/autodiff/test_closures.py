"""What functions refer to by closure, made a part of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_sde_adjoint._autodiff.closures import hoist


weight = jnp.array([[0.5, -0.8], [0.9, 0.3]])
x = jnp.array([0.3, -0.5])


def product_with(weight):
    return lambda x: jnp.sin(weight @ x)


def test_array():
    hoisted = hoist(product_with(weight), x)
    (closure,) = hoisted.closure
    np.testing.assert_array_equal(closure, weight)
    np.testing.assert_array_equal(hoisted(x), product_with(weight)(x))


def test_other_arrays():
    hoisted = hoist(product_with(weight), x)
    np.testing.assert_array_equal(hoisted(2 * x), product_with(weight)(2 * x))
    other = eqx.tree_at(lambda h: h.closure, hoisted, [weight + 1])
    np.testing.assert_array_equal(other(x), product_with(weight + 1)(x))


def test_shape_is_enough():
    hoisted = hoist(product_with(weight), jax.ShapeDtypeStruct((2,), jnp.float64))
    np.testing.assert_array_equal(hoisted(x), product_with(weight)(x))


weights, xs = jnp.stack([weight, 2 * weight]), jnp.stack([x, x**2])


@pytest.mark.parametrize(
    "transform,args",
    (
        (jax.jit, (weight, x)),
        (lambda f: jax.vmap(f, (0, None)), (weights, x)),
        (lambda f: jax.vmap(f, (None, 0)), (weight, xs)),
        (lambda f: jax.jit(jax.vmap(jax.vmap(f, (0, None)), (None, 0))), (weights, xs)),
        (lambda f: jax.jit(jax.jacrev(f, (0, 1))), (weight, x)),
        (lambda f: jax.jit(jax.jacfwd(f, (0, 1))), (weight, x)),
        (lambda f: jax.jit(jax.vmap(jax.jacrev(jax.jit(f)))), (weights, xs)),
    ),
)
def test_traced_array(transform, args):
    def hoisted(weight, x):
        hoisted = hoist(product_with(weight), x)
        assert [y.shape for y in hoisted.closure] == [(2, 2)]
        return hoisted(x)

    original = lambda weight, x: product_with(weight)(x)
    ours, theirs = transform(hoisted)(*args), transform(original)(*args)
    assert jtu.tree_all(
        jtu.tree_map(lambda a, b: jnp.allclose(a, b, 1e-14), ours, theirs)
    )


def test_gradient_of_the_closure():
    """What was hoisted can be differentiated, without what it was hoisted from."""
    total = lambda weight: jnp.sum(product_with(weight)(x))
    hoisted = hoist(lambda x: jnp.sum(product_with(weight)(x)), x)
    grads = eqx.filter_grad(lambda hoisted: hoisted(x))(hoisted)
    (grad_weight,) = grads.closure
    np.testing.assert_allclose(grad_weight, jax.grad(total)(weight), rtol=1e-14)


def test_passes_through_jit():
    """It is a PyTree, whose arrays may be traced and batched by then."""

    @eqx.filter_jit
    def call(hoisted, x):
        return hoisted(x)

    hoisted = hoist(product_with(weight), x)
    np.testing.assert_allclose(call(hoisted, x), hoisted(x), rtol=1e-14)
    batch = eqx.filter_vmap(lambda weight: hoist(product_with(weight), x))(weights)
    out = eqx.filter_vmap(call, in_axes=(eqx.if_array(0), None))(batch, x)
    expected = jnp.stack([product_with(weight)(x) for weight in weights])
    np.testing.assert_allclose(out, expected, rtol=1e-14)


def test_static_arguments_and_outputs():
    """They are those that it was hoisted with."""

    def fn(number, name, tree):
        out = weight @ tree["x"] * number
        return {"out": out, "count": tree["count"] + 1, "name": name, "none": None}

    tree = {"x": x, "count": jnp.array(1), "fn": jnp.sin}
    hoisted = hoist(fn, 2.0, "name", tree)
    out = hoisted(3.0, "other", tree | {"count": jnp.array(5), "fn": jnp.cos})
    assert (out["name"], out["none"]) == ("name", None)
    np.testing.assert_array_equal(out["out"], weight @ x * 2.0)
    assert out["count"] == 6


def test_nothing_in_the_closure():
    hoisted = hoist(lambda x: (x, 1.0 * x), x)
    assert hoisted.closure == []
    first, second = hoisted(x + 1)
    np.testing.assert_array_equal(first, x + 1)
    np.testing.assert_array_equal(second, x + 1)


def test_array_that_is_returned():
    """As it is, from the closure, and one of NumPy."""
    constant = np.array([1.0, 2.0])
    weight_out, sum_out = hoist(lambda x: (weight, x + constant), x)(2 * x)
    np.testing.assert_array_equal(weight_out, weight)
    np.testing.assert_array_equal(sum_out, 2 * x + constant)
