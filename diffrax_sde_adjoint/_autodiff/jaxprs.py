"""Jaxprs, evaluated and looked at."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
import numpy as np
from jaxtyping import ArrayLike

from .._compat import bind, in_context_of


# What `jax.jit` is as a primitive; before JAX 0.7 it was the other one.
jit_names = ("jit", "pjit")


class _Found:
    """The outputs of equations, by their inputs. So a function that is evaluated twice
    at the same point, as a diffusion often is, has its residuals once.
    """

    def __init__(self):
        self._outputs: dict[Any, Any] = {}

    def once(
        self, compute: Callable[[], list[Any]], equation: Any, inputs: Sequence[Any]
    ) -> list[Any]:
        params = sorted(equation.params.items(), key=lambda x: x[0])
        key = (equation.primitive, *params, *map(_identity, inputs))
        try:
            is_found = key in self._outputs
        except TypeError:
            # A parameter that cannot be compared.
            return compute()
        if not is_found or equation.effects:
            # With the inputs, so that no other array takes their place.
            self._outputs[key] = (compute(), inputs)
        return self._outputs[key][0]


def _identity(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return id(x)
    value = np.asarray(x)
    return type(x), value.dtype, value.shape, value.tobytes()


def evaluate(
    closed_jaxpr: jex.core.ClosedJaxpr, *args: ArrayLike, found: _Found | None = None
) -> list[ArrayLike]:
    """A jaxpr as a function, with every `jax.jit` in it taken away."""
    jaxpr = closed_jaxpr.jaxpr
    values = dict(zip(jaxpr.constvars, closed_jaxpr.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    evaluate_equations(jaxpr.eqns, values, found)
    return read(jaxpr.outvars, values)


def evaluate_equations(
    equations: Iterable[Any], values: dict[Any, Any], found: _Found | None = None
) -> None:
    """Adds to `values` what equations find from it."""
    for equation in equations:
        inputs = read(equation.invars, values)

        def compute(equation=equation, inputs=inputs):
            if equation.primitive.name in jit_names:
                return evaluate(equation.params["jaxpr"], *inputs, found=found)
            return bind(equation, inputs)

        with in_context_of(equation):
            once = found.once if found is not None else lambda compute, *_: compute()
            out = once(compute, equation, inputs)
        values.update(zip(equation.outvars, out, strict=True))


def read(variables: Iterable[Any], values: dict[Any, Any]) -> list[Any]:
    is_literal = lambda x: isinstance(x, jex.core.Literal)
    return [x.val if is_literal(x) else values[x] for x in variables]


def without_jits(fn: Callable, *args: Any) -> jex.core.ClosedJaxpr:
    """The jaxpr of a function of arrays, in which there is no `jax.jit`, and nothing is
    computed twice.
    """
    jaxpr = jax.make_jaxpr(fn)(*args)
    found = _Found()
    return jax.make_jaxpr(lambda *x: evaluate(jaxpr, *x, found=found))(*jaxpr.in_avals)


def without_addends(closed_jaxpr: jex.core.ClosedJaxpr) -> jex.core.ClosedJaxpr:
    """A linear function, without the addends that do not depend on its arguments, which
    are zero. They come from rules that know of no symbolic zeros.
    """
    jaxpr = closed_jaxpr.jaxpr
    linear = dependent(jaxpr.eqns, jaxpr.invars)
    same = {}
    for equation in jaxpr.eqns:
        terms = [x for x in variables_of(equation.invars) if x in linear]
        if equation.primitive.name in ("add", "add_any") and len(terms) == 1:
            (out,) = equation.outvars
            if (terms[0].aval.shape, terms[0].aval.dtype) == (
                out.aval.shape,
                out.aval.dtype,
            ):
                same[out] = terms[0]

    def fn(*args):
        values = dict(zip(jaxpr.constvars, closed_jaxpr.consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        for equation in jaxpr.eqns:
            out = equation.outvars[0] if equation.outvars else None
            if out in same:
                values[out] = values[same[out]]
            else:
                evaluate_equations([equation], values)
        return read(jaxpr.outvars, values)

    return jax.make_jaxpr(fn)(*closed_jaxpr.in_avals)


def dependent(equations: Iterable[Any], variables: Iterable[Any]) -> set[Any]:
    """`variables`, and all that is computed from them."""
    out = set(variables)
    for equation in equations:
        if not out.isdisjoint(variables_of(equation.invars)):
            out.update(equation.outvars)
    return out


def needed(
    equations: Sequence[Any], variables: Iterable[Any], known: Container[Any]
) -> list[Any]:
    """The equations that `variables` are computed by, from those that are known."""
    wanted, out = {x for x in variables_of(variables) if x not in known}, []
    for equation in reversed(equations):
        if not wanted.isdisjoint(equation.outvars):
            wanted.update(x for x in variables_of(equation.invars) if x not in known)
            out.append(equation)
    return out[::-1]


def variables_of(inputs: Iterable[Any]) -> list[Any]:
    """Those that are not numbers."""
    return [x for x in inputs if isinstance(x, jex.core.Var)]


def has_loop(equation: Any) -> bool:
    """Whether an equation is a loop that ends when a condition is met, or has one
    inside.
    """
    is_loop = equation.primitive.name == "while"
    return is_loop or any("while" in primitives(x) for x in inner_jaxprs(equation))


def primitives(jaxpr: jex.core.Jaxpr) -> Iterator[str]:
    """The names of all that are used, at any depth."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in inner_jaxprs(equation):
            yield from primitives(inner)


def inner_jaxprs(equation: Any) -> Iterator[jex.core.Jaxpr]:
    """Those of the functions that are its parameters."""
    return _jaxprs_in(equation.params.values())


def _jaxprs_in(params: Iterable[Any]) -> Iterator[jex.core.Jaxpr]:
    for x in params:
        if isinstance(x, jex.core.ClosedJaxpr):
            yield x.jaxpr
        elif isinstance(x, jex.core.Jaxpr):
            yield x
        elif isinstance(x, list | tuple):
            yield from _jaxprs_in(x)
