"""What passes between the rooms: all that a solve depends on, the cotangents of that,
and what a forward solve leaves for the way back.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._autodiff.batched_vjp import Axes, pull_back
from .._autodiff.linearized import Inputs, Linearized
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

    def linearized(
        self,
        fn: Callable[..., Any],
        which: Parameters,
        own: Any,
        *fixed: Any,
        has_aux: bool = False,
        finds_roots: bool = False,
    ) -> "LinearizedInParameters":
        """`fn(parameters, own, *fixed)`, traced: see `Linearized`. No more than `which`
        parameters are differentiated, so the cotangents of others are not carried
        through a loop in which they are zero.
        """

        def of_inputs(inputs: Inputs) -> Any:
            parameters = eqx.combine(inputs.shared, inputs.constant)
            return fn(parameters, inputs.own, *inputs.given)

        inputs = self._inputs(which, own, fixed)
        linearized = Linearized(of_inputs, inputs, has_aux, finds_roots)
        return LinearizedInParameters(linearized, which, self)

    def _inputs(self, which: Parameters, own: Any, fixed: Any) -> Inputs:
        diff, rest = eqx.partition(self.diff, which)
        return Inputs(diff, eqx.combine(self.nondiff, rest), own, fixed)

    def vjp(
        self, fn: Callable[..., Any], which: Parameters, own: Any, *fixed: Any
    ) -> tuple[Any, Callable[[Any, Parameters], tuple[Parameters, Any]]]:
        """`fn(parameters, own, *fixed)`, and what adds to the cotangents of parameters,
        and returns those of `own`, which each element of a batch has for itself: see
        `linearized`.
        """
        linearized = self.linearized(fn, which, own, *fixed)
        out, kept = linearized(own, *fixed)
        return out, functools.partial(linearized.pull_back, kept, fixed)

    def summed(self, grads: Parameters) -> Parameters:
        """The cotangents of each element of a batch, as sums over `axes`."""
        leaves, treedef = jtu.tree_flatten(grads)
        itself = lambda shared, *_: shared
        zeros = list(map(jnp.zeros_like, leaves))
        shared = jtu.tree_leaves(self.diff)
        sums, _ = pull_back(
            itself, self.axes, shared, [], [], leaves, zeros, is_linear=True
        )
        return jtu.tree_unflatten(treedef, sums)


class LinearizedInParameters(NamedTuple):
    """A function of parameters and more, see `Differentiated.linearized`."""

    linearized: Linearized
    which: Parameters
    parameters: Differentiated

    def __call__(self, own: Any, *fixed: Any) -> tuple[Any, list[Array]]:
        """The function's result, and what `pull_back` needs of it."""
        return self.linearized(self.parameters._inputs(self.which, own, fixed))

    def pull_back(
        self, kept: Sequence[Array], fixed: Any, cotangents: Any, sums: Parameters
    ) -> tuple[Parameters, Any]:
        """`sums`, with the cotangents of the parameters added, and those of `own`, from
        those of the inexact arrays of the result.
        """
        inputs = self.parameters._inputs(self.which, None, fixed)
        sums, others = eqx.partition(sums, self.which)
        sums, grad_own = self.linearized.pull_back(
            self.parameters.axes, inputs, kept, cotangents, sums
        )
        return eqx.combine(sums, others), grad_own


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
    depend on the solution by more than what has no derivative. If what the way back
    needs of each step was kept, the step as it was linearized.
    """

    tape: Tape | None
    linearized_step: Any
    num_saved: list[IntScalarLike]
    loop: eqx.Partial
    sees_solution: bool = eqx.field(static=True)
