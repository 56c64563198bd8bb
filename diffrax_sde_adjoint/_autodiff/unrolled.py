"""Functions with short loops written out, so that it is known which of their branches
are taken.

So are the stages of diffrax's implicit Runge-Kutta methods: they are one loop, in which
it depends on the number of the stage whether there is a root to be found.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.extend as jex
import jax.numpy as jnp
import numpy as np

from .._compat import bind, in_context_of
from .jaxprs import has_loop, jit_names, read


# Of a loop that is written out, at most.
_max_length = 16


def unrolled(closed_jaxpr: jex.core.ClosedJaxpr) -> jex.core.ClosedJaxpr:
    """A function with what does not depend on its arguments evaluated, and its short
    loops of a known length written out, if there are others inside.
    """
    fn = lambda *args: _evaluate(closed_jaxpr, args)
    return jax.make_jaxpr(fn)(*closed_jaxpr.in_avals)


def _evaluate(closed_jaxpr: jex.core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    jaxpr = closed_jaxpr.jaxpr
    values = dict(zip(jaxpr.constvars, closed_jaxpr.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        inputs = read(equation.invars, values)
        with in_context_of(equation):
            inputs = list(map(_typed, inputs, equation.invars))
            out = _evaluate_equation(equation, inputs)
        values.update(zip(equation.outvars, out, strict=True))
    return read(jaxpr.outvars, values)


def _evaluate_equation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in jit_names:
        return _evaluate(params["jaxpr"], inputs)
    if name == "cond" and _is_known(inputs[0]):
        return _evaluate(params["branches"][int(inputs[0])], inputs[1:])
    if has_loop(equation):
        if name == "scan" and 0 < params["length"] <= _max_length:
            return _evaluate_scan(equation, inputs)
        return bind(equation, inputs)
    if equation.effects:
        return bind(equation, inputs)
    with _at_once(inputs):
        return bind(equation, inputs)


def _evaluate_scan(equation: Any, inputs: list[Any]) -> list[Any]:
    body = equation.params["jaxpr"]
    length, reverse = equation.params["length"], equation.params["reverse"]
    # What the loop goes along has an axis more than in its body. The parameters which
    # say so are not the same in all versions of JAX.
    is_along = lambda variable, aval: variable.aval.shape != aval.shape
    num_xs = sum(map(is_along, equation.invars, body.in_avals))
    num_ys = sum(map(is_along, equation.outvars, body.out_avals))
    num_carry = len(body.out_avals) - num_ys
    num_consts = len(inputs) - num_xs - num_carry
    consts, carry = inputs[:num_consts], inputs[num_consts:][:num_carry]
    all_xs = [_entries(x, length) for x in inputs[num_consts + num_carry :]]
    all_ys = []
    for i in reversed(range(length)) if reverse else range(length):
        out = _evaluate(body, [*consts, *carry, *(x[i] for x in all_xs)])
        carry = out[:num_carry]
        all_ys.append(out[num_carry:])
    if reverse:
        all_ys = all_ys[::-1]
    return [*carry, *map(_stack, zip(*all_ys, strict=True))]


def _entries(x: Any, length: int) -> list[Any]:
    with _at_once([x]):
        return [x[i] for i in range(length)]


def _stack(xs: Sequence[Any]) -> Any:
    with _at_once(xs):
        return jnp.stack(xs)


def _at_once(inputs: Sequence[Any]) -> contextlib.AbstractContextManager:
    """Evaluates what is computed from inputs that are all known."""
    is_known = all(map(_is_known, inputs))
    return jax.ensure_compile_time_eval() if is_known else contextlib.nullcontext()


def _is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _typed(x: Any, variable: Any) -> Any:
    """A number as an array of the very type that it has in the jaxpr."""
    if isinstance(x, jax.core.Tracer | jax.Array):
        return x
    aval = variable.aval
    with jax.ensure_compile_time_eval():
        if aval.weak_type and aval.shape == ():
            weak = jnp.asarray(np.asarray(x).item())
            if weak.dtype == aval.dtype:
                return weak
        return jnp.asarray(x, aval.dtype)
