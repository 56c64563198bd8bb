"""diffrax's Runge-Kutta methods, with no loop over their stages if they are explicit,
and otherwise with one of another kind.

Such a loop can be one of several kinds, which differ in the derivatives that it has. By
default it has one in reverse mode only, by a rule of its own, which can neither be
linearised nor summed over a batch.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._compat import (
    Args,
    BoolScalarLike,
    DenseInfo,
    RealScalarLike,
    Y,
    unvmap_any,
    with_scan_kind,
)
from .._misc import zeros_like
from .base import AbstractSameSolver, is_reversible, layers


_Solver = TypeVar("_Solver", bound=diffrax.AbstractSolver)


def in_forward_mode(solver: _Solver) -> _Solver:
    """`solver`, with loops that have a derivative in forward mode."""
    kinds = {None: "lax", "checkpointed": "lax"}
    classes = (diffrax.AbstractRungeKutta, diffrax.AbstractSRK)
    return _replace(solver, classes, lambda x: with_scan_kind(x, kinds))


def linearizable(solver: _Solver) -> _Solver:
    """`solver`, with loops that can be linearised, and whose gradient may be summed
    over a batch: by default, it would be found for each element.
    """
    change = lambda x: with_scan_kind(x, {None: "bounded"})
    return _replace(solver, diffrax.AbstractRungeKutta, change)


def without_loops(solver: _Solver) -> _Solver:
    """`solver`, with the stages of explicit Runge-Kutta methods written out."""
    for method, written_out in (
        (diffrax.AbstractSRK, StochasticStages),
        (diffrax.AbstractERK, ExplicitStages),
    ):

        def change(x, method=method, written_out=written_out):
            has_own_step = type(x).step is not method.step
            is_one = isinstance(x.tableau, diffrax.MultiButcherTableau)
            if has_own_step or is_one or is_reversible(x):
                return x
            return written_out(cast(Any, x))

        solver = _replace(solver, method, change)
    return solver


def _replace(solver: Any, cls: Any, fn: Callable[[Any], Any]) -> Any:
    # Of the type, and not `isinstance`, which looks through wrappers such as
    # `diffrax.HalfSolver`: it is the solver inside that is replaced.
    is_leaf = lambda x: issubclass(type(x), cls)
    replace = lambda x: fn(x) if is_leaf(x) else x
    return jtu.tree_map(replace, solver, is_leaf=is_leaf)


class ExplicitStages(AbstractSameSolver):
    """An explicit Runge-Kutta method of diffrax's, with stages that are arrays of their
    own. In diffrax's loop they are the rows of one array, which is soon too large for
    the fast way in which XLA runs loops on a CPU: see
    `docs/how_it_works/small_loops.md`.
    """

    solver: diffrax.AbstractERK

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: Any,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, Any, diffrax.RESULTS]:
        return explicit_step(
            self.solver.tableau, terms, t0, t1, y0, args, solver_state, made_jump
        )


class StartedSolver(AbstractSameSolver):
    """A Runge-Kutta method, the state of which has the vector field at the start of the
    first step too, if it has that of others.
    """

    solver: diffrax.AbstractSolver

    def init(self, terms, t0, t1, y0, args):
        if super().init(terms, t0, t1, y0, args) is None:
            return None
        return jnp.array(False), self.func(terms, t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        if solver_state is not None:
            _, vf = solver_state
            # That it is not the first step is known when this is traced.
            solver_state = (False, vf)
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)


def started(
    solver: diffrax.AbstractSolver,
    solver_state: Any,
    terms: PyTree[diffrax.AbstractTerm],
    t: RealScalarLike,
    y: Y,
    args: Args,
) -> tuple[diffrax.AbstractSolver, Any]:
    """`solver` and its state at the start of a solve, with the vector field evaluated
    there, if it was to be evaluated in the first step only.
    """
    cls, method = type(solver), diffrax.AbstractRungeKutta
    is_diffrax = cls.init is method.init and cls.step is method.step
    is_left = is_reversible(solver) or not (is_diffrax or cls is ExplicitStages)
    if solver_state is None or is_left:
        return solver, solver_state
    solver = StartedSolver(solver)
    return solver, solver.init(terms, t, t, y, args)


def name_of(solver: diffrax.AbstractSolver) -> str:
    """As its user knows it."""
    own = (ExplicitStages, StochasticStages, StartedSolver)
    return next(type(x).__name__ for x in layers(solver) if type(x) not in own)


def explicit_step(
    tableau: Any,
    terms: diffrax.AbstractTerm,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    solver_state: Any,
    made_jump: BoolScalarLike,
) -> tuple[Y, Y, DenseInfo, Any, diffrax.RESULTS]:
    """A step of an explicit Runge-Kutta method, as diffrax makes it, without a loop."""
    control = terms.contr(t0, t1)
    vfs, products = [], []
    y = y0
    for j, c in enumerate([0, *tableau.c]):
        if j > 0:
            y = _add(y0, [(tableau.a_lower[j - 1], products)])
        t = t1 if c == 1 else t0 + float(c) * (t1 - t0)
        if solver_state is None:
            products.append(terms.vf_prod(t, y, args, control))
            continue
        if j == 0:
            is_first, vf = solver_state
            if is_first is not False or made_jump is not False:
                evaluate = lambda vf, t=t, y=y: terms.vf(t, y, args)
                is_first = unvmap_any(is_first | made_jump)
                vf = lax.cond(is_first, evaluate, lambda vf: vf, vf)
        else:
            vf = terms.vf(t, y, args)
        vfs.append(vf)
        products.append(terms.prod(vf, control))
    y1 = y if tableau.ssal else _add(y0, [(tableau.b_sol, products)])
    y_error = _add(zeros_like(y0), [(tableau.b_error, products)])
    dense_info = dict(y0=y0, y1=y1, k=jtu.tree_map(lambda *x: jnp.stack(x), *products))
    solver_state = None if solver_state is None else (False, vfs[-1])
    return y1, y_error, dense_info, solver_state, diffrax.RESULTS.successful


class StochasticStages(AbstractSameSolver):
    """A stochastic Runge-Kutta method of diffrax's, with stages that are arrays of
    their own.
    """

    solver: diffrax.AbstractSRK

    def step(
        self,
        terms: diffrax.MultiTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> tuple[Y, Y | None, DenseInfo, None, diffrax.RESULTS]:
        tableau = self.solver.tableau
        drift, diffusion = terms.terms
        h = t1 - t0
        path = cast(Any, diffusion.contr(t0, t1, use_levy=True))
        known = dict(W=tableau.coeffs_w, H=tableau.coeffs_hh, K=tableau.coeffs_kk)
        # Of each noise that moves the state.
        coeffs = [x for x in known.values() if x is not None]
        noises = [getattr(path, name) for name, x in known.items() if x is not None]
        is_additive = tableau.is_additive_noise()
        # If it is additive, that of the start stands for all stages.
        g0 = diffusion.vf(t0, y0, args) if is_additive else None
        kicks = [[diffusion.prod(g0, noise)] if is_additive else [] for noise in noises]
        drifts = []
        row = lambda a, j: a[j - 1] if j > 0 else ()
        for j, c in enumerate([0, *tableau.c]):
            t = t0 + float(c) * h
            z = _add(y0, [(row(tableau.a, j), drifts)])
            rows = [x.a[j : j + 1] if is_additive else row(x.a, j) for x in coeffs]
            z = _add(z, zip(rows, kicks, strict=True))
            is_ignored = _is_ignored(tableau.ignore_stage_f, j)
            drifts.append(None if is_ignored else drift.vf_prod(t, z, args, h))
            if is_additive:
                continue
            for noise, kick in zip(noises, kicks, strict=True):
                if _is_ignored(tableau.ignore_stage_g, j):
                    kick.append(None)
                    continue
                # As in diffrax: the state may be complex, and noise is real.
                with jax.numpy_dtype_promotion("standard"):
                    kick.append(diffusion.vf_prod(t, z, args, noise))

        y1 = _add(y0, [(tableau.b_sol, drifts)])
        ends = [np.atleast_1d(x.b_sol) for x in coeffs]
        y1 = _add(y1, zip(ends, kicks, strict=True))
        if is_additive:
            # It may depend on time.
            g1 = diffusion.vf(t1, y0, args)
            change = jtu.tree_map(lambda a, b: 0.5 * (b - a), g0, g1)
            noise = path.W
            if tableau.coeffs_hh is not None:
                noise = jtu.tree_map(lambda w, h: w - 2 * h, path.W, path.H)
            y1 = _add(y1, [((1,), [diffusion.prod(change, noise)])])
        y_error = None
        if tableau.b_error is not None:
            y_error = _add(zeros_like(y0), [(tableau.b_error, drifts)])
            if not is_additive:
                ends = [x.b_error for x in coeffs]
                y_error = _add(y_error, zip(ends, kicks, strict=True))
        return y1, y_error, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful


def is_for_additive_noise(solver: diffrax.AbstractSolver) -> bool:
    """Whether the solver, or one that it wraps, is one of these, and for a diffusion
    only that does not depend on the state.
    """
    methods = [x for x in layers(solver) if issubclass(type(x), diffrax.AbstractSRK)]
    return any(cast(Any, x).tableau.is_additive_noise() for x in methods)


def _is_ignored(stages: Any, j: int) -> bool:
    return stages is not None and bool(stages[j])


def _add(y: Y, sums: Iterable[tuple[Any, Sequence[Y | None]]]) -> Y:
    """`y` and weighted sums, in which `None` is zero."""
    total = None
    for weights, xs in sums:
        for weight, x in zip(weights, xs, strict=True):
            if x is None or weight == 0:
                continue
            x = jtu.tree_map(lambda x, w=float(weight): w * x, x)
            total = x if total is None else jtu.tree_map(operator.add, total, x)
    return y if total is None else jtu.tree_map(operator.add, y, total)
