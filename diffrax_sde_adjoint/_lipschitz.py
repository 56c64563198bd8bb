r"""What keeps a network from magnifying distances, as the critic of an SDE-GAN must."""

from typing import Literal, TypeAlias, TypeVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float


_Module = TypeVar("_Module")
_Norm: TypeAlias = Literal["l1", "linf"]


def lipswish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The activation function $\rho(x) = 0.909\, x\, \sigma(x)$ with the logistic
    function $\sigma$, which is smooth and 1-Lipschitz: $|\rho'| < 0.99976$.

    **Arguments:**

    - `x`: of any shape and any floating point dtype.

    **Returns:**

    The same shape and dtype, elementwise.

    Source: Chen, Behrmann, Duvenaud and Jacobsen, *Residual Flows for Invertible
    Generative Modeling*, NeurIPS 2019.
    """
    return 0.909 * jax.nn.silu(x)


def clip_lipschitz(module: _Module, norm: _Norm = "l1") -> _Module:
    r"""A module whose linear maps are 1-Lipschitz, as their weights are clipped: that
    of a critic, after each step of its optimiser.

    ```python
    updates, opt_state = optimiser.update(grads, opt_state, critic)
    critic = clip_lipschitz(eqx.apply_updates(critic, updates))
    ```

    Each entry of each matrix $A \in \mathbb{R}^{a \times b}$ is replaced by

    $\min(\max(A_{ij}, -1/a), 1/a),$ so that $\|A x\|_1 \le \|x\|_1,$

    for $x \in \mathbb{R}^b$, or with $1/b$, so that $\|A x\|_\infty \le \|x\|_\infty$.
    Together with 1-Lipschitz activation functions, as
    [`diffrax_sde_adjoint.lipswish`][] or `tanh`, a network of such maps is 1-Lipschitz
    in the same norm, and no gradient penalty is needed.

    **Arguments:**

    - `module`: any PyTree, such as an `equinox.Module`. Each
        `equinox.nn.Linear` in it is clipped, also if it was made by
        `equinox.filter_vmap`, with matrices stacked along first axes. Biases, and
        arrays of modules that are not of `equinox.nn`, stay as they are.
    - `norm`: `"l1"`, the bound of $1/a$, by the size of the output; or `"linf"`, of
        $1/b$, by that of the input.

    **Returns:**

    The module, with other weights.

    **Raises:**

    `ValueError` if there is nothing to clip; if there is another layer of `equinox.nn`
    with weights, of which this bound says nothing, as a convolution, a recurrent cell
    or an attention; or if `norm` is something else.

    Source: Kidger, Foster, Li and Lyons, *Efficient and Accurate Gradients for Neural
    SDEs*, NeurIPS 2021, Section 5.
    """
    if norm not in get_args(_Norm):
        raise ValueError(
            f'`clip_lipschitz(..., norm=...)` is `"l1"` or `"linf"`, but is `{norm!r}`.'
        )
    is_linear = lambda x: isinstance(x, eqx.nn.Linear)

    def clip(layer):
        if _is_other_layer(layer):
            raise ValueError(
                "`clip_lipschitz` knows bounds for `equinox.nn.Linear` only, but "
                f"`module` has a `{type(layer).__name__}`. Build it of linear layers, "
                "or penalise gradients instead."
            )
        if not is_linear(layer):
            return layer
        size = layer.weight.shape[-2 if norm == "l1" else -1]
        weight = jnp.clip(layer.weight, -1 / size, 1 / size)
        return eqx.tree_at(lambda layer: layer.weight, layer, weight)

    is_layer = lambda x: is_linear(x) or _is_other_layer(x)
    clipped = jtu.tree_map(clip, module, is_leaf=is_layer)
    if not any(map(is_linear, jtu.tree_leaves(module, is_leaf=is_linear))):
        raise ValueError("`clip_lipschitz(module)` has no `equinox.nn.Linear`.")
    return clipped


def _is_other_layer(x: object) -> bool:
    """Whether it is a layer of equinox with weights, other than of linear maps."""
    if not isinstance(x, eqx.Module) or not type(x).__module__.startswith("equinox.nn"):
        return False
    if isinstance(x, eqx.nn.Linear | eqx.nn.MLP | eqx.nn.Sequential | eqx.nn.Lambda):
        return False
    return any(map(eqx.is_inexact_array, jtu.tree_leaves(x)))
