"""Everything that this package takes from diffrax, equinox and JAX that is private to
them, or not documented. Each name says what it is needed for; `tests/test_compat.py`
checks what is assumed about each.

Elsewhere there are only the fields of the classes that are named here, as they are, and
`term_compatible_contr_kwargs` of a solver: what it passes to the `contr` of each of its
terms, besides times, by which `diffeqsolve` asks for Lévy areas.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.extend as jex
import jax.numpy as jnp
import numpy as np

# The annotations of diffrax's interfaces, for methods that implement one.
from diffrax._custom_types import (
    Args as Args,
    BoolScalarLike as BoolScalarLike,
    DenseInfo as DenseInfo,
    IntScalarLike as IntScalarLike,
    RealScalarLike as RealScalarLike,
    Y as Y,
)

# Whether the terms hold a Brownian path, by which diffrax too decides that a solver has
# to be one for SDEs; and whether this is an `UnsafeBrownianPath`, whose noise is not
# the same again at times that differ by rounding.
from diffrax._heuristics import is_sde as is_sde, is_unsafe_sde as is_unsafe_sde

# The state of diffrax's integration loop, and of what it saves: where the cotangents of
# a solve arrive, and how many steps were made and saved. And the function in which
# `diffeqsolve` checks the control of each term, see `control_of_solver`.
from diffrax._integrate import (
    SaveState as SaveState,
    State as State,
    _assert_term_compatible,
)

# The default of `SaveAt(fn=...)`, to recognise that no function was given.
from diffrax._saveat import save_y as save_y

# What `diffeqsolve` puts around every term, to look for the term inside.
from diffrax._term import WrapTerm as WrapTerm

# What equinox raises in a callback of JAX, to recognise it in JAX's log of these.
from equinox._errors import _EquinoxRuntimeError as _EquinoxRuntimeError

# `nondifferentiable` and `nondifferentiable_backward` turn a derivative that would be
# wrong into an error that names its cause; `prevbefore` is the step between
# floating-point numbers that diffrax's controllers leave at a jump; `unvmap_any` is
# whether something is true for any element of a batch, as a scalar that is not batched;
# `while_loop` is what diffrax's integration takes as an argument, and the only loop
# that writes buffers in place.
from equinox.internal import (
    nondifferentiable as nondifferentiable,
    nondifferentiable_backward as nondifferentiable_backward,
    prevbefore as prevbefore,
    unvmap_any as unvmap_any,
    while_loop as while_loop,
)

# The tables in which JAX looks up the rules of a primitive, see `make_primitive`.
from jax.interpreters import ad, batching, mlir
from jaxtyping import ArrayLike


_Solver = TypeVar("_Solver", bound=diffrax.AbstractSolver)

# Where JAX tells of an error in a callback, to keep some of it out.
callback_log = logging.getLogger("jax._src.callback")

# A vector field at a point. diffrax's own type is a PyTree of arrays, but an operator
# may hold functions, as a `lineax.JacobianLinearOperator` does.
VF: TypeAlias = Any


def integration_loop(
    adjoint: diffrax.AbstractAdjoint, **kwargs: Any
) -> tuple[State, Any]:
    """diffrax's loop over the steps of a solve, with the loops that it is given."""
    return adjoint._loop(**kwargs)


def direction_of(term: WrapTerm) -> IntScalarLike:
    """1 if the solve is forward in time as its user sees it, and -1 if backward."""
    # An adjoint does not get it: its own times increase.
    return term.direction


def with_scan_kind(solver: _Solver, kinds: Mapping[str | None, str]) -> _Solver:
    """A Runge-Kutta method, with the loop over its stages of the kind that `kinds` has
    for the one that it is of, as diffrax's own adjoints set it.
    """
    kind = kinds.get(solver.scan_kind, solver.scan_kind)  # pyright: ignore[reportAttributeAccessIssue]
    return eqx.tree_at(lambda s: s.scan_kind, solver, kind, is_leaf=lambda x: x is None)


def make_primitive(
    name: str,
    *,
    multiple_results: bool = True,
    impl: Callable,
    abstract_eval: Callable,
    batch: Callable,
    jvp: Callable | None = None,
    transpose: Callable | None = None,
) -> jex.core.Primitive:
    """A primitive with its rules. One that has no `jvp` is linear, and has a
    `transpose`.
    """
    # `jax.extend` makes primitives, but has no way to give them rules.
    primitive = jex.core.Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(impl)
    primitive.def_abstract_eval(abstract_eval)
    lowering = mlir.lower_fun(impl, multiple_results=multiple_results)
    mlir.register_lowering(primitive, lowering)
    batching.primitive_batchers[primitive] = batch
    if jvp is None:
        ad.deflinear2(primitive, transpose)
    else:
        ad.primitive_jvps[primitive] = jvp
    return primitive


def bind(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """What an equation of a jaxpr computes from its inputs."""
    # As `jax.core.eval_jaxpr` does, which is not documented either. Before JAX 0.10,
    # functions among the parameters were arguments.
    primitive = equation.primitive
    params = primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = primitive.bind(*functions, *inputs, **params)
    return list(out) if primitive.multiple_results else [out]


def in_context_of(equation: Any) -> contextlib.AbstractContextManager:
    """The settings of JAX with which an equation of a jaxpr was made."""
    return equation.ctx.manager


def symbolic_zero(x: ArrayLike) -> ad.Zero:
    """The tangent of `x`, as the rule of a primitive says that it is zero."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def is_symbolic_zero(tangent: Any) -> bool:
    """Whether the rule of a primitive is told that a tangent is zero."""
    return type(tangent) is ad.Zero


def control_of_solver() -> Any:
    """The type of control that a solver expects, if `diffeqsolve` is asking for a
    control to compare with it; else `None`.

    diffrax asks without saying for whom, and its own error prints all terms. So this
    looks at the local variables of diffrax's check, which is further up the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_qualname
        if name == f"{_assert_term_compatible.__name__}.<locals>._check":
            return frame.f_locals.get("control_type_expected")
        frame = frame.f_back
    return None


# The names of the primitives by which `diffeqsolve` computes its times.
_arithmetic = frozenset(
    "add sub mul neg min max lt select_n convert_element_type broadcast_in_dim copy "
    "jit pjit".split()
)


def known_value(x: Any) -> np.ndarray | None:
    """The value of an array which a function that is being traced has computed from
    constants alone; `None` if it is not, or not known how.

    `diffeqsolve` makes traced arrays of the numbers that it is given, so that an
    adjoint does not see these. JAX keeps what a traced array was computed from, as its
    `parent`, but JAX 0.6 does not. Only what `diffeqsolve` does with times is followed.
    """
    if not isinstance(x, jax.core.Tracer):
        return np.asarray(x)
    variable = getattr(x, "val", None)
    if isinstance(variable, jex.core.Literal):
        return np.asarray(variable.val)
    parent = getattr(x, "parent", None)
    if parent is None or parent.primitive.name not in _arithmetic:
        return None
    inputs = [known_value(y) for y in parent.in_tracers]
    if any(y is None for y in inputs):
        return None
    with jax.ensure_compile_time_eval():
        out = parent.primitive.bind(*inputs, **parent.params)
    if parent.primitive.multiple_results:
        (i,) = [i for i, y in enumerate(parent.outvars) if y is variable]
        out = out[i]
    return np.asarray(out)


def num_constant_steps(
    controller: diffrax.ConstantStepSize,
    t0: np.ndarray,
    t1: np.ndarray,
    dt0: np.ndarray,
) -> int:
    """How many steps a controller makes: it starts with this number."""
    with jax.ensure_compile_time_eval():
        start, end, dt = (jnp.asarray(x) for x in (t0, t1, dt0))
        unused: Any = None
        _, state = controller.init(unused, start, end, unused, dt, None, unused, None)
    _, num_steps, *_ = state
    return int(num_steps)
