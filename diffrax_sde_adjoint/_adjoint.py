"""`StochasticAdjoint`: what it is, and which way back it takes."""

import functools
import math
from typing import Any

import diffrax
import equinox as eqx

from ._compat import State
from ._forward.saved import get_subs
from ._forward.solve import (
    Derivative,
    Recording,
    check_checkpoint_every,
    prepare,
    solve,
)
from ._forward.tape import shortest_in_two_parts
from ._solver import ReversibleHeun, is_reversible
from ._sweep import SweepRule, steps_between_looks


_no_forward_mode = (
    "`adjoint=StochasticAdjoint()` does not support forward mode (`jax.jvp`, "
    "`jax.jacfwd`, `jax.linearize`) of a solve. Use `adjoint=diffrax.ForwardMode()` "
    "instead, or `diffrax_sde_adjoint.forward_sensitivity`, or reverse mode "
    "(`jax.grad`, `jax.jacrev`). (Gradients can be differentiated in forward mode, as "
    "in `jax.hessian`.)"
)
_no_second_derivative = (
    "`adjoint=StochasticAdjoint()` does not support differentiating a gradient in "
    "reverse mode. Differentiate it in forward mode, as in `jax.jacfwd(jax.grad(f))`, "
    "or use `adjoint=diffrax.DirectAdjoint()` instead."
)
# Of a page of the tape, if there is nothing else to say how long one should be. It has
# one more time than steps, and so 512 bytes in float64: see
# `docs/how_it_works/small_loops.md`.
_steps_per_page = 63
# In bytes, of what is kept of a step: no memory to speak of.
_small_step = 64


def _full_pages(steps_per_page: int, num_steps: int | None, is_limit: bool) -> int:
    """About as many steps per page, or not more if that `is_limit`, such that all pages
    are full; as many, if there is no such number. Loops over the steps of a page whose
    length is known run faster on accelerators.
    """
    if num_steps is None:
        return steps_per_page
    wanted = min(steps_per_page, num_steps)
    # The two parts of a page are to be of one length.
    fits = lambda n: not is_limit or n % 2 == 0 or n < shortest_in_two_parts
    last = wanted if is_limit else min(2 * wanted, num_steps)
    numbers = [
        n for n in range(-(-wanted // 2), last + 1) if num_steps % n == 0 and fits(n)
    ]
    distance = lambda n: abs(math.log(n / wanted))
    return min(numbers, key=distance, default=steps_per_page)


def _pages_of_replayed_steps(
    max_steps: int, num_steps: int | None, size_of_state: int, size_of_step: int
) -> int:
    """For the least memory: of the states at the starts of pages, and of what is kept
    of the steps of one. For the least time, if both are small.
    """
    ratio = size_of_state / max(size_of_step, 1) if size_of_step > _small_step else 1
    most = max_steps if num_steps is None else num_steps
    wanted = min(max(round(math.sqrt(most * ratio)), 1), most)
    return _full_pages(wanted, num_steps, is_limit=False)


def _pages_of_kept_steps(
    num_steps: int | None, size_of_state: int, size_of_step: int
) -> int:
    """One step each, so that what is kept is written once, if it is not small."""
    del size_of_state
    if size_of_step > _small_step:
        return 1
    return _full_pages(_steps_per_page, num_steps, is_limit=True)


class StochasticAdjoint(diffrax.AbstractAdjoint):
    r"""Backpropagate through [`diffrax.diffeqsolve`][], exactly, and fast.

    ```python
    diffeqsolve(..., adjoint=StochasticAdjoint())
    ```

    Gradients are those of the numerical solution, as for
    [`diffrax.RecursiveCheckpointAdjoint`][] and up to rounding equal to its, for every
    solver, step size controller and `SaveAt` of diffrax, and for SDEs, ODEs and CDEs.
    There are three [ways back](../how_it_works/stochastic_adjoint.md) through a solve.
    In evaluations of the vector field for each stage of a step, with $N$ for
    `max_steps` (or the number of steps, if these are constant and times are numbers
    that are known when the solve is traced), a state of size $S$, and $R$ for what the
    derivative of a step needs, such as the activations of a network (all of a batch):

    | | evaluations | memory, beside $S + R$ |
    | - | - | - |
    | undoing steps | 4 | none |
    | making steps again | 4 | $2 \sqrt{N S R}$, at most $N S$ |
    | `store_all=True` | 3 | $N R$ |

    Of the evaluations, one is that of the solve, two are for the transpose of the
    derivative, and the fourth is at the states that were found again.

    - *Undoing its steps*, with any [`diffrax_sde_adjoint.AbstractReversibleSolver`][],
        such as [`diffrax_sde_adjoint.ReversibleHeun`][] for Stratonovich SDEs (which
        also takes the place of diffrax's). Memory does not grow with the number of
        steps, except for the time of each of `max_steps` (4 bytes in float32, twice
        that if there can be jumps). It takes five evaluations if they are undone at
        other points, as those of [`diffrax_sde_adjoint.EES25`][] are.
    - *Making its steps again*, with any other solver, from states that were kept every
        `checkpoint_every` steps. This holds `max_steps / checkpoint_every` states, and
        what is needed of `checkpoint_every` steps; by default, the least memory. Where
        a step needs far more than a state, as with large networks, that is to keep the
        state before each step.
    - *Keeping what is needed of each step*, with any solver, by `store_all=True`, where
        memory is no concern. `max_steps` should be about the number of steps, as memory
        is allocated for so many; diffrax's default is 4096.

    An array of `args` or `terms` that is indexed by time, such as the context of a
    latent SDE or the series that drives a controlled differential equation, adds
    nothing to a step by its length.

    Brownian paths have to give the same value when queried again, as
    [`diffrax_sde_adjoint.BrownianInterval`][] does. The stages of explicit
    Runge-Kutta methods are written out, which is faster than diffrax's loop. What has a
    derivative in reverse mode only, as every `jax.custom_vjp` does, is evaluated once
    more. Of implicit methods, what is kept of a step are the roots, and the vector
    field is evaluated there once more; but if there may be jumps, or a `solver_state`
    was passed, roots are found once more.

    It is an error, or with `diffeqsolve(..., throw=False)` the gradient is NaN, if
    undoing steps misses where the solve had been by what is worth more than 6e-6
    (float64; 5e-3 in float32, and for near-exact solvers) of the size of the outputs
    times their cotangents; or if [`diffrax_sde_adjoint.ReversibleHeun`][] is not stable
    on a solve. Both happen where dynamics contract: see
    [limits and remedies](../how_it_works/stochastic_adjoint.md#limits).

    Gradients are computed with respect to `y0`, `args`, a passed `solver_state`,
    `SaveAt(ts=...)`, every floating-point array inside `terms`, and whatever a vector
    field or a `SaveAt(fn=...)` refers to by closure. For ODEs and CDEs also with
    respect to `t0`, `t1`, `dt0` and what is in the step size controller, which costs
    another solve, and its memory, for each number that is differentiated. (Brownian
    paths have no derivative in time.) Gradients can be differentiated in forward mode,
    as in `jax.hessian`.

    !!! info "What is not supported"

        The following raise an error:

        - terms whose product of vector field and control is not of the structure of
            the solution;
        - terms that were converted for solvers of the other kind (Itô, Stratonovich);
        - differentiating a solve in forward mode, for which there is
            [`diffrax.ForwardMode`][];
        - differentiating a gradient in reverse mode, for which there is
            [`diffrax.DirectAdjoint`][];
        - differentiating a solve with `max_steps=None`;
        - differentiating with respect to what is in the solver, or what a control
            refers to by closure;
        - differentiating with respect to times with a progress meter;
        - differentiating a solve with a step size controller of your own, if what it
            decides has a derivative with respect to the solution or `args`.

    Source: Kidger, Foster, Li and Lyons, *Efficient and Accurate Gradients for Neural
    SDEs*, NeurIPS 2021.
    """

    checkpoint_every: int | None = eqx.field(static=True, default=None)
    store_all: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_checkpoint_every("StochasticAdjoint", self.checkpoint_every)
        if self.store_all and self.checkpoint_every is not None:
            raise ValueError(
                "`StochasticAdjoint(store_all=True)` keeps what is needed of every "
                "step, and does not take `checkpoint_every`. Pass one of the two."
            )

    def loop(self=None, *, throw, **kwargs) -> tuple[State, Any]:
        kwargs = prepare(self, "StochasticAdjoint", throw=throw, **kwargs)
        assert self is not None
        solver = kwargs["solver"]
        max_steps, num_steps = kwargs["max_steps"], kwargs["num_steps"]
        is_undone = is_reversible(solver) and not self.store_all
        steps_per_page = self.checkpoint_every
        snapshot_every = None if is_undone and steps_per_page is None else 1
        if self.store_all and issubclass(type(solver), ReversibleHeun):
            # The state between two steps is known where a page starts.
            steps_per_page = 1
            snapshot_every = steps_between_looks(num_steps)
        elif self.store_all:
            steps_per_page = functools.partial(_pages_of_kept_steps, num_steps)
            snapshot_every = None
        elif steps_per_page is None and is_undone:
            steps_per_page = _full_pages(_steps_per_page, num_steps, is_limit=True)
        elif steps_per_page is None:
            steps_per_page = functools.partial(
                _pages_of_replayed_steps, max_steps, num_steps
            )
        recording = Recording(
            steps_per_page,
            snapshot_every=snapshot_every,
            keeps_steps=self.store_all,
        )
        meter = kwargs["progress_meter"]
        derivative = Derivative(
            rule=SweepRule(
                solver=solver,
                save_steps=[sub.steps for sub in get_subs(kwargs["saveat"])],
                has_progress_meter=type(meter) is not diffrax.NoProgressMeter,
                throw=throw,
            ),
            recording=recording,
            no_second_derivative=_no_second_derivative,
            no_forward_mode=_no_forward_mode,
        )
        return solve(self, derivative, **kwargs)


StochasticAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoint_every`: keep the state of the solve every so many accepted steps. With a
    solver whose steps can be undone, this bounds for how long rounding errors can grow;
    by default nothing is kept. With other solvers every value takes the same number of
    evaluations; by default it is what takes the least memory.
- `store_all`: keep what is needed of every step, and neither undo steps nor make them
    again.

**Raises:**

`ValueError` if `checkpoint_every` is not a positive integer, or passed with
`store_all`.
"""
