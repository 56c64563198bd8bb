"""What a compiled gradient asks of the host: nothing, from inside of its loops.

On an accelerator, a loop that calls the host waits for it in every step.
"""

import os
import re
import subprocess
import sys
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_sde_adjoint import (
    BackwardSDEAdjoint,
    BrownianInterval,
    ReversibleHeun,
    StochasticAdjoint,
)


constant, final = diffrax.ConstantStepSize(), diffrax.SaveAt(t1=True)


def loss(y0, key, solver, adjoint, *, dt=0.05, controller=constant, saveat=final):
    """With a path whose cells are steps of 0.05."""
    levy_area = diffrax.BrownianIncrement
    if isinstance(solver, diffrax.AbstractSRK):
        levy_area = diffrax.SpaceTimeLevyArea
    path = BrownianInterval(0.0, 1.0, (), key, dt=0.05, levy_area=levy_area)
    sol = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.ControlTerm(lambda t, y, args: 0.1 * y, path),
        ),
        solver,
        0.0,
        1.0,
        dt,
        y0,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=256,
    )
    return jnp.sum(sol.ys)


adaptive = dict(controller=diffrax.PIDController(rtol=1e-2, atol=1e-2))
off_grid = dict(dt=0.03)
exact, store_all = StochasticAdjoint(), StochasticAdjoint(store_all=True)
cases = {
    "grid, undone": (ReversibleHeun(), exact, {}),
    "grid, made again": (diffrax.Heun(), exact, {}),
    "grid, kept": (diffrax.Heun(), store_all, {}),
    "grid, Lévy area": (diffrax.SPaRK(), exact, {}),
    "grid, outputs": (
        ReversibleHeun(),
        exact,
        dict(saveat=diffrax.SaveAt(ts=jnp.array([0.3, 0.5]))),
    ),
    "off the grid, undone": (ReversibleHeun(), exact, off_grid),
    "off the grid, made again": (diffrax.Heun(), exact, off_grid),
    "adaptive, undone": (ReversibleHeun(), exact, adaptive),
    "adaptive, made again": (diffrax.Heun(), exact, adaptive),
    "adaptive, kept": (diffrax.Heun(), store_all, adaptive),
    "backward SDE": (diffrax.Heun(), BackwardSDEAdjoint(), {}),
    "backward SDE, adaptive": (diffrax.Heun(), BackwardSDEAdjoint(), adaptive),
}


def callbacks(hlo: str) -> tuple[int, int]:
    """How many there are in a compiled program, and in its loops."""
    bodies = dict(
        re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", hlo, re.M | re.S)
    )
    assert len(bodies) > 1
    called = {
        name: set(re.findall(r"%([\w.-]+)", text)) for name, text in bodies.items()
    }
    found, new = set(), set()
    for text in bodies.values():
        for condition, body in re.findall(
            r"condition=%([\w.-]+), body=%([\w.-]+)", text
        ):
            new |= {condition, body}
    assert len(new) > 0
    while len(new) > 0:
        found |= new
        new = set.union(*(called[name] for name in new)) & bodies.keys() - found
    count = lambda names: sum(
        len(re.findall(r'custom_call_target="[^"]*callback', bodies[x])) for x in names
    )
    return count(bodies), count(found)


known_length = [cases[x] for x in ("grid, undone", "grid, kept")]
by_default = ("grid, undone", "off the grid, made again")


@pytest.mark.filterwarnings("ignore:.*is not made for the steps:UserWarning")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, id=name, marks=() if name in by_default else pytest.mark.slow)
        for name, x in cases.items()
    ],
)
def test_no_callback_in_a_loop(case):
    solver, adjoint, kwargs = case
    gradient: Any = eqx.filter_jit(jax.grad(loss))
    args = (jnp.array(1.0), jr.key(0), solver, adjoint)
    program = gradient.lower(*args, **kwargs).compile()
    hlo = program.compiled.as_text()
    in_all, in_loops = callbacks(hlo)
    assert in_all > 0
    assert in_loops == 0
    if case in known_length and jax.__version_info__ >= (0, 7):
        # Others ask whether to go on.
        assert hlo.count(" while(") == hlo.count('"known_trip_count"') > 0


_lower = """
import sys
sys.path.insert(0, "{tests}")
import jax, jax.numpy as jnp, jax.random as jr
from test_host import cases, loss
for name in ("grid, undone", "off the grid, made again", "adaptive, kept"):
    solver, adjoint, kwargs = cases[name]
    gradient = lambda y0, key: jax.grad(loss)(y0, key, solver, adjoint, **kwargs)
    traced = jax.jit(gradient).trace(jnp.float32(1), jr.key(0))
    for platform in ("cuda", "rocm", "tpu"):
        assert len(traced.lower(lowering_platforms=(platform,)).as_text()) > 10_000
print("lowered")
"""


@pytest.mark.slow
def test_lowers_for_other_platforms():
    """On a machine that has none of them. `EQX_ON_ERROR` is read by equinox when it is
    imported: it has errors lowered for the platform that there is.
    """
    code = _lower.format(tests=os.path.dirname(__file__))
    environment = {**os.environ, "EQX_ON_ERROR": "off", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.stdout == "lowered\n", out.stderr[-2000:]
