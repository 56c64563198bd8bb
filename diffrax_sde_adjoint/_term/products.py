"""Whether the product of a vector field and a control can be added to the solution.

An array that has another shape would be broadcast, and a wider type would be rounded or
widen the solution. Neither is what was meant.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import PyTree

from .._compat import VF, Y
from .base import unwrap


def check_products(
    terms: PyTree[diffrax.AbstractTerm],
    vf: VF,
    control: PyTree[Any],
    y: Y,
) -> None:
    """An error for a term whose product is not of the structure of `y`. The vector
    field and the control are those of `terms`.
    """
    if isinstance(terms, diffrax.MultiTerm):
        for term, its_vf, its_control in zip(terms.terms, vf, control, strict=True):
            check_products(term, its_vf, its_control, y)
    else:
        eqx.filter_eval_shape(product, terms, vf, control, y)


def product(
    term: diffrax.AbstractTerm, vf: VF, control: PyTree[Any], y: Y
) -> PyTree[Any]:
    """The product of one term, if it is of the structure of `y`."""
    try:
        out = term.prod(vf, control)
    except (TypeError, ValueError) as error:
        if type(unwrap(term)).prod not in (
            diffrax.ControlTerm.prod,
            diffrax.ODETerm.prod,
        ):
            raise
        raise ValueError(_wrong_structure(term, vf, control, y)) from error
    if not _are_alike(out, y):
        raise ValueError(_wrong_structure(term, vf, control, y))
    for x, yi in zip(jtu.tree_leaves(out), jtu.tree_leaves(y), strict=True):
        if not _can_be_added(jnp.result_type(x), jnp.result_type(yi)):
            raise ValueError(_wrong_dtype(term, vf, control, x, yi))
    return out


def _can_be_added(dtype: jnp.dtype, y_dtype: jnp.dtype) -> bool:
    if jax.config.jax_numpy_dtype_promotion == "strict":  # pyright: ignore[reportAttributeAccessIssue]
        return dtype == y_dtype
    return jnp.promote_types(dtype, y_dtype) == y_dtype


def _are_alike(out: PyTree[Any], y: Y) -> bool:
    shapes = lambda tree: jtu.tree_map(jnp.shape, tree)
    return eqx.tree_equal(shapes(out), shapes(y)) is True


def _describe(tree: PyTree[Any]) -> str:
    if isinstance(tree, lx.AbstractLinearOperator):
        return f"a `lineax.{type(tree).__name__}`"
    # With arrays as their types and shapes.
    return f"`{eqx.tree_pformat(tree, width=10**6, struct_as_array=True)}`"


def _wrong_structure(
    term: diffrax.AbstractTerm, vf: VF, control: PyTree[Any], y: Y
) -> str:
    inner = unwrap(term)
    message = (
        f"The product of the vector field of a `{type(inner).__name__}` and its "
        f"control does not have the structure of the solution `y`. The vector field is "
        f"{_describe(vf)}, the control is {_describe(control)}, and `y` is "
        f"{_describe(y)}. "
    )
    if jtu.tree_structure(control) != jtu.tree_structure(y):
        return message + (
            "Arrays are multiplied leaf by leaf, so that vector field and control need "
            "the PyTree structure of `y`. Give the control this structure, as in "
            "`BrownianInterval(shape=...)` with a PyTree of `jax.ShapeDtypeStruct`; "
            "or return an operator that maps the control to the structure of `y`, such "
            "as a `lineax.FunctionLinearOperator`."
        )
    message += "An array has to be of the shape of `y` followed by that of the control."
    if _are_alike(control, y):
        message += (
            " For diagonal noise, with a number for each one of `y`, return "
            "`lineax.DiagonalLinearOperator(diagonal)`."
        )
    return message


def _wrong_dtype(
    term: diffrax.AbstractTerm, vf: VF, control: PyTree[Any], x: Any, y: Any
) -> str:
    return (
        f"The product of the vector field of a `{type(unwrap(term)).__name__}` and its "
        f"control is `{jnp.result_type(x)}`, and the solution `y` is "
        f"`{jnp.result_type(y)}`, to which it cannot be added. The vector field is "
        f"{_describe(vf)} and the control is {_describe(control)}. Use one type "
        "throughout: that of the path is `BrownianInterval(shape=jax.ShapeDtypeStruct("
        "shape, dtype))`, and that of the solution is that of `y0` or, if this is "
        "wider, of the times `t0`, `t1` and `dt0`."
    )
