"""Functions that are traced once, in two parts: what is evaluated on the way to a
result, and the linear function by which its cotangents are pulled back.

Between the two there are *residuals*: what the second part needs of the first, such as
the slopes of activation functions. If they are kept, pulling back costs no evaluation.
"""

import itertools
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
    has_loop,
    needed,
    primitives,
    read,
    variables_of,
    without_addends,
    without_jits,
)
from .unrolled import unrolled


# These have no derivative in forward mode, the last of them by `with_derivative`; and
# such are the derivatives of what is in the rule of a `jax.custom_jvp`.
_in_reverse_only = {"custom_vjp_call", "custom_vjp_call_jaxpr", "with_derivative"}
_to_be_transposed_only = {"custom_lin", "in_reverse"}

# What these return is found again, if their inputs are kept for something else.
_cheap = frozenset("add add_any integer_pow mul neg select_n square sub".split())
# How many of these, one after another.
_max_depth = 4
# The inputs of these are kept instead of what they return.
_views = frozenset("broadcast_in_dim copy reshape squeeze transpose".split())


class Inputs(NamedTuple):
    """What a function is called with: `shared` arrays, which are differentiated, and
    what is `constant`, both the same in all calls; `own`, whose inexact arrays are
    differentiated; and what is `given` again when cotangents are pulled back.
    """

    shared: PyTree[Array | None]
    constant: Any
    own: Any
    given: Any


def _partition(inputs: Inputs) -> tuple[PyTree[Array | None], Any]:
    """The arrays in five parts: `own` is two, of which the second is not differentiated
    and comes last; and all else.
    """
    own, own_rest = eqx.partition(inputs.own, eqx.is_inexact_array)
    rest = (inputs.constant, inputs.given, own_rest)
    dynamic, static = eqx.partition(rest, eqx.is_array)
    return (inputs.shared, own, *dynamic), static


def _combine(arrays: PyTree[Array | None], static: Any) -> Inputs:
    shared, own, *dynamic = arrays
    constant, given, own_rest = eqx.combine(tuple(dynamic), static)
    return Inputs(shared, constant, eqx.combine(own, own_rest), given)


class Linearized:
    """`fn(inputs)`, traced for inputs of this structure. It must not refer to traced
    arrays by closure. If it `has_aux`, it returns two things, and the second one has no
    derivative.

    What is to be kept are residuals that vary, or what they are found from at no cost,
    but for what is given again. If it `finds_roots`, by iterations, these are its
    inputs and the roots: the derivative of a root may not be finite where a step is
    rejected. A function that has no derivative in forward mode is evaluated again when
    cotangents are pulled back, so its residuals are its inputs; and so is one of which
    it is not known before which roots it finds.
    """

    def __init__(
        self,
        fn: Callable[[Inputs], Any],
        inputs: Inputs,
        has_aux: bool,
        finds_roots: bool = False,
    ):
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
        self._own_treedef = jtu.tree_structure(arrays[1])
        lengths = [len(jtu.tree_leaves(x)) for x in arrays]
        num_shared, num_own, *_ = lengths
        sizes = (is_differentiated, num_shared, num_own)
        found = None
        if _in_reverse_only.isdisjoint(primitives(jaxpr.jaxpr)):
            written_out = unrolled(jaxpr) if finds_roots else jaxpr
            if not (finds_roots and _may_find_others(written_out.jaxpr)):
                found = _linearize(written_out, *sizes)
        self._is_linear = found is not None
        self._jaxpr, self._fn = found or _evaluated_again(jaxpr, *sizes)
        equations, invars = self._jaxpr.jaxpr.eqns, self._jaxpr.jaxpr.invars
        ends = list(itertools.accumulate(lengths))
        shared, self._own, constant, given, own_rest = (
            invars[end - length : end]
            for end, length in zip(ends, lengths, strict=True)
        )
        self._known_again = [*shared, *constant, *given]
        varying = dependent(equations, [*self._own, *own_rest, *given])
        self._residuals = self._jaxpr.jaxpr.outvars[self._out_treedef.num_leaves :]
        to_keep = _inputs_and_roots if finds_roots else _to_keep
        self._kept = to_keep(self._jaxpr.jaxpr, self._residuals, varying, given)
        known = {*self._kept, *self._known_again, *self._jaxpr.jaxpr.constvars}
        self._found_again = needed(equations, self._residuals, known)

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
        inputs: Inputs,
        kept: Sequence[Array],
        cotangents: PyTree[Array | None],
        sums: PyTree[Array | None],
    ) -> tuple[PyTree[Array | None], PyTree[Array | None]]:
        """`sums`, with the cotangents of `shared` added; and those of the inexact
        arrays of `own`: from those of the inexact arrays of the result (of the first
        one, if it `has_aux`). The former are sums over all `axes` over which an array
        is not batched. Where a sum is `None`, the cotangent is not wanted.

        Of the `inputs`, `own` does not matter. Over each of the axes something must be
        batched, such as the cotangents.
        """
        leaves, treedef = jtu.tree_flatten(inputs.shared)
        all_sums = treedef.flatten_up_to(sums)
        wanted = [i for i, x in enumerate(all_sums) if x is not None]
        if len(self._own) == 0 and len(wanted) == 0:
            return sums, jtu.tree_unflatten(self._own_treedef, ())
        rest = eqx.filter((inputs.constant, inputs.given), eqx.is_array)
        known = [*leaves, *jtu.tree_leaves(rest)]
        values = self._known([*self._known_again, *self._kept], [*known, *kept])
        evaluate_equations(self._found_again, values)
        residuals = list(map(jnp.asarray, read(self._residuals, values)))
        others = [i for i in range(len(leaves)) if i not in wanted]
        if self._is_linear:
            own = [_zeros(x) for x in self._own]
        else:
            own = read(self._own, values)
            residuals = [*(leaves[i] for i in others), *residuals]

        def fn(of_wanted, own, residuals):
            if self._is_linear:
                of_others = [_zeros(self._jaxpr.jaxpr.invars[i]) for i in others]
            else:
                of_others = residuals[: len(others)]
                residuals = residuals[len(others) :]
            pairs = zip([*wanted, *others], [*of_wanted, *of_others], strict=True)
            shared = [x for _, x in sorted(pairs, key=lambda pair: pair[0])]
            return self._fn(shared, own, residuals)

        new_sums, grads = pull_back(
            fn,
            axes,
            [leaves[i] for i in wanted],
            own,
            residuals,
            jtu.tree_leaves(cotangents),
            [all_sums[i] for i in wanted],
            is_linear=self._is_linear,
        )
        for i, x in zip(wanted, new_sums, strict=True):
            all_sums[i] = x
        return (
            jtu.tree_unflatten(treedef, all_sums),
            jtu.tree_unflatten(self._own_treedef, grads),
        )

    def _known(self, variables: Sequence[Any], arrays: Sequence[Any]) -> dict[Any, Any]:
        jaxpr = self._jaxpr
        values = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        values.update(zip(variables, arrays, strict=True))
        return values


def _zeros(variable: Any) -> Array:
    return jnp.zeros(variable.aval.shape, variable.aval.dtype)


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _linearize(
    jaxpr: jex.core.ClosedJaxpr,
    is_differentiated: Sequence[bool],
    num_shared: int,
    num_own: int,
) -> tuple[jex.core.ClosedJaxpr, Callable[..., list[Array]]] | None:
    """The jaxpr with residuals as further outputs, and the derivative of its first
    outputs, if they have one, as a function of the tangents of its first inputs and the
    residuals. `None` if this derivative can only be transposed.
    """
    linear: Any = None

    def linearized(*args):
        nonlocal linear
        diff, rest = args[: num_shared + num_own], args[num_shared + num_own :]

        def of_diff(*diff):
            out = evaluate(jaxpr, *diff, *rest)
            pairs = zip(out, is_differentiated, strict=False)
            return [jnp.asarray(x) for x, b in pairs if b], out

        _, tangents_out, out = jax.linearize(of_diff, *diff, has_aux=True)
        closed = without_addends(without_jits(tangents_out, *diff))
        inner = closed.jaxpr
        # Without its constants, which are of this trace.
        linear = (inner.constvars, inner.invars, inner.eqns, inner.outvars)
        is_evaluable = _to_be_transposed_only.isdisjoint(primitives(inner))
        linear = linear if is_evaluable else None
        return [*out, *closed.consts]

    with_residuals = jax.make_jaxpr(linearized)(*jaxpr.in_avals)
    if linear is None:
        return None
    constvars, invars, equations, outvars = linear

    def tangents_out(shared, own, residuals):
        values = dict(zip(constvars, residuals, strict=True))
        values.update(zip(invars, [*shared, *own], strict=True))
        evaluate_equations(equations, values)
        return list(map(jnp.asarray, read(outvars, values)))

    return with_residuals, tangents_out


def _evaluated_again(
    jaxpr: jex.core.ClosedJaxpr,
    is_differentiated: Sequence[bool],
    num_shared: int,
    num_own: int,
) -> tuple[jex.core.ClosedJaxpr, Callable[..., list[Array]]]:
    """The same for what is evaluated again: its residuals are all inputs that are not
    shared, and the function is what it is itself. It is given its own inputs apart.
    """

    def with_inputs(*args):
        return [*evaluate(jaxpr, *args), *args[num_shared:]]

    def outputs(shared, own, residuals):
        out = evaluate(jaxpr, *shared, *own, *residuals[num_own:])
        pairs = zip(out, is_differentiated, strict=False)
        return [jnp.asarray(x) for x, b in pairs if b]

    return jax.make_jaxpr(with_inputs)(*jaxpr.in_avals), outputs


def _may_find_others(jaxpr: jex.core.Jaxpr) -> bool:
    """Whether it is known only when it runs which roots a function finds."""
    branches = {"cond", "scan", "while"}
    return any(x.primitive.name in branches and has_loop(x) for x in jaxpr.eqns)


def _inputs_and_roots(
    jaxpr: jex.core.Jaxpr,
    residuals: Sequence[Any],
    varying: set[Any],
    given: Sequence[Any],
) -> list[Any]:
    """What varies that `residuals` can be found from, with no loop of which something
    varies.
    """
    found = [x for e in jaxpr.eqns if has_loop(e) for x in e.outvars]
    sources = [x for x in [*jaxpr.invars, *found] if x in varying]
    equations = needed(jaxpr.eqns, residuals, {*sources, *given})
    used = {*variables_of(residuals)}.union(
        *(variables_of(e.invars) for e in equations)
    )
    return [x for x in sources if x in used and x not in given]


def _to_keep(
    jaxpr: jex.core.Jaxpr,
    residuals: Sequence[Any],
    varying: set[Any],
    given: Sequence[Any],
) -> list[Any]:
    """What varies that `residuals` can be found from at no cost, with what is given."""
    equations = jaxpr.eqns
    made_by = {x: equation for equation in equations for x in equation.outvars}
    name_of = lambda x: made_by[x].primitive.name if x in made_by else None
    inputs_of = lambda x: [y for y in variables_of(made_by[x].invars) if y in varying]

    def sources(x, depth=0):
        """What `x` is made of at no cost."""
        if x in given:
            return set()
        is_view, is_cheap = name_of(x) in _views, name_of(x) in _cheap
        if not is_view and (not is_cheap or depth == _max_depth):
            return {x}
        found = [sources(y, depth + is_cheap) for y in inputs_of(x)]
        return set().union(*found)

    size = lambda xs: sum(num_bytes(_struct(x.aval)) for x in xs)
    kept = set()
    for x in variables_of(residuals):
        if x in varying:
            is_smaller = (
                x in given or name_of(x) in _views or size(sources(x)) < size([x])
            )
            kept.update(sources(x) if is_smaller else {x})

    def can_be_found(x, depth=0):
        if x in kept or x in given:
            return True
        is_cheap = name_of(x) in _cheap | _views and depth < _max_depth
        return is_cheap and all(can_be_found(y, depth + 1) for y in inputs_of(x))

    # What was computed last first.
    for equation in reversed(equations):
        for x in kept.intersection(equation.outvars):
            kept.remove(x)
            if name_of(x) not in _cheap or not can_be_found(x):
                kept.add(x)
    order = {x: i for i, x in enumerate([*jaxpr.invars, *made_by])}
    return sorted(kept, key=order.__getitem__)
