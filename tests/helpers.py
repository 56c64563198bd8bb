"""Tolerances and small systems that several test files share."""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from jaxtyping import Array, Float, PyTree

from diffrax_sde_adjoint._autodiff.linearized import Inputs, Linearized


def relative_error(x: PyTree, y: PyTree) -> float:
    """The largest difference of two PyTrees, relative to the largest entry of each
    leaf.
    """
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    errors = [0.0]
    for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.size > 0:
            scale = np.max(np.abs(b))
            errors.append(float(np.max(np.abs(a - b)) / (scale if scale > 0 else 1)))
    assert np.all(np.isfinite(errors))
    return max(errors)


def value_and_grad_in_forward_mode(
    fn: Callable[[PyTree], tuple[Array, PyTree]], x: PyTree
) -> tuple[tuple[Array, PyTree], PyTree]:
    """As `equinox.filter_value_and_grad(fn, has_aux=True)(x)`, by a derivative in
    forward mode for each entry of the arrays in `x`.

    The reference for gradients. Of a solve by `diffrax.ForwardMode()`, it takes a third
    of the time to compile that an adjoint of diffrax takes in reverse mode.
    """
    diff, static = eqx.partition(x, eqx.is_inexact_array)
    is_complex = jnp.iscomplexobj
    as_real = lambda x: jnp.stack([x.real, x.imag]) if is_complex(x) else x
    flat, unravel = jfu.ravel_pytree(jtu.tree_map(as_real, diff))

    def in_place(flat):
        like = lambda x, y: lax.complex(*y) if is_complex(x) else y
        return jtu.tree_map(like, diff, unravel(flat))

    def value(flat):
        value, aux = fn(eqx.combine(in_place(flat), static))
        return value, (value, aux)

    grads, out = eqx.filter_jit(jax.jacfwd(value, has_aux=True))(flat)
    return out, jtu.tree_map(jnp.conj, in_place(grads.astype(flat.dtype)))


def reference_value_and_grad(
    fn: Callable[[PyTree, diffrax.AbstractAdjoint], tuple[Array, PyTree]],
    x: PyTree,
    solver: diffrax.AbstractSolver,
) -> tuple[tuple[Array, PyTree], PyTree]:
    """Of `fn(x, adjoint)`, by an adjoint of diffrax that differentiates the steps of
    the solver: `ForwardMode`, or `DirectAdjoint` for `HalfSolver`, which that does not
    take. (Not `RecursiveCheckpointAdjoint`: in a batch, equinox 0.13.8 doubles its
    gradients where an output does not depend on the element.)
    """
    if isinstance(solver, diffrax.HalfSolver):
        gradient = eqx.filter_jit(eqx.filter_value_and_grad(fn, has_aux=True))
        return gradient(x, diffrax.DirectAdjoint())
    return value_and_grad_in_forward_mode(lambda x: fn(x, diffrax.ForwardMode()), x)


def grad_in_forward_mode(fn: Callable[[PyTree], Array], x: PyTree) -> PyTree:
    """As `equinox.filter_grad(fn)(x)`, see `value_and_grad_in_forward_mode`."""
    _, grads = value_and_grad_in_forward_mode(lambda x: (fn(x), None), x)
    return grads


class SmoothPath(diffrax.AbstractBrownianPath):
    """Sums of three waves, whose phases are drawn with a key: takes the place of a
    Brownian path where only the solver and the gradient matter, as it is compiled in a
    fraction of the time.
    """

    phases: PyTree[Float[Array, "3 *shape"]]
    t0: float = -math.inf
    t1: float = math.inf
    levy_area: ClassVar = diffrax.BrownianIncrement

    def __init__(self, shape: PyTree[jax.ShapeDtypeStruct], key: Array):
        leaves, treedef = jtu.tree_flatten(shape)
        phases = [
            2 * math.pi * jr.uniform(key, (3, *x.shape), x.dtype)
            for key, x in zip(jr.split(key, len(leaves)), leaves, strict=True)
        ]
        self.phases = jtu.tree_unflatten(treedef, phases)

    def evaluate(self, t0, t1=None, left=True, use_levy=False) -> Any:
        if t1 is None:
            t0, t1 = 0.0, t0

        def increment(phases):
            wave = lambda t: jnp.stack(
                [
                    0.3 * jnp.sin(jnp.asarray(n * t, phases.dtype) + phase)
                    for n, phase in zip((4, 11, 23), phases, strict=True)
                ]
            )
            return jnp.sum(wave(t1) - wave(t0), axis=0)

        w = jtu.tree_map(increment, self.phases)
        if not use_levy:
            return w
        dt = jtu.tree_map(lambda x: jnp.asarray(t1 - t0, x.dtype), w)
        return diffrax.BrownianIncrement(dt, w)


class Drift(eqx.Module):
    """A drift that is not linear in anything, with parameters in itself and `args`."""

    weight: Float[Array, "dim dim"]

    def __call__(self, t, y, args):
        return jnp.sin(self.weight @ y + t) - args["rate"] * y


class Diffusion(eqx.Module):
    """The diffusion of one of the noise types, as an array or a lineax operator."""

    noise: str = eqx.field(static=True)
    scale: Float[Array, " dim"]

    def __call__(self, t, y, args):
        diagonal = args["level"] * jnp.cos(self.scale * y + t)
        match self.noise:
            case "general":
                # Three noises: neither square nor commutative.
                other = jnp.sin(y * self.scale[::-1])
                return jnp.stack([diagonal, other, 0.3 * y], axis=-1)
            case "general operator":
                matrix = jnp.stack([diagonal, jnp.sin(y), 0.3 * y], axis=-1)
                return lx.MatrixLinearOperator(matrix)
            case "diagonal":
                return lx.DiagonalLinearOperator(diagonal)
            case "additive":
                matrix = jnp.outer(self.scale, jnp.array([1, 0.5, -1], y.dtype))
                return args["level"] * (1 + t) * matrix
            case "scalar":
                return diagonal
            case _:
                raise AssertionError


noise_shapes = {
    "general": (3,),
    "general operator": (3,),
    "diagonal": (2,),
    "additive": (3,),
    "scalar": (),
}


def make_system(
    noise: str, dtype: type = jnp.float64
) -> tuple[Drift, Diffusion, Float[Array, "2"], dict[str, Array]]:
    """A two-dimensional SDE: drift, diffusion, `y0` and `args`."""
    weight = jnp.array([[0.5, -0.8], [0.9, 0.3]], dtype)
    scale = jnp.array([0.7, -0.4], dtype)
    y0 = jnp.array([0.6, -0.3], dtype)
    args = dict(rate=jnp.array(0.3, dtype), level=jnp.array(0.5, dtype))
    return Drift(weight), Diffusion(noise, scale), y0, args


def make_terms(
    drift: Callable, diffusion: Callable, path: diffrax.AbstractPath
) -> diffrax.MultiTerm:
    return diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)
    )


_Some = Collection[Any] | Callable[..., bool]


def by_default_unless(
    slow: _Some, cases: Iterable[Any], *, long: _Some = ()
) -> list[Any]:
    """The cases of a table for `pytest.mark.parametrize`: each is a tuple of arguments,
    or a single one. They run by default, but for those that are `slow`, or of which
    `slow` is true, which run with `-m slow`; and of these in turn those that are
    `long`, which run with `-m long`.
    """

    def param(case):
        values = case if isinstance(case, tuple) else (case,)
        is_any = lambda some: some(*values) if callable(some) else case in some
        marks = ()
        if is_any(slow):
            marks = pytest.mark.long if is_any(long) else pytest.mark.slow
        return pytest.param(*values, marks=marks)

    return [param(case) for case in cases]


def keys(num: int, seed: int = 0) -> Array:
    return jr.split(jr.key(seed), num)


def struct(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def summed_vjp(
    fn: Callable[[Any, Any, Any], Any],
    axes: tuple[Any, ...],
    shared: Any,
    own: Any,
    fixed: Any,
) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """`fn(shared, own, fixed)`, and what pulls back the cotangents of its inexact
    arrays, with those of `shared` summed over `axes`.
    """
    diff, constant = eqx.partition(shared, eqx.is_inexact_array)
    of_inputs = lambda x: fn(eqx.combine(x.shared, x.constant), x.own, x.given)
    inputs = Inputs(diff, constant, own, fixed)
    linearized = Linearized(of_inputs, inputs, has_aux=False)
    out, kept = linearized(inputs)

    def pull_back(cotangents):
        zeros = jtu.tree_map(jnp.zeros_like, diff)
        return linearized.pull_back(axes, inputs, kept, cotangents, zeros)

    return out, pull_back
