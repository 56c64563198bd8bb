"""Stochastic Runge-Kutta methods with their stages written out, against diffrax's."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import make_system, make_terms, noise_shapes, relative_error, struct

from diffrax_sde_adjoint._solver.stage_loops import without_loops


class Euler(diffrax.AbstractSRK, diffrax.AbstractItoSolver):
    """With no Lévy area, and all that a tableau may leave out."""

    tableau = diffrax.StochasticButcherTableau(
        a=[],
        b_sol=np.ones(1),
        b_error=None,
        c=np.zeros(0),
        coeffs_w=type(diffrax.SPaRK.tableau.coeffs_w)(
            a=(), b_sol=np.ones(1), b_error=None
        ),
        coeffs_hh=None,
        coeffs_kk=None,
        ignore_stage_f=None,
        ignore_stage_g=None,
    )


@pytest.mark.parametrize(
    "solver,noise",
    [
        *((diffrax.SPaRK(), x) for x in ("general", "diagonal", "scalar")),
        *((diffrax.GeneralShARK(), x) for x in ("general", "scalar")),
        *((diffrax.SlowRK(), x) for x in ("general", "diagonal")),
        *((x, "additive") for x in (diffrax.SEA(), diffrax.SRA1(), diffrax.ShARK())),
        (Euler(), "general"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_step_is_diffraxs(solver, noise):
    drift, diffusion, y0, args = make_system(noise)
    has_levy_area = solver.tableau.coeffs_hh is not None
    levy_area = (
        diffrax.SpaceTimeLevyArea if has_levy_area else diffrax.BrownianIncrement
    )
    # It is quick to compile, and there is one step.
    shape = struct(noise_shapes[noise], jnp.float64)
    path = diffrax.UnsafeBrownianPath(shape, jr.key(0), levy_area)
    terms = make_terms(drift, diffusion, path)
    step = lambda x: x.step(terms, 0.2, 0.5, y0, args, None, False)
    written_out = without_loops(solver)
    assert type(written_out) is not type(solver)
    *actual, result = jax.jit(lambda: step(written_out))()
    *expected, _ = jax.jit(lambda: step(solver))()
    assert relative_error(actual, expected) < 1e-13
    assert diffrax.is_okay(result)


def test_inside_of_a_wrapper():
    solver = without_loops(diffrax.HalfSolver(diffrax.SPaRK()))
    assert type(solver) is diffrax.HalfSolver
    assert type(solver.solver) is type(without_loops(diffrax.SPaRK()))


def test_other_steps_are_kept():
    class Mine(diffrax.SPaRK):
        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            raise AssertionError

    assert type(without_loops(Mine())) is Mine
