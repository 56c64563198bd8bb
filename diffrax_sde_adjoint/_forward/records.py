"""What passes between the rooms: all that a solve depends on, the cotangents of that,
and what a forward solve leaves for the way back.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .._autodiff.batched_vjp import Axes, vjp
from .._compat import Args, IntScalarLike
from .tape import SolveState, Tape


class Parameters(eqx.Module):
    """All that a whole batch may share: the terms of a solve, `args`, and of each
    `SubSaveAt` its function and its times.

    Cotangents of these have the same structure, with `None` for every leaf that is not
    differentiated. To say which are meant, there is a `bool` in place of each.
    """

    terms: PyTree[Any]
    args: Args
    save_fns: PyTree[Any]
    save_ts: PyTree[Any]


# What the controls of a step depend on, and the step itself.
of_controls = Parameters(terms=True, args=False, save_fns=False, save_ts=False)
of_step = Parameters(terms=True, args=True, save_fns=False, save_ts=False)


class Differentiated(eqx.Module):
    """`Parameters`, in two parts: the arrays that are differentiated and all else, with
    `None` in each where the other has something. In a batch, cotangents of the first
    are sums over `axes`.
    """

    diff: Parameters
    nondiff: Parameters
    axes: Axes = eqx.field(static=True)

    @property
    def all(self) -> Parameters:
        return eqx.combine(self.diff, self.nondiff)

    def only(self, which: Parameters) -> "Differentiated":
        """These parameters, of which no more than `which` are differentiated. So the
        cotangents of others, which may be large, are not carried through a loop in
        which they are zero.
        """
        kept, rest = eqx.partition(self.diff, which)
        return Differentiated(kept, eqx.combine(self.nondiff, rest), self.axes)

    def vjp(
        self, fn: Callable[..., Any], own: Any, *fixed: Any
    ) -> tuple[Any, Callable[[Any], tuple[Parameters, Any]]]:
        """`fn(parameters, own, *fixed)`, and what pulls the cotangents of its inexact
        arrays back to those of the parameters and of `own`, which each element of a
        batch has for itself. `fn` must not refer to traced arrays by closure.
        """

        def of_parts(diff, own, fixed):
            nondiff, fixed = fixed
            return fn(eqx.combine(diff, nondiff), own, *fixed)

        return vjp(of_parts, self.axes, self.diff, own, (self.nondiff, fixed))


class Cotangents(eqx.Module):
    """The cotangents that the way back carries from right to left."""

    state: SolveState
    parameters: Parameters


class Start(eqx.Module):
    """What each element of a batch has for itself: the state before the first step,
    what was saved before it, and what the times of steps depend on.
    """

    state: SolveState
    saved: Any
    times: eqx.Partial


class Recorded(eqx.Module):
    """What a forward solve leaves for the way back, beside its final state: its tape,
    if there is one; of each `SubSaveAt`, how much had been saved before the first step;
    the loop over its steps, but for what is in `Start.times`; and whether step sizes
    depend on the solution by more than what has no derivative.
    """

    tape: Tape | None
    num_saved: list[IntScalarLike]
    loop: eqx.Partial
    sees_solution: bool = eqx.field(static=True)
