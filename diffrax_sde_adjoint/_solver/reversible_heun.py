"""The reversible Heun method (Kidger, Foster, Li, Lyons 2021, Algorithm 1).

Beside the solution `y`, the method carries a second approximation `yhat` of it and the
vector field `vf` there. With `dX` the control over `[t0, t1]`, a step is

    yhat1 = 2 y0 - yhat0 + vf0 dX
    vf1   = vf(t1, yhat1)
    y1    = y0 + (vf0 + vf1) / 2 dX

As `vf` depends on `yhat` alone, the same three lines can be read from the right end to
the left one (their Algorithm 2):

    yhat0 = 2 y1 - yhat1 - vf1 dX
    vf0   = vf(t0, yhat0)
    y0    = y1 - (vf0 + vf1) / 2 dX

Each direction costs one evaluation of the vector field.
"""

from typing import Any, ClassVar, TypeAlias

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import PyTree

from .._compat import VF, Args, BoolScalarLike, DenseInfo, RealScalarLike, Y, prevbefore
from .._term.products import check_products
from .base import AbstractReversibleSolver, check_sense


_SolverState: TypeAlias = tuple[Y, VF]


class _Function(eqx.Module):
    """In the solver state, what stands for an operator that is a function."""


def _is_function(vf: Any) -> bool:
    """Whether this is an operator which does not consist of arrays, such as a
    `lineax.FunctionLinearOperator`, or stands for one.
    """
    if isinstance(vf, lx.AbstractLinearOperator):
        return not all(map(eqx.is_array_like, jtu.tree_leaves(vf)))
    return isinstance(vf, _Function)


def carried(vf: VF) -> VF:
    """What of a vector field can be carried from one step to the next: all arrays. Also
    of what has a vector field in it, such as the state of `diffrax.ReversibleHeun`.
    """
    # Numbers of Python are carried as arrays, and so must have a derivative.
    as_array = lambda x: jnp.asarray(x) if isinstance(x, float | complex) else x
    carry = lambda x: _Function() if _is_function(x) else as_array(x)
    return jtu.tree_map(carry, vf, is_leaf=_is_function)


def _complete(
    vf: VF, terms: diffrax.AbstractTerm, t: RealScalarLike, yhat: Y, args: Args
) -> VF:
    """The vector field that was carried. Operators that are functions are made anew."""
    if not any(map(_is_function, jtu.tree_leaves(vf, is_leaf=_is_function))):
        return vf
    return jtu.tree_map(
        lambda x, again: again if _is_function(x) else x,
        vf,
        terms.vf(t, yhat, args),
        is_leaf=_is_function,
    )


def _leapfrog(y: Y, yhat: Y, increment: Y) -> Y:
    return jtu.tree_map(lambda a, b, c: 2 * a - b + c, y, yhat, increment)


def sums_leaf_by_leaf(vf: VF) -> bool:
    """Whether all operators are linear in the arrays they consist of."""
    is_operator = lambda x: isinstance(x, lx.AbstractLinearOperator | _Function)
    linear = (
        lx.DiagonalLinearOperator,
        lx.MatrixLinearOperator,
        lx.PyTreeLinearOperator,
        lx.TridiagonalLinearOperator,
    )
    leaves = jtu.tree_leaves(vf, is_leaf=is_operator)
    return all(isinstance(x, linear) for x in leaves if is_operator(x))


def _mean_prod(terms: diffrax.AbstractTerm, vf0: VF, vf1: VF, control: PyTree) -> Y:
    """The product of `(vf0 + vf1) / 2` with the control."""
    add = lambda a, b: b + a
    if sums_leaf_by_leaf(vf0):
        out = terms.prod(jtu.tree_map(add, vf0, vf1), control)
    else:
        out = jtu.tree_map(add, terms.prod(vf0, control), terms.prod(vf1, control))
    return jtu.tree_map(lambda x: 0.5 * x, out)


class ReversibleHeun(
    AbstractReversibleSolver[_SolverState],
    diffrax.AbstractAdaptiveSolver[_SolverState],
    diffrax.AbstractStratonovichSolver[_SolverState],
):
    r"""The reversible Heun method: second order for ODEs and algebraically reversible.

    One evaluation of the vector field a step, forwards and backwards; two if it is an
    operator that is a function, such as a `lineax.FunctionLinearOperator`. The solver
    state is the pair of $\hat y$ and the vector field at it. Has an embedded
    first-order method for adaptive step sizing, which takes one more evaluation where
    steps are adaptive. Uses linear interpolation for dense output.

    When used to solve SDEs it converges to the *Stratonovich* solution (convert an Itô
    SDE with [`diffrax_sde_adjoint.ito_to_stratonovich`][]), with strong order 0.5 in
    general and 1 for additive noise.

    This differs from [`diffrax.ReversibleHeun`][] in that:

    1. [`diffrax_sde_adjoint.StochasticAdjoint`][] can undo its steps.
    2. Vector fields may be any lineax operators, also those that are not linear in the
        arrays they consist of, such as products: for these, diffrax's adds the wrong
        thing. And they may be functions, which diffrax's cannot carry from one step to
        the next. (For an event or dense output, `diffeqsolve` looks at a step before an
        adjoint could replace diffrax's: pass this solver.)
    3. After a jump in the vector field it evaluates the vector field anew at $\hat y$,
        not at $y$: the latter could not be undone.
    4. A product of a vector field and a control that has not the structure of the
        solution is an error. diffrax's broadcasts it, so that a vector as the vector
        field of diagonal noise gives the wrong solution.
    5. The error estimate compares with Euler's method from $y$, and diffrax's with that
        from $\hat y$. The latter is of the size of $\hat y - y$, and where the dynamics
        contract it takes tens of times as many steps.

    But for 2 to 4 the solutions of the two on the same steps are equal to the bit.

    !!! warning

        The method is not stable for contracting dynamics. For $y' = -\lambda y$ it has
        a spurious solution that grows like $e^{\lambda T}$ over a horizon of length
        $T$, whatever the step size, and undoing the steps amplifies rounding errors in
        the same way. As a rule of thumb, $\lambda T$ should be below 4. Nor is it
        stable near roots, such as those of the variance in the Heston and CIR models
        ([numbers](../which_solver.md#where-reversible-heun-fails)). Where the solution
        is lost, [`diffrax_sde_adjoint.StochasticAdjoint`][] raises an error, and no
        other adjoint does; a gradient may be wrong before that. When in doubt, compare
        with `diffrax.Heun` on the same path, which is also the way out; for an Itô SDE
        it is `diffrax.Euler`, on the terms as they are.

    Source: Kidger, Foster, Li and Lyons, *Efficient and Accurate Gradients for Neural
    SDEs*, NeurIPS 2021.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms: diffrax.AbstractTerm) -> int:
        return 2

    def strong_order(self, terms: diffrax.AbstractTerm) -> float:
        return 0.5

    def init(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del t1
        check_sense(terms, self)
        return y0, carried(terms.vf(t0, y0, args))

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, _SolverState, diffrax.RESULTS]:
        yhat0, carried0 = solver_state
        if made_jump is not False:
            after_jump = lambda: carried(terms.vf(t0, yhat0, args))
            carried0 = lax.cond(made_jump, after_jump, lambda: carried0)
        vf0 = _complete(carried0, terms, t0, yhat0, args)

        control = terms.contr(t0, t1)
        check_products(terms, vf0, control, y0)
        yhat1 = _leapfrog(y0, yhat0, terms.prod(vf0, control))
        vf1 = terms.vf(t1, yhat1, args)
        increment = _mean_prod(terms, vf0, vf1, control)
        y1 = jtu.tree_map(lambda y, dy: y + dy, y0, increment)
        # Against Euler's method from `y0`. From `yhat0`, where the vector field is
        # known, it would see an error of first order in `yhat0 - y0`, which no smaller
        # step makes smaller, and of which `y1` has one of second order only. Where
        # steps are constant, nothing looks at this, and XLA leaves the evaluation out,
        # unless it has side effects.
        euler = terms.prod(terms.vf(t0, y0, args), control)
        y1_error = jtu.tree_map(lambda a, b: a - b, increment, euler)
        dense_info = dict(y0=y0, y1=y1)
        solver_state = (yhat1, carried(vf1))
        return y1, y1_error, dense_info, solver_state, diffrax.RESULTS.successful

    def backward_step(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, _SolverState, diffrax.RESULTS]:
        yhat1, carried1 = solver_state
        vf1 = _complete(carried1, terms, t1, yhat1, args)
        control = terms.contr(t0, t1)
        increment = jtu.tree_map(lambda x: -x, terms.prod(vf1, control))
        yhat0 = _leapfrog(y1, yhat1, increment)
        vf0 = terms.vf(t0, yhat0, args)
        increment = _mean_prod(terms, vf0, vf1, control)
        y0 = jtu.tree_map(lambda y, dy: y - dy, y1, increment)
        carried0 = carried(vf0)
        if made_jump is not False:
            # The step evaluated the vector field on the right of the jump. That of its
            # state is on the left: diffrax steps from the last number before a jump to
            # the first one after.
            left = prevbefore(prevbefore(t0))
            before_jump = lambda: carried(terms.vf(left, yhat0, args))
            carried0 = lax.cond(made_jump, before_jump, lambda: carried0)
        dense_info = dict(y0=y0, y1=y1)
        return y0, dense_info, (yhat0, carried0), diffrax.RESULTS.successful

    def func(
        self, terms: diffrax.AbstractTerm, t0: RealScalarLike, y0: Y, args: Args
    ) -> VF:
        return terms.vf(t0, y0, args)


ReversibleHeun.__init__.__doc__ = """**Arguments:** None"""
