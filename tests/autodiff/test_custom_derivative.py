"""Functions with a rule for their derivative, against JAX's own derivative of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import keys, relative_error, summed_vjp

from diffrax_sde_adjoint._autodiff.custom_derivative import detach, with_derivative


no_forward_mode = "reverse mode only"


def plain(weight, x):
    return jnp.sin(weight @ x)


def with_rule(fn, rule):
    """`fn(shared, own)`, whose derivative is that of the rule."""

    def wrapped(shared, own):
        outputs = fn(*detach((shared, own)))
        return with_derivative(
            rule, shared, own, None, outputs, no_forward_mode=no_forward_mode
        )

    return wrapped


def rule_of(fn, is_wrong=lambda own: jnp.array(False)):
    """The rule that is right, by `summed_vjp`."""

    def rule(perturbed, inputs, residuals, outputs, grad_outputs, axes):
        del perturbed, residuals, outputs
        shared, own = inputs
        _, pull_back = summed_vjp(lambda *x: fn(*x[:2]), axes, shared, own, None)
        return *pull_back(grad_outputs), is_wrong(own)

    return rule


by_vjp = with_rule(plain, rule_of(plain))


def by_hand(weight, x):
    """The weight is each element's own, and summed over where it is shared."""

    def rule(perturbed, inputs, residuals, outputs, grad_outputs, axes):
        del perturbed, outputs, axes
        _, (weight, x) = inputs
        grad = grad_outputs * residuals
        return None, (jnp.outer(grad, x), weight.T @ grad), jnp.array(False)

    product = jnp.matmul(*detach((weight, x)))
    return with_derivative(
        rule,
        None,
        (weight, x),
        jnp.cos(product),
        jnp.sin(product),
        no_forward_mode=no_forward_mode,
    )


def scan(model, weight, xs):
    step = lambda y, x: (model(weight, y + x), y)
    return jax.lax.scan(step, jnp.ones_like(xs[0]), xs)


def loop(model, weight, x):
    return jax.lax.fori_loop(0, 3, lambda i, y: y + model(weight, y), x)


def branch(model, weight, x):
    return jax.lax.cond(x[0] > 0, model, lambda weight, x: weight[0] * x, weight, x)


def vmap(model, *in_axes, **kwargs):
    return jax.vmap(model, in_axes, **kwargs)


# Of a model, and of one or a batch of weights `w` and of inputs `x`.
programs = {
    "single": lambda f, w, x: f(w[0], x[0]),
    "jit": lambda f, w, x: jax.jit(f)(w[0], x[0]),
    "batch": lambda f, w, x: vmap(f, None, 0)(w[0], x),
    "batch of jit": lambda f, w, x: vmap(jax.jit(f), None, 0)(w[0], x),
    "jit of batch": lambda f, w, x: jax.jit(vmap(f, None, 0))(w[0], x),
    "batch of weights": lambda f, w, x: vmap(f, 0, None)(w, x[0]),
    "batch of both": lambda f, w, x: vmap(f, 0, 0)(w, x[:2]),
    "other axes": lambda f, w, x: vmap(f, 2, 1, out_axes=1)(w.T, x[:2].T),
    "other axes of batches": lambda f, w, x: vmap(
        vmap(f, None, 1, out_axes=1), 2, 1, out_axes=2
    )(w.T, jnp.stack([x.T, x.T**2], axis=1)),
    "weights outside": lambda f, w, x: vmap(vmap(f, None, 0), 0, None)(w, x),
    "weights inside": lambda f, w, x: vmap(vmap(f, 0, None), None, 0)(w, x),
    "both outside": lambda f, w, x: vmap(vmap(f, None, 0), 0, 0)(
        w, jnp.stack([x, x**2])
    ),
    "both inside": lambda f, w, x: vmap(vmap(f, 0, 0), None, 0)(
        w, jnp.stack([x[:2], x[1:]])
    ),
    "batch of batches": lambda f, w, x: vmap(vmap(f, None, 0), None, 0)(
        w[0], jnp.stack([x, x**2])
    ),
    "inner axis without effect": lambda f, w, x: vmap(
        lambda x: vmap(lambda i: f(w[0], x) * i, 0)(jnp.arange(2.0).astype(x.dtype)), 0
    )(x),
    "scan": lambda f, w, x: scan(f, w[0], x),
    "batch of scans": lambda f, w, x: vmap(lambda x: scan(f, w[0], x), 0)(
        jnp.stack([x, x**2])
    ),
    "scan of batches": lambda f, w, x: scan(vmap(f, None, 0), w[0], x[:, None] * x),
    "batch of loops": lambda f, w, x: vmap(lambda x: loop(f, w[0], x), 0)(x),
    "cond": lambda f, w, x: (branch(f, w[0], x[0]), branch(f, w[1], x[1])),
    "batch of cond": lambda f, w, x: vmap(lambda x: branch(f, w[0], x), 0)(x),
    "checkpoint": lambda f, w, x: jax.checkpoint(vmap(f, None, 0))(w[0], x),
    "composition": lambda f, w, x: vmap(lambda x: f(w[1], f(w[0], x)), 0)(x),
}


def weights_and_inputs(dtype=jnp.float64):
    w = jnp.array([[[0.5, -0.8], [0.9, 0.3]], [[-0.4, 1.2], [0.6, -0.7]]], dtype)
    x = jnp.array([[0.5, -0.2], [-0.7, 0.3], [0.1, 1.1]], dtype)
    return w, x


def loss(program, model, inputs):
    """Every entry of the outputs has another part in it."""
    leaves = jax.tree.leaves(program(model, *inputs))
    part = lambda y: np.cos(1 + np.arange(y.size)).reshape(y.shape).astype(y.dtype)
    return sum(jnp.sum(part(y) * y) for y in leaves)


def of_each(derivative, inputs):
    """Of the models with a rule, and of the plain one, in a single program."""
    models = (by_vjp, by_hand, plain)
    fn = lambda inputs: [derivative(model, inputs) for model in models]
    *ours, expected = jax.jit(fn)(inputs)
    return ours, expected


def gradient(name):
    total = lambda model, inputs: loss(programs[name], model, inputs)
    return jax.grad(total, argnums=1)


@pytest.mark.parametrize("name", programs)
def test_gradient(name):
    ours, expected = of_each(gradient(name), weights_and_inputs())
    for grads in ours:
        assert relative_error(grads, expected) < 1e-13


@pytest.mark.parametrize("name", ("single", "weights outside", "batch of scans"))
def test_gradient_in_single_precision(name):
    ours, expected = of_each(gradient(name), weights_and_inputs(jnp.float32))
    for grads in ours:
        assert relative_error(grads, expected) < 1e-5


def test_gradient_without_jit():
    w, x = weights_and_inputs()
    total = lambda w: jnp.sum(vmap(by_vjp, None, 0)(w, x))
    expected = jnp.cos(x @ w[0].T).T @ x
    np.testing.assert_allclose(jax.grad(total)(w[0]), expected, rtol=1e-13)


def test_batch_of_gradients():
    """They are kept apart."""
    one = lambda model: jax.grad(lambda w, x: jnp.sum(model(w, x)))
    ours, expected = of_each(
        lambda model, inputs: vmap(one(model), None, 0)(inputs[0][0], inputs[1]),
        weights_and_inputs(),
    )
    assert expected.shape == (3, 2, 2)
    for grads in ours:
        assert relative_error(grads, expected) < 1e-13


def test_batch_of_gradients_of_batches():
    """They are kept apart, and each is summed over its batch."""
    w, x = weights_and_inputs()
    total = lambda model, w, x: jnp.sum(vmap(model, None, 0)(w, x))
    ours, expected = of_each(
        lambda model, xs: vmap(jax.grad(total, 1), None, None, 0)(model, w[0], xs),
        jnp.stack([x, x**2]),
    )
    assert expected.shape == (2, 2, 2)
    for grads in ours:
        assert relative_error(grads, expected) < 1e-13


@pytest.mark.parametrize("name", ("batch", "weights outside"))
def test_jacobian(name):
    """The cotangents have one more axis, over which nothing is summed."""
    jacobian = lambda model, inputs: jax.jacrev(
        lambda inputs: programs[name](model, *inputs)
    )(inputs)
    ours, expected = of_each(jacobian, weights_and_inputs())
    for grads in ours:
        assert relative_error(grads, expected) < 1e-13


def test_derivative_is_what_the_rule_says():
    def rule(perturbed, inputs, residuals, outputs, grad_outputs, axes):
        weight, _ = inputs
        assert residuals is None
        assert outputs.shape == grad_outputs.shape == (2,)
        grad_weight = jnp.full_like(weight, 2.0)
        for axis in axes:
            grad_weight = jax.lax.psum(grad_weight, axis)
        return grad_weight, 3 * grad_outputs, jnp.array(False)

    model = with_rule(plain, rule)
    inputs = weights_and_inputs()
    w, x = inputs
    np.testing.assert_array_equal(model(w[0], x[0]), plain(w[0], x[0]))
    one = jax.grad(lambda w, x: jnp.sum(model(w, x)), argnums=(0, 1))
    grad_w, grad_x = one(w[0], x[0])
    np.testing.assert_array_equal(grad_w, np.full((2, 2), 2.0))
    np.testing.assert_array_equal(grad_x, [3.0, 3.0])
    batch = jax.grad(lambda w, x: jnp.sum(vmap(model, None, 0)(w, x)), argnums=(0, 1))
    grad_w, grad_x = batch(w[0], x)
    np.testing.assert_array_equal(grad_w, np.full((2, 2), 6.0))
    np.testing.assert_array_equal(grad_x, np.full((3, 2), 3.0))


def test_wrong_cotangents_are_nan():
    """Of an element's own, and of what it shares with others, where that is."""
    model = with_rule(plain, rule_of(plain, lambda x: x[0] < 0))
    w, x = weights_and_inputs()
    xs = jnp.stack([jnp.abs(x), x])  # the second element of the second batch is wrong

    def total(inputs, in_axes):
        w, xs = inputs
        return jnp.sum(vmap(vmap(model, None, 0), *in_axes)(w, xs))

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    is_wrong = np.zeros((2, 3, 2), bool)
    is_wrong[1, 1] = True
    grad_w, grad_x = gradient((w, xs), (0, 0))
    np.testing.assert_array_equal(np.isnan(grad_x), is_wrong)
    np.testing.assert_array_equal(np.isnan(grad_w[0]), np.zeros((2, 2), bool))
    np.testing.assert_array_equal(np.isnan(grad_w[1]), np.ones((2, 2), bool))
    grad_w, grad_x = gradient((w[0], xs), (None, 0))
    np.testing.assert_array_equal(np.isnan(grad_x), is_wrong)
    assert np.all(np.isnan(grad_w))
    grad_w, grad_x = gradient((w[0], jnp.abs(xs)), (None, 0))
    assert np.all(np.isfinite(grad_w)) and np.all(np.isfinite(grad_x))
    # What is an element's own here, and shared over the outer axis.
    _, grad_x = gradient((w, x), (0, None))
    np.testing.assert_array_equal(np.isnan(grad_x), is_wrong[1])


def test_wrong_cotangent_of_one():
    model = with_rule(plain, rule_of(plain, lambda x: x[0] < 0))
    w, x = weights_and_inputs()
    one = jax.grad(lambda x: jnp.sum(model(w[0], x)))
    np.testing.assert_array_equal(np.isnan(one(x[1])), [True, True])
    np.testing.assert_array_equal(np.isnan(one(x[0])), [False, False])


forward_modes = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jit of jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
}


@pytest.mark.parametrize("name", forward_modes)
def test_forward_mode(name):
    w, x = weights_and_inputs()
    derivative = forward_modes[name]
    for fn in (
        lambda x: by_vjp(w[0], x[0]),
        lambda x: vmap(by_vjp, None, 0)(w[0], x),
        lambda x: scan(by_vjp, w[0], x)[0],
    ):
        with pytest.raises(ValueError, match=no_forward_mode):
            derivative(fn, x)
    with pytest.raises(ValueError, match=no_forward_mode):
        jax.vmap(lambda x: derivative(lambda x: by_vjp(w[0], x), x))(x)


def test_rule_sees_what_is_differentiated():
    seen = []
    right = rule_of(lambda shared, own: plain(shared["weight"], own[0]))

    def rule(perturbed, *args):
        seen.append(perturbed)
        return right(perturbed, *args)

    model = with_rule(lambda shared, own: plain(shared["weight"], own[0]), rule)
    w, x = weights_and_inputs()

    def total(w, x):
        one = lambda x: model({"weight": w, "number": 1}, (x, jnp.arange(2)))
        return jnp.sum(jax.vmap(one)(x)) + jnp.sum(one(x[0]))

    for argnums, expected in (
        (0, ({"weight": True, "number": False}, (False, False))),
        (1, ({"weight": False, "number": False}, (True, False))),
        ((0, 1), ({"weight": True, "number": False}, (True, False))),
    ):
        for fn in (total, jax.jit(total)):
            seen.clear()
            jax.eval_shape(jax.grad(fn, argnums), w[0], x)
            assert seen == 2 * [expected]


def assert_equal_gradients(total, inputs, model, plain):
    fn = lambda inputs: [jax.grad(total, 1)(f, inputs) for f in (model, plain)]
    assert relative_error(*jax.jit(fn)(inputs)) < 1e-13


def test_cotangents_that_are_not_given():
    """A rule leaves out what is not differentiated."""

    def rule(perturbed, inputs, residuals, outputs, grad_outputs, axes):
        assert perturbed == (False, True)
        weight, x = inputs
        grad_x = weight.T @ (grad_outputs * jnp.cos(weight @ x))
        return None, grad_x, jnp.array(False)

    w, x = weights_and_inputs()
    assert_equal_gradients(
        lambda model, x: jnp.sum(vmap(model, None, 0)(w[0], x)),
        x,
        with_rule(plain, rule),
        plain,
    )


def test_output_that_does_not_depend_on_the_batch():
    """Its cotangent is one for each element all the same."""
    fn = lambda weight, x: (weight @ weight, jnp.tanh(weight @ x))
    program = programs["batch of batches"]
    total = lambda model, inputs: loss(program, model, inputs)
    model = with_rule(fn, rule_of(fn))
    assert_equal_gradients(total, weights_and_inputs(), model, fn)


def test_output_that_is_not_used():
    """Its cotangent is zero."""
    fn = lambda weight, x: (weight @ x, jnp.tanh(weight @ x))
    total = lambda model, inputs: jnp.sum(
        vmap(model, None, 0)(inputs[0][0], inputs[1])[1]
    )
    model = with_rule(fn, rule_of(fn))
    assert_equal_gradients(total, weights_and_inputs(), model, fn)


def test_leaves_without_derivative():
    """Integers, keys, NumPy's arrays, `None`, numbers and functions, in everything."""

    class Shared(eqx.Module):
        weight: jax.Array
        count: jax.Array
        constant: np.ndarray
        power: int
        fn: eqx.nn.Lambda
        nothing: None

    def fn(shared, own):
        noise = jr.normal(own["key"], (2,))
        count = shared.count.astype(noise.dtype)
        y = shared.fn(shared.weight @ own["x"] * count) + shared.constant * noise
        return {"y": y**shared.power, "count": shared.count + 1, "no": None}

    def rule(perturbed, inputs, residuals, outputs, grad_outputs, axes):
        assert grad_outputs["count"] is None and outputs["no"] is None
        key, name = residuals
        assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and name == "residual"
        return rule_of(fn)(perturbed, inputs, None, outputs, grad_outputs, axes)

    def ours(shared, own):
        outputs = fn(*detach((shared, own)))
        residuals = (own["key"], "residual")
        return with_derivative(
            rule, shared, own, residuals, outputs, no_forward_mode=no_forward_mode
        )

    w, x = weights_and_inputs()

    def total(inputs, model):
        w, x = inputs
        fn = eqx.nn.Lambda(jnp.sin)
        shared = Shared(w, jnp.array(2), np.array([0.5, 2.0]), 3, fn, None)

        def one(x, key):
            out = model(shared, {"x": x, "key": key})
            assert out["no"] is None
            return out["y"], out["count"]

        y, count = jax.vmap(one, out_axes=(0, None))(x, keys(3))
        return jnp.sum(jnp.cos(jnp.arange(6.0)) * y.ravel()), count

    gradient = eqx.filter_jit(jax.value_and_grad(total, has_aux=True))
    (value, count), grads = gradient((w[0], x), ours)
    (expected_value, _), expected_grads = gradient((w[0], x), fn)
    np.testing.assert_allclose(value, expected_value, rtol=1e-14)
    assert count == 3
    assert relative_error(grads, expected_grads) < 1e-13


@pytest.mark.parametrize(
    "name,outer",
    (
        ("weights outside", jax.jacfwd),
        ("batch of scans", jax.jacfwd),
        ("batch", jax.jacrev),
    ),
)
def test_second_derivative(name, outer):
    """As far as the rule has one."""

    def derivative(model, inputs):
        total = jax.jit(lambda inputs: loss(programs[name], model, inputs))
        return outer(jax.jit(jax.grad(total)))(inputs)

    ours, expected = of_each(derivative, weights_and_inputs())
    for grads in ours:
        assert relative_error(grads, expected) < 1e-12


@pytest.mark.parametrize("outer", (jax.jacfwd, jax.jacrev))
def test_mixed_derivative(outer):
    """The outer derivative is one that the inner one knows nothing of."""

    def mixed(model, inputs):
        w, x = inputs
        total = lambda w, x: jnp.sum(vmap(model, None, 0)(w, x))
        return outer(lambda w: jax.grad(total, argnums=1)(w, x))(w[0])

    ours, expected = of_each(mixed, weights_and_inputs())
    for grads in ours:
        assert relative_error(grads, expected) < 1e-13


def test_inner_derivative_that_does_not_pass_through():
    """What was detached takes part in it, but not what has a rule: this has its own
    derivative in the outer one.
    """
    w, x = weights_and_inputs()

    def ours(w, x, factor):
        *inputs, factor = detach((w, x, factor))
        outputs = plain(*inputs)
        rule = rule_of(plain)
        outputs = with_derivative(
            rule, w, x, None, outputs, no_forward_mode=no_forward_mode
        )
        return outputs, factor

    def theirs(w, x, factor):
        return plain(w, x), jax.lax.stop_gradient(factor)

    def mixed(model, outer):
        def total(factor, w, x):
            outputs, _ = model(w, x, factor)
            return factor * jnp.sum(outputs)

        return outer(lambda w: jax.grad(total)(2.0, w, x[0]))(w[0])

    for outer in (jax.jacfwd, jax.jacrev):
        assert relative_error(mixed(ours, outer), mixed(theirs, outer)) < 1e-13


def test_detach():
    x = jnp.array([0.3, -0.5])
    tree = {"x": x, "count": jnp.arange(2), "number": 1.5, "none": None, "fn": jnp.sin}
    out = detach(tree)
    assert out["number"] == 1.5 and out["none"] is None and out["fn"] is jnp.sin
    np.testing.assert_array_equal(out["count"], [0, 1])
    np.testing.assert_array_equal(out["x"], x)
    for transform in (lambda f: f, jax.jit, jax.vmap, lambda f: jax.vmap(jax.jit(f))):
        square = lambda x: jnp.sum(transform(lambda x: x * detach(x))(x))
        np.testing.assert_array_equal(jax.grad(square)(x), x)
        _, tangent_out = jax.jvp(square, (x,), (jnp.ones(2),))
        np.testing.assert_allclose(tangent_out, jnp.sum(x))


def test_detach_is_for_one_differentiation():
    cube = lambda x: x * detach(x**2)
    for outer in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(outer(jax.grad(cube))(3.0), 6.0)
        np.testing.assert_allclose(outer(jax.jit(jax.grad(jax.jit(cube))))(3.0), 6.0)


def test_detach_is_for_the_innermost_differentiation():
    """That of any of the arrays is that of all."""

    def product(x, y):
        x, y = detach((x, y))
        return x * y

    of_value = lambda y: jax.value_and_grad(product)(2.0, y)[0]
    np.testing.assert_array_equal(jax.grad(product, argnums=1)(2.0, 3.0), 0.0)
    np.testing.assert_array_equal(jax.grad(of_value)(3.0), 2.0)
