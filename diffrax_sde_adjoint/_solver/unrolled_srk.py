"""diffrax's stochastic Runge-Kutta methods, with their stages written out."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import diffrax
import jax
import jax.tree_util as jtu
import numpy as np

from .._compat import Args, DenseInfo, RealScalarLike, Y
from .._misc import zeros_like
from .base import layers
from .forwarding import AbstractForwardingSolver


class SeparateStages(AbstractForwardingSolver, diffrax.AbstractWrappedSolver):
    """A method of diffrax's, with stages that are arrays of their own. In diffrax's
    loop they are the rows of one array. That loop has a derivative by a rule of its
    own, which cannot be summed over a batch; and the array is soon too large for the
    fast way in which XLA runs loops on a CPU: see `docs/how_it_works/small_loops.md`.
    """

    solver: diffrax.AbstractSRK

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.interpolation_cls

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

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
        coeffs, noises = _noises(tableau, path)
        is_additive = tableau.is_additive_noise()
        if is_additive:
            # That of the start stands for all stages.
            g0 = diffusion.vf(t0, y0, args)
            kicks = [[diffusion.prod(g0, noise)] for noise in noises]
        else:
            g0 = None
            kicks = [[] for _ in noises]
        drifts = []
        row = lambda a, j: a[j - 1] if j > 0 else ()
        for j, c in enumerate([0, *tableau.c]):
            t = t0 + float(c) * h
            z = _add(y0, [(row(tableau.a, j), drifts)])
            rows = [x.a[j : j + 1] if is_additive else row(x.a, j) for x in coeffs]
            z = _add(z, zip(rows, kicks, strict=True))
            if _is_ignored(tableau.ignore_stage_f, j):
                drifts.append(None)
            else:
                drifts.append(drift.vf_prod(t, z, args, h))
            if is_additive:
                continue
            for noise, kick in zip(noises, kicks, strict=True):
                if _is_ignored(tableau.ignore_stage_g, j):
                    kick.append(None)
                else:
                    # As in diffrax: the state may be complex, and noise is real.
                    with jax.numpy_dtype_promotion("standard"):
                        kick.append(diffusion.vf_prod(t, z, args, noise))

        y1 = _add(y0, [(tableau.b_sol, drifts)])
        ends = [np.atleast_1d(x.b_sol) for x in coeffs]
        y1 = _add(y1, zip(ends, kicks, strict=True))
        if is_additive:
            # It may depend on time.
            change = _change_of_additive(diffusion, g0, t1, y0, args, tableau, path)
            y1 = _add(y1, [((1,), [change])])
        if tableau.b_error is None:
            y_error = None
        else:
            y_error = _add(zeros_like(y0), [(tableau.b_error, drifts)])
            if not is_additive:
                ends = [x.b_error for x in coeffs]
                y_error = _add(y_error, zip(ends, kicks, strict=True))
        return y1, y_error, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful


def _noises(tableau: Any, path: Any) -> tuple[list[Any], list[Any]]:
    """The coefficients of each noise that moves the state, and the noise."""
    pairs = (
        (tableau.coeffs_w, lambda: path.W),
        (tableau.coeffs_hh, lambda: path.H),
        (tableau.coeffs_kk, lambda: path.K),
    )
    used = [(coeffs, get()) for coeffs, get in pairs if coeffs is not None]
    return [coeffs for coeffs, _ in used], [noise for _, noise in used]


def _change_of_additive(
    diffusion: diffrax.AbstractTerm,
    g0: Any,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    tableau: Any,
    path: Any,
) -> Y:
    """What the change of an additive diffusion over a step adds to the solution."""
    g1 = diffusion.vf(t1, y0, args)
    change = jtu.tree_map(lambda a, b: 0.5 * (b - a), g0, g1)
    if tableau.coeffs_hh is None:
        noise = path.W
    else:
        noise = jtu.tree_map(lambda w, h: w - 2 * h, path.W, path.H)
    return diffusion.prod(change, noise)


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
