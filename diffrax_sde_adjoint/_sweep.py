"""The backward sweep: the gradient of a solve, from its end and its tape.

From the last step to the first,

1. undo the step, for the state at its start: `solver.backward_step`;
2. add what was saved within the step to the cotangent of its outputs (`_saves.py`);
3. pull the cotangent of its outputs back through `solver.step`, to its inputs: the
   state at its start, for the step before, and `args` and `terms`, whose cotangents add
   up.

The state at a step's start is that of the forward solve up to rounding, so what this
returns is the gradient of the numerical solution. Memory is a state and a cotangent,
whatever the number of steps. A step costs a `backward_step` and a VJP of a `step`.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ._compat import Args, Y
from ._controls import evaluate_controls, with_controls
from ._guard import largest
from ._saves import SavedCotangents
from ._solver import AbstractReversibleSolver
from ._tape import Tape


class Cotangents(eqx.Module):
    """The cotangents that a sweep carries from the right to the left.

    Each has the structure of what it is a cotangent of, with `None` for every leaf that
    is not differentiated.
    """

    y: Y
    solver_state: PyTree[Array | None]
    args: PyTree[Array | None]
    terms: PyTree[Array | None]


class SweepState(eqx.Module):
    """What a sweep carries: the state of the solve at the left end of a step, up to
    rounding; its cotangents; how many of the saved `ts` lie there or further left; the
    largest entry so far of each leaf of `y`; and whether all steps could be undone.
    """

    num_ts_left: Int[Array, ""]
    y: Y
    largest_y: PyTree[Float[Array, ""]]
    solver_state: PyTree[Any]
    grads: Cotangents
    result: diffrax.RESULTS


def sweep(
    terms: PyTree[diffrax.AbstractTerm],
    solver: AbstractReversibleSolver,
    args: Args,
    tape: Tape,
    saved: SavedCotangents,
    y1: Y,
    solver_state1: PyTree[Any],
    grad_solver_state1: PyTree[Array | None],
    perturbed_args: PyTree[bool],
    perturbed_terms: PyTree[bool],
) -> SweepState:
    """Pulls the cotangents of a solve's outputs back to its inputs.

    `y1` and `solver_state1` are what the solve ended with. Returns the state of the
    sweep at the start of the solve.
    """
    diff_args, nondiff_args = eqx.partition(args, perturbed_args)
    diff_terms, nondiff_terms = eqx.partition(terms, perturbed_terms)

    def undo_step(t0: Array, t1: Array, carry: SweepState) -> SweepState:
        def evaluate(diff_terms):
            return evaluate_controls(eqx.combine(diff_terms, nondiff_terms), t0, t1)

        controls, pull_back_controls = eqx.filter_vjp(evaluate, diff_terms)

        y0, dense_info, solver_state0, result = solver.backward_step(
            with_controls(terms, t0, t1, controls),
            t0,
            t1,
            carry.y,
            args,
            carry.solver_state,
            False,
        )
        grad_dense_info, num_ts_left = saved.grad_dense_info(
            solver.interpolation_cls, t0, t1, dense_info, carry.num_ts_left
        )

        def step(y0, solver_state0, diff_args, diff_terms, controls):
            y1, _, dense_info, solver_state1, _ = solver.step(
                with_controls(eqx.combine(diff_terms, nondiff_terms), t0, t1, controls),
                t0,
                t1,
                y0,
                eqx.combine(diff_args, nondiff_args),
                solver_state0,
                False,
            )
            return y1, dense_info, solver_state1

        _, pull_back = eqx.filter_vjp(
            step, y0, solver_state0, diff_args, diff_terms, controls
        )
        grad_y0, grad_state0, grad_args, grad_terms, grad_controls = pull_back(
            (carry.grads.y, grad_dense_info, carry.grads.solver_state)
        )
        (more_grad_terms,) = pull_back_controls(grad_controls)
        grads = Cotangents(
            grad_y0,
            grad_state0,
            _add(carry.grads.args, grad_args),
            _add(carry.grads.terms, _add(grad_terms, more_grad_terms)),
        )
        result = diffrax.RESULTS.where(
            diffrax.is_okay(carry.result), result, carry.result
        )
        largest_y = jtu.tree_map(jnp.maximum, carry.largest_y, largest(y0))
        return SweepState(num_ts_left, y0, largest_y, solver_state0, grads, result)

    def undo_page(i: Int[Array, ""], carry: SweepState) -> SweepState:
        page = tape.pages[i]
        return _backwards(
            tape.num_steps_on_page(i),
            lambda k, carry: undo_step(page[k], page[k + 1], carry),
            carry,
        )

    zero_y = jtu.tree_map(jnp.zeros_like, y1)
    carry = SweepState(
        saved.num_ts,
        y1,
        largest(y1),
        solver_state1,
        Cotangents(
            saved.grad_final_y(zero_y),
            grad_solver_state1,
            jtu.tree_map(jnp.zeros_like, diff_args),
            jtu.tree_map(jnp.zeros_like, diff_terms),
        ),
        diffrax.RESULTS.successful,
    )
    return _backwards(tape.num_pages, undo_page, carry)


def _backwards(
    num: Int[Array, ""],
    body_fun: Callable[[Int[Array, ""], SweepState], SweepState],
    carry: SweepState,
) -> SweepState:
    """`body_fun` for `num - 1`, ..., `0`."""

    def body(i, carry):
        # In a batch this runs on, without effect, for elements with fewer steps. Then
        # it is to be at a step that was made, as evaluating it elsewhere may raise.
        return body_fun(jnp.maximum(num - 1 - i, 0), carry)

    return lax.fori_loop(0, num, body, carry)


def _add(a: PyTree[Array | None], b: PyTree[Array | None]) -> PyTree[Array | None]:
    return jtu.tree_map(lambda x, y: x + y, a, b)
