"""Transposes of linear functions, that add to what there is.

A vector field may read a few numbers from a long array, such as the entry of a series
for the time of a step. By JAX's rules, the cotangent of the array would be as long, in
every step, and zero but for a few numbers. So each reading of an array of which the
cotangent is wanted is made an input of its own, whose cotangent is added in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from .jaxprs import dependent, evaluate_equations, read, variables_of, without_jits


def transpose_into(
    fn: Callable[..., list[Array]],
    shared: list[Array],
    own: list[Array],
    residuals: list[Array],
    cotangents: list[Array],
    sums: list[Array],
) -> tuple[list[Array], list[Array]]:
    """`sums`, with the cotangents of `shared` added, and those of `own`: from those of
    `fn(shared, own, residuals)`, which is linear in both. Of these, only shapes matter.
    """
    jaxpr = without_jits(fn, shared, own, residuals)
    equations, invars = jaxpr.jaxpr.eqns, jaxpr.jaxpr.invars
    num_shared, num_diff = len(shared), len(shared) + len(own)
    linear = dependent(equations, invars[:num_diff])
    values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    values.update(zip(invars[num_diff:], residuals, strict=True))
    is_linear = lambda x: not linear.isdisjoint(variables_of(x.invars))
    evaluate_equations([x for x in equations if not is_linear(x)], values)
    equations = [x for x in equations if is_linear(x)]

    position = {x: i for i, x in enumerate(invars[:num_shared])}
    is_read = lambda x: (
        x.primitive.name in _add_at
        and x.invars[0] in position
        and linear.isdisjoint(variables_of(x.invars[1:]))
        and x.params.get("strides") is None
    )
    reads = [x for x in equations if is_read(x)]
    equations = [x for x in equations if not is_read(x)]
    outvars = jaxpr.jaxpr.outvars
    used = {y for x in equations for y in variables_of(x.invars)}
    used.update(variables_of(outvars))
    dense = [x for x in invars[:num_diff] if x in used]
    inputs = [*dense, *(x.outvars[0] for x in reads)]

    def rest(*args):
        env = {**values, **dict(zip(inputs, args, strict=True))}
        evaluate_equations(equations, env)
        return read(outvars, env)

    structs = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in inputs]
    grads = jax.linear_transpose(rest, *structs)(cotangents)
    sums, grad_own = list(sums), [jnp.zeros(x.shape, x.dtype) for x in own]
    for x, grad in zip(dense, grads, strict=False):
        if x in position:
            sums[position[x]] = sums[position[x]] + grad
        else:
            grad_own[invars.index(x) - num_shared] = grad
    for x, grad in zip(reads, grads[len(dense) :], strict=True):
        i = position[x.invars[0]]
        where = read(x.invars[1:], values)
        sums[i] = _add_at[x.primitive.name](sums[i], grad, *where, **x.params)
    return sums, grad_own


def _add_at_gather(x, grad, indices, *, dimension_numbers, mode, **params: Any):
    numbers = dimension_numbers
    return lax.scatter_add(
        x,
        indices,
        grad,
        lax.ScatterDimensionNumbers(
            update_window_dims=numbers.offset_dims,
            inserted_window_dims=numbers.collapsed_slice_dims,
            scatter_dims_to_operand_dims=numbers.start_index_map,
            operand_batching_dims=numbers.operand_batching_dims,
            scatter_indices_batching_dims=numbers.start_indices_batching_dims,
        ),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=mode,
    )


def _add_at_dynamic_slice(x, grad, *starts, slice_sizes, **_):
    # As the primitive does, of which `lax.dynamic_slice` counts negative ones from the
    # end before.
    last = [n - size for n, size in zip(x.shape, slice_sizes, strict=True)]
    starts = [jnp.clip(start, 0, n) for start, n in zip(starts, last, strict=True)]
    old = lax.dynamic_slice(x, starts, slice_sizes)
    return lax.dynamic_update_slice(x, old + grad, starts)


def _add_at_slice(x, grad, *, start_indices, **_):
    return _add_at_dynamic_slice(x, grad, *start_indices, slice_sizes=grad.shape)


# By the primitives that read.
_add_at = {
    "gather": _add_at_gather,
    "dynamic_slice": _add_at_dynamic_slice,
    "slice": _add_at_slice,
}
