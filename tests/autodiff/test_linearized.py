"""What is kept of a function, to pull its cotangents back, and what is added in
place.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import relative_error

from diffrax_sde_adjoint._autodiff.in_place import transpose_into
from diffrax_sde_adjoint._autodiff.linearized import Inputs, Linearized
from diffrax_sde_adjoint._misc import zeros_like


def _kept(fn, shared, own, constant=None):
    """Shapes of what is kept, having checked what is pulled back."""
    inputs = Inputs(shared, constant, own, None)
    linearized = Linearized(lambda x: fn(*x[:3]), inputs, has_aux=False)

    @jax.jit
    def ours(inputs, cotangents):
        out, kept = linearized(inputs)
        grads = linearized.pull_back((), inputs, kept, cotangents, zeros_like(shared))
        return out, grads

    @jax.jit
    def theirs(shared, own, cotangents):
        out, pull_back = jax.vjp(lambda *x: fn(x[0], constant, x[1]), shared, own)
        return out, pull_back(cotangents)

    cotangents = jax.tree.map(jnp.cos, fn(shared, constant, own))
    expected = theirs(shared, own, cotangents)
    assert relative_error(ours(inputs, cotangents), expected) < 1e-14
    return sorted(x.shape for x in linearized.kept_structs)


weight = jnp.array(np.sin(np.arange(12.0)).reshape(4, 3))
x = jnp.array([0.3, -0.7, 0.2])


def test_weights_are_not_kept():
    """Nor is what only depends on them."""

    def fn(weight, constant, x):
        size = jnp.linalg.norm(weight)
        return jnp.tanh((weight * constant / size) @ x)

    assert _kept(fn, weight, x, constant=jnp.array(2.0)) == [(3,), (4,)]


def test_what_is_evaluated_twice_is_kept_once():
    def diffusion(weight, x):
        return jax.nn.softplus(weight @ x)

    def fn(weight, constant, x):
        del constant
        return diffusion(weight, x), 2 * diffusion(weight, x)

    # The input and the slope.
    assert _kept(fn, weight, x) == [(3,), (4,)]


def test_other_shapes_of_the_same_are_not_kept():
    def fn(scale, constant, x):
        del constant
        return scale * jnp.broadcast_to(x[:, None, None], (3, 50, 50)) ** 2

    assert _kept(fn, 2.0 * x[0], x) == [(3,)]


@jax.custom_vjp
def _in_reverse_only(x):
    return jnp.sin(x)


_in_reverse_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (jnp.cos(x) * ct,))


def test_what_has_no_derivative_in_forward_mode():
    """Its inputs are kept."""
    fn = lambda weight, _, x: _in_reverse_only(weight @ x)
    assert _kept(fn, weight, x) == [(3,)]
    # Also deep inside.
    inner = lambda weight, _, x: jax.lax.scan(
        lambda y, _: (_in_reverse_only(0.5 * weight[:3] @ y), None), x, length=2
    )[0]
    assert _kept(inner, weight, x) == [(3,)]


def test_nothing_to_differentiate():
    inputs = Inputs(None, jnp.array(2.0), None, jnp.array(1))
    linearized = Linearized(
        lambda x: x.constant * x.given.astype(float), inputs, has_aux=False
    )
    out, kept = linearized(inputs)
    assert out == 2
    assert linearized.pull_back((), inputs, kept, out, None) == (None, None)


array = jnp.array(np.sin(np.arange(30.0)).reshape(10, 3))
_reads = {
    "x[i]": lambda x, i: x[i],
    "take, clip": lambda x, i: jnp.take(x, i, axis=0, mode="clip"),
    "take, fill": lambda x, i: jnp.take(x, i, axis=0),
    "take, wrap": lambda x, i: jnp.take(x, i, axis=0, mode="wrap"),
    "column": lambda x, i: jnp.take(x, i, axis=1),
    "many": lambda x, i: x[jnp.stack([i, i, i - 1])],
    "dynamic_slice": lambda x, i: jax.lax.dynamic_slice(x, (i, 1), (2, 2)),
    "dynamic_slice of the primitive": lambda x, i: jax.lax.dynamic_slice(
        x, (i, 1), (2, 2), allow_negative_indices=False
    ),
    "slice": lambda x, i: x[2:5, 1:] * i.astype(float),
    "with strides": lambda x, i: x[1:8:3] * i.astype(float),
    "read twice": lambda x, i: x[i] * 2 + x[i - 1],
    "read, and more": lambda x, i: x[i] + jnp.sum(x, axis=0),
    "one of two": lambda x, i: jnp.where(i > 2, x[i], x[0]),
    "in a conditional": lambda x, i: jax.lax.cond(i > 2, lambda: x[i], lambda: x[0]),
    "at the end of a view": lambda x, i: x.T[:, i],
}


@jax.jit
def _cotangents_of_reads(index):
    """Ours and JAX's of all, of one index and of a batch."""

    def both(read, i):
        shape = jax.eval_shape(read, array, i)
        cotangent = jnp.ones(shape.shape)
        linear = lambda shared, own, residuals: [read(shared[0], residuals[0])]
        (ours,), _ = transpose_into(linear, [array], [], [i], [cotangent], [array])
        _, pull_back = jax.vjp(lambda x: read(x, i), array)
        return ours, array + pull_back(cotangent)[0]

    many = index + jnp.array([0, 1, 0])
    return {
        name: (both(read, index), jax.vmap(lambda i, read=read: both(read, i))(many))
        for name, read in _reads.items()
    }


@pytest.mark.parametrize("index", (0, 4, -1, -3, 20), ids=str)
def test_reads(index):
    """Of indices in the array and outside, as JAX has it."""
    for name, cases in _cotangents_of_reads(jnp.array(index)).items():
        for ours, theirs in cases:
            np.testing.assert_allclose(ours, theirs, rtol=1e-14, err_msg=name)


def test_reads_add_in_place():
    """Nothing of the length of the array is made."""
    length = 12_345

    def fn(sums, array, i):
        linear = lambda shared, own, residuals: [
            read(shared[0], residuals[0]) for read in (_reads["x[i]"], _reads["slice"])
        ]
        cotangents = [jnp.ones(3), jnp.ones((3, 2))]
        return transpose_into(linear, [array], [], [i], cotangents, [sums])

    sums = jr.normal(jr.key(0), (length, 3))
    text = jax.jit(fn).lower(sums, sums, jnp.array(7)).as_text()
    made = [line for line in text.splitlines() if f"tensor<{length}x3xf64>" in line]
    names = {
        line.split("stablehlo.")[1].split(" ")[0]
        for line in made
        if "stablehlo." in line
    }
    assert names <= {"dynamic_slice", "dynamic_update_slice", "slice", "scatter"}
