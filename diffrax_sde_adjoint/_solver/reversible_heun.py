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

from collections.abc import Callable
from typing import ClassVar, TypeAlias

import diffrax
import jax.lax as lax
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import PyTree

from .._compat import (
    VF,
    Args,
    BoolScalarLike,
    DenseInfo,
    RealScalarLike,
    Y,
    prevbefore,
)
from .base import AbstractReversibleSolver


_SolverState: TypeAlias = tuple[Y, VF]


def _leapfrog(y: Y, yhat: Y, increment: Y) -> Y:
    return jtu.tree_map(lambda a, b, c: 2 * a - b + c, y, yhat, increment)


def sums_leaf_by_leaf(vf: VF) -> bool:
    """Whether all operators are linear in the arrays they consist of."""
    is_operator = lambda x: isinstance(x, lx.AbstractLinearOperator)
    operators = filter(is_operator, jtu.tree_leaves(vf, is_leaf=is_operator))
    linear = (
        lx.DiagonalLinearOperator,
        lx.MatrixLinearOperator,
        lx.PyTreeLinearOperator,
        lx.TridiagonalLinearOperator,
    )
    return all(isinstance(x, linear) for x in operators)


def _half_prod(
    terms: diffrax.AbstractTerm, vf0: VF, vf1: VF, control: PyTree, sign: int
) -> Y:
    """The product of `(vf1 + sign * vf0) / 2` with the control."""
    add = lambda a, b: b + a if sign == 1 else b - a
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

    One evaluation of the vector field a step, forwards and backwards. The solver state
    is the pair of $\hat y$ and the vector field at it. Has an embedded first-order
    method for adaptive step sizing, and uses linear interpolation for dense output.

    When used to solve SDEs it converges to the Stratonovich solution, with strong order
    0.5 in general and 1 for additive noise.

    This differs from [`diffrax.ReversibleHeun`][] in that:

    1. It has a `backward_step`, so that
        [`diffrax_sde_adjoint.StochasticAdjoint`][] can undo its steps.
    2. Vector fields may be any lineax operators, also those that are not linear in the
        arrays they consist of, such as products: for these, diffrax's adds the wrong
        thing.
    3. After a jump in the vector field it evaluates the vector field anew at $\hat y$,
        not at $y$: the latter could not be undone.

    But for 2 and 3 the solutions of the two are equal to the bit.

    !!! warning

        The method is not stable for contracting dynamics. For $y' = -\lambda y$ it has
        a spurious solution that grows like $e^{\lambda T}$ over a horizon of length
        $T$, whatever the step size. Undoing the steps of a contracting solve amplifies
        rounding errors in the same way. As a rule of thumb, $\lambda T$ should be below
        5, or smaller steps be made: the spurious solution starts out in proportion to
        the square of the step size.

    ??? cite "Reference"

        ```bibtex
        @article{kidger2021efficient,
            author={Kidger, Patrick and Foster, James and Li, Xuechen and Lyons, Terry},
            title={{E}fficient and {A}ccurate {G}radients for {N}eural {SDE}s},
            year={2021},
            journal={Advances in Neural Information Processing Systems}
        }
        ```
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

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
        return y0, terms.vf(t0, y0, args)

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
        yhat0, vf0 = solver_state
        if made_jump is not False:
            vf0 = lax.cond(made_jump, lambda: terms.vf(t0, yhat0, args), lambda: vf0)

        control = terms.contr(t0, t1)
        yhat1 = _leapfrog(y0, yhat0, terms.prod(vf0, control))
        vf1 = terms.vf(t1, yhat1, args)
        y1 = jtu.tree_map(
            lambda y, dy: y + dy, y0, _half_prod(terms, vf0, vf1, control, 1)
        )
        y1_error = _half_prod(terms, vf0, vf1, control, -1)
        dense_info = dict(y0=y0, y1=y1)
        return y1, y1_error, dense_info, (yhat1, vf1), diffrax.RESULTS.successful

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
        yhat1, vf1 = solver_state
        control = terms.contr(t0, t1)
        increment = jtu.tree_map(lambda x: -x, terms.prod(vf1, control))
        yhat0 = _leapfrog(y1, yhat1, increment)
        vf0 = terms.vf(t0, yhat0, args)
        y0 = jtu.tree_map(
            lambda y, dy: y - dy, y1, _half_prod(terms, vf0, vf1, control, 1)
        )
        if made_jump is not False:
            # The step evaluated the vector field on the right of the jump. That of its
            # state is on the left: diffrax steps from the last number before a jump to
            # the first one after.
            left = prevbefore(prevbefore(t0))
            vf0 = lax.cond(made_jump, lambda: terms.vf(left, yhat0, args), lambda: vf0)
        dense_info = dict(y0=y0, y1=y1)
        return y0, dense_info, (yhat0, vf0), diffrax.RESULTS.successful

    def func(
        self, terms: diffrax.AbstractTerm, t0: RealScalarLike, y0: Y, args: Args
    ) -> VF:
        return terms.vf(t0, y0, args)


ReversibleHeun.__init__.__doc__ = """**Arguments:** None"""
