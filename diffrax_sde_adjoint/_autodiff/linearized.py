"""Functions that are traced once, in two parts: what is evaluated on the way to a
result, and the linear function by which its cotangents are pulled back.

Between the two there are *residuals*: what the second part needs of the first, such as
the slopes of activation functions. If they are kept, pulling back costs no evaluation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import num_bytes
from .batched_vjp import Axes, pull_back
from .jaxprs import (
    dependent,
    evaluate,
    evaluate_equations,
    needed,
    primitives,
    read,
    variables_of,
    without_addends,
    without_jits,
)


# These have no derivative in forward mode.
_in_reverse_only = ("custom_vjp_call", "custom_vjp_call_jaxpr")

# What these return is found again, if their inputs are kept for something else.
_cheap = frozenset("add add_any integer_pow mul neg select_n square sub".split())
# How many of these, one after another.
_max_depth = 4
# The inputs of these are kept instead of what they return.
_views = frozenset("broadcast_in_dim copy reshape squeeze transpose".split())


class Inputs(NamedTuple):
    """What a function is called with: `shared` arrays, which are differentiated, and
    what is `constant`, both the same in all calls; and `own`, whose inexact arrays are
    differentiated, and what is `varying`.
    """

    shared: PyTree[Array | None]
    constant: Any
    own: Any
    varying: Any


def _partition(inputs: Inputs) -> tuple[PyTree[Array | None], Any]:
    """The arrays, with those of `own` that are not differentiated in the last of four
    parts; and all else.
    """
    own, own_rest = eqx.partition(inputs.own, eqx.is_inexact_array)
    rest = (inputs.constant, (own_rest, inputs.varying))
    dynamic, static = eqx.partition(rest, eqx.is_array)
    return (inputs.shared, own, *dynamic), static


def _combine(arrays: PyTree[Array | None], static: Any) -> Inputs:
    shared, own, *dynamic = arrays
    constant, (own_rest, varying) = eqx.combine(tuple(dynamic), static)
    return Inputs(shared, constant, eqx.combine(own, own_rest), varying)


class Linearized:
    """`fn(inputs)`, traced for inputs of this structure. It must not refer to traced
    arrays by closure. If it `has_aux`, it returns two things, and the second one has no
    derivative.

    What is to be kept are residuals that vary, or what they are found from at no cost.
    A function that has no derivative in forward mode is evaluated again when cotangents
    are pulled back, so its residuals are its inputs.
    """

    def __init__(self, fn: Callable[[Inputs], Any], inputs: Inputs, has_aux: bool):
        arrays, static = _partition(inputs)
        static_out: Any = None

        def array_fn(*arrays):
            nonlocal static_out
            out = fn(_combine(arrays, static))
            dynamic, rest = eqx.partition(out, eqx.is_array)
            leaves, treedef = jtu.tree_flatten(dynamic)
            num = len(jtu.tree_leaves(dynamic[0] if has_aux else dynamic))
            is_differentiated = list(map(eqx.is_inexact_array, leaves[:num]))
            static_out = (rest, treedef, is_differentiated)
            return leaves

        jaxpr = without_jits(array_fn, *arrays)
        assert static_out is not None
        self._static_out, self._out_treedef, is_differentiated = static_out
        self._out_avals = jaxpr.out_avals
        self._own_treedef = jtu.tree_structure(arrays[1])
        num_shared, num_own, num_constant, _ = (len(jtu.tree_leaves(x)) for x in arrays)
        self._is_linear = set(_in_reverse_only).isdisjoint(primitives(jaxpr.jaxpr))
        prepare = _linearize if self._is_linear else _evaluated_again
        self._jaxpr, self._fn = prepare(jaxpr, is_differentiated, num_shared, num_own)
        equations, invars = self._jaxpr.jaxpr.eqns, self._jaxpr.jaxpr.invars
        ends = num_shared, num_shared + num_own, num_shared + num_own + num_constant
        self._own = invars[ends[0] : ends[1]]
        self._constants = invars[: ends[0]] + invars[ends[1] : ends[2]]
        varying = dependent(equations, self._own + invars[ends[2] :])
        self._residuals = self._jaxpr.jaxpr.outvars[len(jaxpr.out_avals) :]
        self._kept = _to_keep(equations, self._residuals, varying)
        known = {*self._kept, *self._constants, *self._jaxpr.jaxpr.constvars}
        self._found_again = needed(equations, self._residuals, known)

    @property
    def out_struct(self) -> Any:
        """What it returns, with structs for arrays."""
        structs = map(_struct, self._out_avals)
        dynamic = jtu.tree_unflatten(self._out_treedef, structs)
        is_none = lambda x: x is None
        pick = lambda x, y: y if x is None else x
        return jtu.tree_map(pick, dynamic, self._static_out, is_leaf=is_none)

    @property
    def kept_structs(self) -> list[jax.ShapeDtypeStruct]:
        return [_struct(x.aval) for x in self._kept]

    def __call__(self, inputs: Inputs) -> tuple[Any, list[Array]]:
        """The function's result, and what is to be kept of it."""
        arrays, _ = _partition(inputs)
        values = self._known(self._jaxpr.jaxpr.invars, jtu.tree_leaves(arrays))
        evaluate_equations(self._jaxpr.jaxpr.eqns, values)
        out = read(self._jaxpr.jaxpr.outvars, values)[: self._out_treedef.num_leaves]
        dynamic = jtu.tree_unflatten(self._out_treedef, map(jnp.asarray, out))
        return eqx.combine(dynamic, self._static_out), read(self._kept, values)

    def pull_back(
        self,
        axes: Axes,
        shared: PyTree[Array | None],
        constant: Any,
        kept: Sequence[Array],
        cotangents: PyTree[Array | None],
        sums: PyTree[Array | None],
    ) -> tuple[PyTree[Array | None], PyTree[Array | None]]:
        """`sums`, with the cotangents of `shared` added; and those of the inexact
        arrays of `own`: from those of the inexact arrays of the result (of the first
        one, if it `has_aux`). The former are sums over all `axes` over which an array
        is not batched.

        Over each of the axes something must be batched, such as the cotangents.
        """
        if len(self._own) == 0 and len(jtu.tree_leaves(shared)) == 0:
            return sums, jtu.tree_unflatten(self._own_treedef, ())
        constants = jtu.tree_leaves((shared, eqx.filter(constant, eqx.is_array)))
        values = self._known([*self._constants, *self._kept], [*constants, *kept])
        evaluate_equations(self._found_again, values)
        if self._is_linear:
            own = [jnp.zeros(x.aval.shape, x.aval.dtype) for x in self._own]
        else:
            own = read(self._own, values)
        sums, treedef = jtu.tree_flatten(sums)
        sums, grads = pull_back(
            self._fn,
            axes,
            jtu.tree_leaves(shared),
            own,
            list(map(jnp.asarray, read(self._residuals, values))),
            jtu.tree_leaves(cotangents),
            sums,
            is_linear=self._is_linear,
        )
        return (
            jtu.tree_unflatten(treedef, sums),
            jtu.tree_unflatten(self._own_treedef, grads),
        )

    def _known(self, variables: Sequence[Any], arrays: Sequence[Any]) -> dict[Any, Any]:
        jaxpr = self._jaxpr
        values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        values.update(zip(variables, arrays, strict=True))
        return values


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _linearize(
    jaxpr: jex.core.ClosedJaxpr,
    is_differentiated: Sequence[bool],
    num_shared: int,
    num_own: int,
) -> tuple[jex.core.ClosedJaxpr, Callable[..., list[Array]]]:
    """The jaxpr with residuals as further outputs, and the derivative of its first
    outputs, if they have one, as a function of the tangents of its first inputs and the
    residuals.
    """
    linear = None

    def linearized(*args):
        nonlocal linear
        diff, rest = args[: num_shared + num_own], args[num_shared + num_own :]

        def of_diff(*diff):
            out = evaluate(jaxpr, *diff, *rest)
            pairs = zip(out, is_differentiated, strict=False)
            return [jnp.asarray(x) for x, b in pairs if b], out

        _, tangents_out, out = jax.linearize(of_diff, *diff, has_aux=True)
        linear = without_addends(without_jits(tangents_out, *diff))
        return [*out, *linear.consts]

    with_residuals = jax.make_jaxpr(linearized)(*jaxpr.in_avals)
    assert linear is not None
    linear_jaxpr = linear.jaxpr

    def tangents_out(shared, own, residuals):
        closed_jaxpr = jex.core.ClosedJaxpr(linear_jaxpr, residuals)
        return list(map(jnp.asarray, evaluate(closed_jaxpr, *shared, *own)))

    return with_residuals, tangents_out


def _evaluated_again(
    jaxpr: jex.core.ClosedJaxpr,
    is_differentiated: Sequence[bool],
    num_shared: int,
    num_own: int,
) -> tuple[jex.core.ClosedJaxpr, Callable[..., list[Array]]]:
    """The same for what is evaluated again: its residuals are its other inputs, and the
    function is what it is itself.
    """

    def with_inputs(*args):
        return [*evaluate(jaxpr, *args), *args[num_shared:]]

    def outputs(shared, own, residuals):
        out = evaluate(jaxpr, *shared, *own, *residuals[num_own:])
        pairs = zip(out, is_differentiated, strict=False)
        return [jnp.asarray(x) for x, b in pairs if b]

    return jax.make_jaxpr(with_inputs)(*jaxpr.in_avals), outputs


def _to_keep(
    equations: Sequence[Any], residuals: Sequence[Any], varying: set[Any]
) -> list[Any]:
    """What varies that `residuals` can be found from at no cost."""
    made_by = {x: equation for equation in equations for x in equation.outvars}
    name_of = lambda x: made_by[x].primitive.name if x in made_by else None
    inputs_of = lambda x: [y for y in variables_of(made_by[x].invars) if y in varying]

    def sources(x, depth=0):
        """What `x` is made of at no cost."""
        is_view, is_cheap = name_of(x) in _views, name_of(x) in _cheap
        if not is_view and (not is_cheap or depth == _max_depth):
            return {x}
        found = [sources(y, depth + is_cheap) for y in inputs_of(x)]
        return set().union(*found)

    size = lambda xs: sum(num_bytes(_struct(x.aval)) for x in xs)
    kept = set()
    for x in variables_of(residuals):
        if x in varying:
            is_smaller = name_of(x) in _views or size(sources(x)) < size([x])
            kept.update(sources(x) if is_smaller else {x})

    def can_be_found(x, depth=0):
        if x in kept:
            return True
        is_cheap = name_of(x) in _cheap | _views and depth < _max_depth
        return is_cheap and all(can_be_found(y, depth + 1) for y in inputs_of(x))

    # What was computed last first.
    for equation in reversed(equations):
        for x in kept.intersection(equation.outvars):
            kept.remove(x)
            if name_of(x) not in _cheap or not can_be_found(x):
                kept.add(x)
    order = {x: i for i, x in enumerate([*made_by])}
    return sorted(kept, key=lambda x: order.get(x, -1))
