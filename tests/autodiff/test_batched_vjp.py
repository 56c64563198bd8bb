"""Vector-Jacobian products that are summed over axes of a batch."""

import re

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import keys, relative_error, summed_vjp

from diffrax_sde_adjoint._autodiff.batched_vjp import any_of, maximum, where_active


def fn(shared, own, fixed):
    del fixed
    return jnp.tanh(shared @ own), own**2


def summed(shared, own, cotangents, in_axes, fn=fn, fixed=None):
    """By `summed_vjp`, in as many `vmap` as there are `in_axes`, the inner one first;
    each says whether `shared`, `own` and `cotangents` are batched.
    """
    names = tuple(f"axis {i}" for i in range(len(in_axes)))

    def one(shared, own, cotangents):
        out, pull_back = summed_vjp(fn, names, shared, own, fixed)
        return out, *pull_back(cotangents)

    for name, axes in zip(names, in_axes, strict=True):
        shared_axis, *_ = axes
        one = jax.vmap(one, axes, (0, shared_axis, 0), axis_name=name)
    return one(shared, own, cotangents)


def expected(shared, own, cotangents, in_axes, fn=fn, fixed=None):
    """By JAX, for each element, and summed then."""

    def one(shared, own, cotangents):
        out, pull_back = jax.vjp(lambda *x: fn(*x, fixed), shared, own)
        return out, *pull_back(cotangents)

    for axes in in_axes:
        one = jax.vmap(one, axes)
    out, grad_shared, grad_own = one(shared, own, cotangents)
    # The outer one is the first axis of an array.
    is_shared = [shared_axis is None for shared_axis, *_ in reversed(in_axes)]
    (axes,) = np.nonzero(is_shared)
    grad_shared = jnp.sum(grad_shared, axis=tuple(axes))
    return out, grad_shared, grad_own


def both(in_axes):
    return jax.jit(
        lambda shared, own, cotangents: (
            summed(shared, own, cotangents, in_axes),
            expected(shared, own, cotangents, in_axes),
        )
    )


def arrays(in_axes):
    """Of a shared matrix, an own vector, and cotangents of `fn`."""
    sizes = (3, 4)[: len(in_axes)]

    def make(argument, shape):
        pairs = zip(sizes, in_axes, strict=True)
        batch = [size for size, axes in pairs if axes[argument] is not None]
        shape = (*reversed(batch), *shape)
        return jnp.array(
            np.sin(1 + argument + np.arange(np.prod(shape))).reshape(shape)
        )

    cotangent = make(2, (2,))
    return make(0, (2, 2)), make(1, (2,)), (cotangent, 2 * cotangent)


@pytest.mark.parametrize(
    "in_axes",
    (
        (),
        ((None, 0, 0),),
        ((0, 0, 0),),
        ((0, None, 0),),
        ((None, 0, None),),
        ((None, None, 0),),
        ((0, None, None),),
        ((None, 0, 0), (None, 0, 0)),
        ((None, 0, 0), (0, 0, 0)),
        ((0, 0, 0), (None, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((0, None, 0), (None, 0, 0)),
        ((None, 0, None), (None, None, 0)),
    ),
)
def test_sums(in_axes):
    ours, theirs = both(in_axes)(*arrays(in_axes))
    assert relative_error(ours, theirs) < 1e-14


def test_batch_of_sums():
    """An axis that is not among those of the sum is JAX's own affair."""
    in_axes = ((None, 0, 0),)
    shared, own, (x, y) = arrays(in_axes)
    many = lambda x: jnp.stack([x, x**2])
    for axes, args in (
        ((0, None, None), (many(shared), own, (x, y))),
        ((None, None, 0), (shared, own, (many(x), many(y)))),
    ):
        ours, theirs = jax.vmap(both(in_axes), axes)(*args)
        assert relative_error(ours, theirs) < 1e-14


@pytest.mark.parametrize("num_axes", (0, 1, 2))
def test_leaves_without_derivative(num_axes):
    """Integers, keys and functions, among everything."""

    def fn(shared, own, fixed):
        noise = jr.normal(fixed["key"], (2,))
        y = fixed["fn"](shared["weight"] @ own["x"]) + noise * own["x"]
        count = fixed["count"] + shared["count"] + own["count"]
        return {"y": y * count.astype(y.dtype), "count": count, "name": fixed["name"]}

    shape = (2, 3)[:num_axes]
    num = int(np.prod(shape))
    reshape = lambda x: x.reshape(*shape, *x.shape[1:])
    weight = jnp.array([[0.5, -0.8], [0.9, 0.3]])
    xs = reshape(jnp.array(np.sin(np.arange(2.0 * num)).reshape(num, 2)))
    counts, cotangents = reshape(jnp.arange(num)), jnp.cos(xs)
    all_keys = reshape(keys(num))

    def total(weight, xs):
        def one(x, count, key, cotangent):
            shared = {"weight": weight, "count": jnp.array(1)}
            own = {"x": x, "count": count}
            fixed = {"key": key, "count": 2, "fn": jnp.tanh, "name": "y"}
            return jnp.sum(cotangent * fn(shared, own, fixed)["y"])

        for _ in range(num_axes):
            one = jax.vmap(one)
        return jnp.sum(one(xs, counts, all_keys, cotangents))

    def one(x, count, key, cotangent):
        out, pull_back = summed_vjp(
            fn,
            tuple(range(num_axes)),
            {"weight": weight, "count": jnp.array(1)},
            {"x": x, "count": count},
            {"key": key, "count": 2, "fn": jnp.tanh, "name": "y"},
        )
        assert out["name"] == "y"
        grads = pull_back({"y": cotangent, "count": None, "name": None})
        assert grads[0]["count"] is None and grads[1]["count"] is None
        return grads[0]["weight"], grads[1]["x"]

    for i in range(num_axes):
        one = jax.vmap(one, out_axes=(None, 0), axis_name=i)
    ours, theirs = jax.jit(
        lambda: (
            one(xs, counts, all_keys, cotangents),
            jax.grad(total, argnums=(0, 1))(weight, xs),
        )
    )()
    assert relative_error(ours, theirs) < 1e-14


def test_no_gradient_for_each_element():
    """The gradient of shared weights is summed in a matrix product."""
    batch, width = 11, 7
    weight, x = jnp.eye(width), jnp.ones((batch, width))

    def shapes(axes):
        def one(x):
            _, pull_back = summed_vjp(
                lambda *x: jnp.tanh(x[0] @ x[1]), axes, weight, x, None
            )
            grad_weight, _ = pull_back(x)
            return grad_weight if axes else lax.psum(grad_weight, "batch")

        program = jax.jit(jax.vmap(one, out_axes=None, axis_name="batch")).lower(x)
        return set(re.findall(r"tensor<([0-9x]+)xf64>", program.as_text()))

    assert "11x7" in shapes(("batch",))
    assert "11x7x7" not in shapes(("batch",))
    # What this looks for is there if each element's is found first.
    assert "11x7x7" in shapes(())


def test_product_is_traced_few_times():
    """JAX makes a loop's body into one for a batch again and again, as it finds out
    what in the carry is batched, and so the product, but only once for all alike.
    """

    def num_calls(depth):
        calls = []

        def fn(shared, own, fixed):
            calls.append(None)
            del fixed
            return shared * jnp.sin(own)

        def one(shared, own, num):
            num = maximum(num, ("batch",))

            def body(_, carry):
                # What one step makes batched, the next one passes on.
                sums, grad, next_grad = carry
                _, pull_back = summed_vjp(fn, ("batch",), shared, own, None)
                more, grad_own = pull_back(grad)
                return sums + more, next_grad, grad_own

            for _ in range(depth):
                inner = body
                body = lambda _, carry, inner=inner: lax.fori_loop(0, num, inner, carry)
            return body(0, 3 * (jnp.array(1.0),))

        batch = jax.vmap(one, (None, 0, 0), (None, 0, 0), axis_name="batch")
        jax.eval_shape(batch, jnp.array(0.5), jnp.arange(3.0), jnp.arange(3))
        return len(calls)

    numbers = [num_calls(depth) for depth in range(4)]
    assert max(numbers) < 2 * numbers[0], numbers


def test_loop_in_a_loop_in_a_batch():
    """The sums of a carry stay apart from what is batched in it."""
    weight = jnp.array([[0.5, -0.8], [0.9, 0.3]])
    x = jnp.array([[0.5, -0.2], [-0.7, 0.3], [0.1, 1.1]])

    def one(x):
        def body(_, carry):
            sums, grad_x = carry
            y, pull_back = summed_vjp(
                lambda w, x, _: w @ jnp.sin(x), ("batch",), weight, x, 0
            )
            more, grad_x = pull_back(grad_x + y)
            return sums + more, grad_x

        outer = lambda _, carry: lax.fori_loop(0, 2, body, carry)
        return lax.fori_loop(0, 2, outer, (jnp.zeros((2, 2)), jnp.ones(2)))

    sums, grad_x = jax.jit(jax.vmap(one, out_axes=(None, 0), axis_name="batch"))(x)
    expected_sums, grads = jnp.zeros((2, 2)), jnp.ones((3, 2))
    for _ in range(4):
        cotangents = grads + jnp.sin(x) @ weight.T
        expected_sums = expected_sums + cotangents.T @ jnp.sin(x)
        grads = (cotangents @ weight) * jnp.cos(x)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-14)
    np.testing.assert_allclose(grad_x, grads, rtol=1e-14)


def test_over_a_batch():
    x = jnp.array([[1, 5, -3], [0, -2, 2]])

    def one(x):
        inner, both = ("inner",), ("inner", "outer")
        is_large = x > 4
        return (
            (maximum(x, inner), any_of(is_large, inner)),
            (maximum(x, both), any_of(is_large, both)),
            (maximum(x, ()), any_of(is_large, ())),
        )

    batch = jax.vmap(one, out_axes=(None, None, 0), axis_name="inner")
    of_inner, of_both, of_none = jax.vmap(
        batch, out_axes=(0, None, 0), axis_name="outer"
    )(x)
    np.testing.assert_array_equal(of_inner[0], [5, 2])
    np.testing.assert_array_equal(of_inner[1], [True, False])
    assert of_both == (5, True)
    np.testing.assert_array_equal(of_none[0], x)
    np.testing.assert_array_equal(of_none[1], x > 4)


def test_where_active():
    tree = {"x": jnp.array([1.0, 2.0]), "count": jnp.array(3)}
    other = {"x": jnp.array([-1.0, -2.0]), "count": jnp.array(-3)}
    is_active = jnp.array(False)
    assert where_active(is_active, tree, other, ()) is tree
    select = lambda is_active: where_active(is_active, tree, other, ("batch",))
    out = jax.vmap(select, axis_name="batch")(jnp.array([True, False]))
    np.testing.assert_array_equal(out["x"], [[1.0, 2.0], [-1.0, -2.0]])
    np.testing.assert_array_equal(out["count"], [3, -3])
