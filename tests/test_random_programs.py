"""`StochasticAdjoint` against `RecursiveCheckpointAdjoint`, on solves drawn at random
from all that `test_adjoint_cases.py` names.
"""

import dataclasses
import random

import jax.numpy as jnp
import pytest
from test_adjoint_cases import Case, assert_equal_gradients, with_levy_area


# That take any noise; the others need it to be commutative, additive or absent.
_for_any_noise = (
    "ReversibleHeun",
    "Heun",
    "Midpoint",
    "Ralston",
    "Euler",
    "EulerHeun",
    "GeneralShARK",
    "SlowRK",
    "SPaRK",
    "HalfSolver",
)
_for_odes = ("Heun", "Midpoint", "Ralston", "Euler", "Tsit5")
_adaptive = (
    "ReversibleHeun",
    "Heun",
    "Midpoint",
    "Ralston",
    "SPaRK",
    "HalfSolver",
    "Tsit5",
)


def draw(seed: int) -> Case:
    """Half of the solvers are those whose steps can be undone."""
    choose = random.Random(seed).choice
    # Brownian paths have no derivative in time.
    differentiate_times = choose((False, False, False, True))
    others = _for_odes if differentiate_times else _for_any_noise
    solver = choose(("ReversibleHeun", choose(others)))
    controllers = ["constant", "step to"]
    if solver in _adaptive:
        controllers += ["PID", "PID, no dt0", "clip", "jumps"]
    state = choose(("array", "array", "scalar", "tree"))
    if differentiate_times:
        state, noises = "array", ["none"]
    elif state == "array":
        noises = ["general", "general operator", "diagonal", "additive", "scalar"]
        if solver in with_levy_area:
            noises.remove("general operator")
    else:
        noises = [{"scalar": "scalar", "tree": "general"}[state]]
    event = choose((None, None, None, "boolean", "float"))
    saveats = ["t1", "ts", "t0, ts, t1", "steps", "steps=3", "steps, ts", "fn", "subs"]
    if event is None:
        saveats.append("dense")
    noise, saveat = choose(noises), choose(saveats)
    return Case(
        solver,
        noise=noise,
        state=state,
        saveat=saveat,
        controller=choose(controllers),
        backward=choose((False, True)) and solver not in with_levy_area,
        dtype=choose((jnp.float64, jnp.float64, jnp.float32)),
        event=event,
        checkpoint_every=choose((None, None, 1, 4, 200)),
        # An incomplete dense solution cannot be evaluated.
        max_steps=choose((100, 100, 100, 5 if saveat != "dense" else 100)),
        differentiate_ts=choose((False, True)),
        differentiate_times=differentiate_times,
    )


def test_draws_differ():
    cases = [draw(seed) for seed in range(220)]
    assert len(set(cases)) > 210
    for field in dataclasses.fields(Case):
        assert len({getattr(case, field.name) for case in cases}) > 1, field.name


@pytest.mark.parametrize(
    "seed",
    [*range(20), *(pytest.param(i, marks=pytest.mark.slow) for i in range(20, 220))],
)
def test_random_program(seed):
    case = draw(seed)
    # What is differentiated in times has no Brownian motion, and is smooth in them.
    assert_equal_gradients(case)
