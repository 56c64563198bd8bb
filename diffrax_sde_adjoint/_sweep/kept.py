"""Going back through a solve whose forward solve kept what this needs of each step."""

import dataclasses
import functools

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int

from .._compat import BoolScalarLike
from .._forward.steps import LinearizedStep, MadeStep
from .._forward.tape import Page
from .sweep import Sweep, SweepState


def pull_back_kept(
    linearized_step: LinearizedStep, sweep: Sweep, page: Page, carry: SweepState
) -> SweepState:
    """Pulls cotangents back through the steps of a page, and not of a part of one."""

    def pull_back(
        k: Int[Array, ""], is_made: BoolScalarLike, made: MadeStep, carry: SweepState
    ) -> SweepState:
        step = page.step(k, is_made)
        back = functools.partial(
            linearized_step.pull_back, sweep.parameters, step, made
        )
        return sweep.pull_back_made(step, made, back, carry)

    if sweep.tape.steps_per_page == 1:
        made = jtu.tree_map(lambda x: x[0], page.made)
        carry = pull_back(jnp.array(0), page.num_steps > 0, made, carry)
    else:
        carry = sweep.backwards(page.num_steps, pull_back, carry, page.made)
    # Where the worth of a spurious solution is looked at.
    if page.snapshot is None:
        return carry
    return dataclasses.replace(carry, state=page.snapshot)
