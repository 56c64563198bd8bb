"""Step size controllers that record the decisions of another one, and repeat them.

For comparing two gradients of an adaptive solve of an SDE: a time that is rounded
otherwise, by an ulp, changes an increment of Brownian motion by the square root of it,
and two programs do not round alike.
"""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array


class Record(eqx.Module):
    """Where the first step ends, and what was decided after each."""

    tnext: Array
    decisions: tuple[Array, Array, Array, Array]


class Recording(diffrax.AbstractStepSizeController):
    """Those of another controller. `SaveAt(controller_state=True)` gives its record."""

    controller: diffrax.AbstractStepSizeController
    max_steps: int = eqx.field(static=True)

    def wrap(self, direction):
        return type(self)(self.controller.wrap(direction), self.max_steps)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        tnext, inner = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        times = jnp.zeros(self.max_steps, jnp.result_type(t0))
        flags = jnp.zeros(self.max_steps, bool)
        record = Record(jnp.asarray(tnext), (flags, times, times, flags))
        return tnext, (inner, jnp.array(0), record)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        inner, i, record = controller_state
        keep, tprev, tnext, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        decisions = jtu.tree_map(
            lambda xs, x: xs.at[i].set(x),
            record.decisions,
            (keep, tprev, tnext, made_jump),
        )
        state = (inner, i + 1, Record(record.tnext, decisions))
        return keep, tprev, tnext, made_jump, state, result


class Repeating(diffrax.AbstractStepSizeController):
    """Those of a record."""

    record: Record

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.record.tnext, jnp.array(0)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        i = controller_state
        keep, tprev, tnext, made_jump = (xs[i] for xs in self.record.decisions)
        return keep, tprev, tnext, made_jump, i + 1, diffrax.RESULTS.successful
