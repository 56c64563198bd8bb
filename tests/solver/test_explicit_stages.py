"""Explicit Runge-Kutta methods with stages written out, against those of diffrax."""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import by_default_unless, relative_error

from diffrax_sde_adjoint import EES25, AbstractReversibleSolver
from diffrax_sde_adjoint._solver import is_reversible
from diffrax_sde_adjoint._solver.stage_loops import (
    ExplicitStages,
    StartedSolver,
    name_of,
    started,
    without_loops,
)


methods = [
    cls
    for cls in vars(diffrax).values()
    if isinstance(cls, type)
    and issubclass(cls, diffrax.AbstractERK)
    and not cls.__name__.startswith("Abstract")
]


def vector_field(t, y, args):
    return {"a": jnp.sin(y["b"] * t) * args, "b": y["a"] - 0.3 * y["b"]}


@pytest.mark.parametrize(
    "method",
    by_default_unless(lambda method: method is not diffrax.Bosh3, methods),
)
def test_steps(method):
    """Two steps, and what they return; the second one also after a jump."""
    written_out = without_loops(method())
    assert type(written_out) is ExplicitStages
    term = diffrax.ODETerm(vector_field)

    @eqx.filter_jit
    def steps(solver, y0, args):
        t0, t1, t2 = 0.1, 0.25, 0.5
        state = solver.init(term, t0, t1, y0, args)
        y1, *first = solver.step(term, t0, t1, y0, args, state, False)
        (_, _, state, _) = first
        step = lambda jump: solver.step(term, t1, t2, y1, args, state, jump)
        out = [(y1, *first), step(jnp.array(False)), step(jnp.array(True))]
        errors = [error for _, error, *_ in out]
        others = [(y1, info, state) for y1, _, info, state, _ in out]
        return errors, eqx.filter(others, eqx.is_inexact_array)

    y0 = {"a": jnp.array([0.3, -0.7]), "b": jnp.array([1.1, 0.2])}
    errors, actual = steps(written_out, y0, jnp.array(0.8))
    expected_errors, expected = steps(method(), y0, jnp.array(0.8))
    assert relative_error(actual, expected) < 1e-14
    # They are small differences of numbers of size one.
    for x, y in zip(
        jtu.tree_leaves(errors), jtu.tree_leaves(expected_errors), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-15)


def _undone(method):
    """A user's solver with steps of `method` that can be undone."""

    class Undone(AbstractReversibleSolver, method):
        def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
            raise NotImplementedError

    return Undone()  # pyright: ignore[reportAbstractUsage]


def test_others_are_left_as_they_are():
    plain = (EES25(), diffrax.Kvaerno3(), diffrax.KenCarp3(), diffrax.Euler())
    for solver in (*plain, _undone(diffrax.Heun)):
        assert type(without_loops(solver)) is type(solver)


@pytest.mark.parametrize("method", (diffrax.Tsit5, diffrax.Kvaerno3))
def test_vector_field_at_the_start(method):
    term, y = diffrax.ODETerm(lambda t, y, args: -y), jnp.array([0.3, -0.7])

    def start(solver):
        state = solver.init(term, 0.0, 0.1, y, None)
        return started(solver, state, term, 0.0, y, None)

    solver, (is_first, vf) = start(without_loops(method()))
    assert type(solver) is StartedSolver and not is_first
    np.testing.assert_array_equal(vf, -y)
    # Its own `init` says the same, and it has the name that a user knows.
    np.testing.assert_array_equal(solver.init(term, 0.0, 0.1, y, None)[1], vf)
    assert name_of(solver) == method.__name__
    undone, (is_first, _) = start(without_loops(_undone(method)))
    assert is_reversible(undone) and is_first
