"""A clipped network does not magnify distances."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_sde_adjoint import clip_lipschitz, lipswish


NORMS = {"l1": 1, "linf": jnp.inf}


def _ratios(network, size, order, key):
    """How much the network magnifies the distance of each of many pairs of inputs."""
    x_key, y_key, scale_key = jr.split(key, 3)
    x = 3 * jr.normal(x_key, (2000, size))
    scale = 10 ** jr.uniform(scale_key, (2000, 1), minval=-4, maxval=1)
    y = x + scale * jr.normal(y_key, x.shape)
    distance = lambda a, b: jnp.linalg.norm(a - b, ord=order, axis=-1)
    return distance(jax.vmap(network)(x), jax.vmap(network)(y)) / distance(x, y)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_networks_are_lipschitz(norm):
    network = eqx.nn.MLP(5, 4, 16, 3, lipswish, key=jr.key(0))
    large = jax.tree.map(lambda x: 10 * x if eqx.is_array(x) else x, network)
    order = NORMS[norm]
    assert _ratios(large, 5, order, jr.key(1)).max() > 10
    clipped = clip_lipschitz(large, norm)
    assert _ratios(clipped, 5, order, jr.key(1)).max() <= 1 + 1e-9

    # The bound is attained by the largest linear map.
    linear = eqx.tree_at(lambda x: x.weight, large.layers[0], 9 * jnp.ones((16, 5)))
    linear = clip_lipschitz(linear, norm)
    assert _ratios(linear, 5, order, jr.key(1)).max() <= 1 + 1e-9
    length = lambda x: jnp.linalg.norm(x, ord=order)
    ones = jnp.ones(5)
    assert abs(length(linear(ones) - linear(-ones)) / length(2 * ones) - 1) < 1e-12


def test_lipswish():
    x = jnp.linspace(-20, 20, 100_001)
    assert jnp.allclose(lipswish(x), 0.909 * x / (1 + jnp.exp(-x)))
    slope = jnp.abs(jax.vmap(jax.grad(lipswish))(x))
    assert 0.999 < slope.max() < 0.99976
    assert lipswish(jnp.float32(1)).dtype == jnp.float32


def test_only_weights_of_linear_maps_change():
    class Critic(eqx.Module):
        start: eqx.nn.Linear
        field: eqx.nn.MLP
        scale: jax.Array

        def __init__(self, key):
            self.start = eqx.nn.Linear(2, 4, key=key)
            self.field = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 3, 8, 1, key=key))(
                jr.split(key, 5)
            )
            self.scale = jnp.array(7.0)

    critic = Critic(jr.key(0))
    clipped = eqx.filter_jit(clip_lipschitz)(critic)
    assert jax.tree.structure(clipped) == jax.tree.structure(critic)
    assert clipped.scale == 7
    for old, new in [
        (critic.start, clipped.start),
        *zip(critic.field.layers, clipped.field.layers, strict=True),
    ]:
        bound = 1 / old.weight.shape[-2]
        assert jnp.array_equal(new.weight, jnp.clip(old.weight, -bound, bound))
        assert jnp.array_equal(new.bias, old.bias)
    assert eqx.tree_equal(clip_lipschitz(clipped), clipped)


def test_what_cannot_be_clipped_is_an_error():
    with pytest.raises(ValueError, match=r"has no `equinox\.nn\.Linear`"):
        clip_lipschitz(dict(x=jnp.ones(3)))
    linear = eqx.nn.Linear(2, 2, key=jr.key(0))
    for other in (
        eqx.nn.GRUCell(2, 2, key=jr.key(0)),
        eqx.nn.Conv1d(2, 2, 1, key=jr.key(0)),
        eqx.nn.LayerNorm(2),
        eqx.nn.MultiheadAttention(1, 2, key=jr.key(0)),
    ):
        with pytest.raises(ValueError, match=f"a `{type(other).__name__}`"):
            clip_lipschitz((linear, other))
    with pytest.raises(ValueError, match='is `"l1"` or `"linf"`, but is `2`'):
        inspect.unwrap(clip_lipschitz)(linear, 2)
