r"""The backward SDE: an SDE together with its adjoint, going from right to left.

Let the columns of the vector field be $f$ (the drift) and $g_j$, the cotangent of the
solution $a$, and the parameters $\theta$. Backwards in time, along the reversed path,

$\mathrm{d}y = f\,\mathrm{d}t + \sum_j g_j \circ \mathrm{d}W^j, \quad
\mathrm{d}a = -a^\top \frac{\partial f}{\partial y}\,\mathrm{d}t
- \sum_j a^\top \frac{\partial g_j}{\partial y} \circ \mathrm{d}W^j, \quad
\mathrm{d}a_\theta = -a^\top \frac{\partial f}{\partial \theta}\,\mathrm{d}t
- \sum_j a^\top \frac{\partial g_j}{\partial \theta} \circ \mathrm{d}W^j$.

The last line is an integral along the first two. Its stages, which depend on the
solver, would each be as large as the parameters. Instead there is one number $q$ with

$\mathrm{d}q = -a^\top f(\theta')\,\mathrm{d}t - \sum_j a^\top g_j(\theta') \circ
\mathrm{d}W^j$,

where $\theta'$ is another name for the parameters. A step of any solver is made with
$(y, a, q)$, and what it adds to $a_\theta$ is the derivative of its $q$ with respect to
$\theta'$: one VJP for each evaluation of the vector field.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._forward.records import Parameters
from .._misc import zeros_like
from .._solver import AbstractForwardingSolver, has_layer
from .._solver.stage_loops import is_for_additive_noise
from .._term.base import is_single_term
from .._term.reversed import reversed_control
from .._transform.ito import corrected


# The solution and its cotangent; inside of a step of the quadrature, also `q`.
_AdjointY: TypeAlias = tuple[Y, Y] | tuple[Y, Y, Float[Array, ""]]
# What moves the solution: time, Brownian motion, or another control.
Role: TypeAlias = Literal["drift", "noise", "control"]


class ForwardTerms(eqx.Module):
    """The SDE of the forward solve, whose methods are functions of those parameters
    that are differentiated. The others are in `nondiff`.
    """

    nondiff: Parameters
    roles: tuple[Role, ...] = eqx.field(static=True)
    is_ito: bool = eqx.field(static=True)

    def terms(self, diff: Parameters) -> tuple[list[diffrax.AbstractTerm], Args]:
        parameters = eqx.combine(diff, self.nondiff)
        leaves = jtu.tree_leaves(parameters.terms, is_leaf=is_single_term)
        return leaves, parameters.args

    def rate(self, i: int, diff: Parameters, t: RealScalarLike, y: Y) -> Y:
        """The rate of change of the Stratonovich solution, due to a drift."""
        terms, args = self.terms(diff)
        # Which is minus one if the solve goes backwards in time.
        unit = terms[i].contr(jnp.zeros_like(t), jnp.ones_like(t))
        out = terms[i].vf_prod(t, y, args, unit)
        if self.is_ito and i == self.roles.index("drift"):
            parts = zip(terms, self.roles, strict=True)
            noises = [term for term, role in parts if role == "noise"]
            out = corrected(out, "stratonovich", noises, t, y, args)
        return out

    def increment(
        self, i: int, diff: Parameters, t: RealScalarLike, y: Y, control: PyTree
    ) -> Y:
        terms, args = self.terms(diff)
        return terms[i].vf_prod(t, y, args, control)


class _Matrix(eqx.Module):
    """A matrix from the control to the solution and its cotangent: for each leaf of the
    latter, the PyTree of the former. Unlike those of a `lineax.PyTreeLinearOperator`,
    leaves may have different dtypes.
    """

    leaves: list[PyTree[Array]]
    treedef: Any = eqx.field(static=True)

    def mv(self, control: PyTree[Array]) -> PyTree[Array]:
        def of_leaf(row):
            products = jtu.tree_map(
                lambda m, x: jnp.tensordot(m, x, axes=jnp.ndim(x)), row, control
            )
            return sum(jtu.tree_leaves(products)[1:], jtu.tree_leaves(products)[0])

        return jtu.tree_unflatten(self.treedef, [of_leaf(x) for x in self.leaves])


class AdjointTerm(diffrax.AbstractTerm):
    """Term number `index` of the `forward` SDE, for the solution and its cotangent,
    backwards: its time is minus that of the forward SDE.

    `diff_of_q` is $\\theta'$ above, if there is `q`. With `is_ito`, the Itô solution is
    that of the backward SDE.
    """

    forward: ForwardTerms
    diff: Parameters
    index: int = eqx.field(static=True)
    is_ito: bool = eqx.field(static=True)
    diff_of_q: Parameters | None = None

    @property
    def role(self) -> Role:
        return self.forward.roles[self.index]

    def _with_cotangent(
        self, fn: Callable[[Any, Y], Y], y: _AdjointY, sign: int
    ) -> _AdjointY:
        """What `fn` of the parameters and the solution adds to the latter, and its
        derivative to the cotangent.
        """
        y, a, *q = y
        out, pull_back = jax.vjp(lambda y: fn(self.diff, y), y)
        (grad,) = pull_back(a)
        scale = lambda sign, x: x if sign == 1 else jtu.tree_map(jnp.negative, x)
        both = (scale(sign, out), scale(-sign, grad))
        if len(q) == 0:
            return both
        products = jtu.tree_map(lambda a, b: jnp.sum(a * b), a, fn(self.diff_of_q, y))
        total = sum(jtu.tree_leaves(products), start=jnp.zeros_like(q[0]))
        return *both, scale(-sign, total)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> PyTree:
        if self.role == "drift":
            return t1 - t0
        terms, _ = self.forward.terms(self.diff)
        return reversed_control(terms[self.index].contr(-t1, -t0, **kwargs))

    def vf_prod(
        self, t: RealScalarLike, y: _AdjointY, args: Args, control: PyTree
    ) -> _AdjointY:
        if self.role == "drift":
            return self.prod(self.vf(t, y, args), control)
        fn = lambda diff, y: self.forward.increment(self.index, diff, -t, y, control)
        return self._with_cotangent(fn, y, 1)

    def vf(self, t: RealScalarLike, y: _AdjointY, args: Args) -> Any:
        if self.role == "drift":
            fn = lambda diff, y: self.forward.rate(self.index, diff, -t, y)
            out = self._with_cotangent(fn, y, -1)
            roles = self.forward.roles
            if self.is_ito and self.index == roles.index("drift"):
                noises = [
                    dataclasses.replace(self, index=i)
                    for i, role in enumerate(roles)
                    if role == "noise"
                ]
                out = corrected(out, "ito", noises, t, y, args)
            return out
        zero = zeros_like(eqx.filter_eval_shape(self.contr, t, t))
        matrix = jax.jacfwd(lambda x: self.vf_prod(t, y, args, x))(zero)
        treedef = jtu.tree_structure(y)
        return _Matrix(treedef.flatten_up_to(matrix), treedef)

    def prod(self, vf: Any, control: PyTree) -> _AdjointY:
        if self.role == "drift":
            return jtu.tree_map(lambda x: x * jnp.asarray(control, x.dtype), vf)
        return vf.mv(control)

    def is_vf_expensive(
        self, t0: RealScalarLike, t1: RealScalarLike, y: Y, args: Args
    ) -> bool:
        # It takes a VJP for each number of the control, and `vf_prod` one.
        return True


def _is_adjoint_term(x: Any) -> bool:
    return isinstance(x, AdjointTerm)


def _get_diff(terms: PyTree[diffrax.AbstractTerm]) -> Parameters:
    """What is differentiated, which is the same in all terms."""
    leaves = jtu.tree_leaves(terms, is_leaf=_is_adjoint_term)
    return next(filter(_is_adjoint_term, leaves)).diff


class _Quadrature(AbstractForwardingSolver):
    """A solver of adjoint terms, which also integrates the cotangents of the
    parameters: they are its state. So they are not among what a step size controller
    looks at.
    """

    solver: diffrax.AbstractSolver
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        del t0, t1, y0, args
        return zeros_like(_get_diff(terms))

    def step(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: tuple[Y, Y],
        args: Args,
        solver_state: PyTree[Array],
        made_jump: BoolScalarLike,
    ) -> tuple[tuple[Y, Y], Any, DenseInfo, PyTree[Array], diffrax.RESULTS]:
        del made_jump
        q0 = jnp.zeros((), jnp.result_type(*jtu.tree_leaves(y0)))

        def step(diff_of_q):
            with_other = jtu.tree_map(
                lambda x: (
                    dataclasses.replace(x, diff_of_q=diff_of_q)
                    if _is_adjoint_term(x)
                    else x
                ),
                terms,
                is_leaf=_is_adjoint_term,
            )
            # Its state may hold what has `q` in it, which must not be taken over from
            # one step to the next: a derivative would be lost. A solver for additive
            # noise has none, and its `init` would check the noise: that of `y` and `a`
            # is additive, but that of `q` depends on `a`.
            state = None
            if not is_for_additive_noise(self.solver):
                state = self.solver.init(with_other, t0, t1, (*y0, q0), args)
            (y1, a1, q1), error, _, _, result = self.solver.step(
                with_other, t0, t1, (*y0, q0), args, state, False
            )
            return q1, ((y1, a1), error, result)

        diff = _get_diff(terms)
        q1, pull_back, (y1, error, result) = eqx.filter_vjp(step, diff, has_aux=True)
        (more,) = pull_back(jnp.ones_like(q1))
        total = jtu.tree_map(jnp.add, solver_state, more)
        error = None if error is None else error[:2]
        return y1, error, dict(y0=y0, y1=y1), total, result


@functools.cache
def _quadrature_of(classes: tuple[type, ...]) -> type[_Quadrature]:
    return types.new_class("Quadrature", (_Quadrature, *classes))


def make_quadrature(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """`solver`, for adjoint terms: see `_Quadrature`. To diffrax it is of the same
    classes.
    """
    # diffrax looks through one wrapper only, and `solver` may be one already.
    classes = (
        diffrax.AbstractAdaptiveSolver,
        diffrax.AbstractImplicitSolver,
        diffrax.AbstractItoSolver,
        diffrax.AbstractStratonovichSolver,
    )
    return _quadrature_of(tuple(x for x in classes if has_layer(solver, x)))(solver)
