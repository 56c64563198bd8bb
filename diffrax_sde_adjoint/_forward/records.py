"""What passes between the rooms: all that a solve depends on, the cotangents of that,
and what a forward solve leaves for the way back.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._autodiff.batched_vjp import Axes, vjp
from .._compat import Args, IntScalarLike
from .gradient_in_times import Loop
from .tape import SolveState, Tape


class Parameters(eqx.Module):
    """All that a whole batch may share: the terms of a solve, `args`, and of each
    `SubSaveAt` its function and its times.

    Cotangents of these have the same structure, with `None` for every leaf that is not
    differentiated.
    """

    terms: PyTree[Any]
    args: Args
    save_fns: list[Any]
    save_ts: list[Any]


def of_controls(parameters: Parameters) -> Parameters:
    """The parameters that the controls of a step depend on."""
    args, save_fns, save_ts = jtu.tree_map(
        lambda _: None, (parameters.args, parameters.save_fns, parameters.save_ts)
    )
    return Parameters(parameters.terms, args, save_fns, save_ts)


def of_step(parameters: Parameters) -> Parameters:
    """The parameters that a step depends on."""
    save_fns, save_ts = jtu.tree_map(
        lambda _: None, (parameters.save_fns, parameters.save_ts)
    )
    return Parameters(parameters.terms, parameters.args, save_fns, save_ts)


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

    def only(self, keep: Callable[[Parameters], Parameters]) -> "Differentiated":
        """These parameters, of which `keep` says what is differentiated: it leaves
        `None` in place of everything else. So the cotangents of that, which may be
        large, are not carried through a loop in which they are zero.
        """
        kept = keep(self.diff)
        rest = jtu.tree_map(
            lambda x, y: y if x is None else None,
            kept,
            self.diff,
            is_leaf=lambda x: x is None,
        )
        return Differentiated(kept, eqx.combine(self.nondiff, rest), self.axes)

    def vjp(
        self, fn: Callable[..., Any], own: Any, *others: Any
    ) -> tuple[Any, Callable[[Any], tuple[Parameters, Any]]]:
        """`fn(parameters, own, *others)`, and what pulls the cotangents of its inexact
        arrays back to those of the parameters and of `own`, which each element of a
        batch has for itself. `fn` must not refer to traced arrays by closure.
        """

        def of_parts(diff, own, others):
            nondiff, others = others
            return fn(eqx.combine(diff, nondiff), own, *others)

        return vjp(of_parts, self.axes, self.diff, own, (self.nondiff, others))


class Cotangents(eqx.Module):
    """What the way back carries from right to left. Each has the structure of what it
    is a cotangent of, with `None` for every leaf that is not differentiated.
    """

    state: SolveState
    parameters: Parameters


class Start(eqx.Module):
    """What each element of a batch has for itself: the state before the first step,
    what was saved before it, and what the times of steps depend on.
    """

    state: SolveState
    saved: Any
    times: Loop


class Recorded(eqx.Module):
    """What a forward solve leaves for the way back, beside its final state: its tape,
    if there is one; of each `SubSaveAt`, how much had been saved before the first step;
    the loop over its steps, but for `Start.times`; and whether step sizes depend on the
    solution by more than what has no derivative.
    """

    tape: Tape | None
    num_saved: list[IntScalarLike]
    loop: Loop
    sees_solution: bool = eqx.field(static=True)
