"""`StochasticAdjoint` against adjoints of diffrax, over what a solve can be
made of: solver, noise, structure of the state, `SaveAt`, step size controller,
direction and dtype.
"""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from helpers import (
    SmoothPath,
    by_default_unless,
    keys,
    make_system,
    make_terms,
    noise_shapes,
    reference_value_and_grad,
    relative_error,
    struct,
)
from jaxtyping import Array
from recorded_steps import Recording, Repeating

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


newton = optx.Newton(1e-9, 1e-9)
solvers = {
    "ReversibleHeun": ReversibleHeun(),
    "Heun": diffrax.Heun(),
    "Midpoint": diffrax.Midpoint(),
    "Ralston": diffrax.Ralston(),
    "Euler": diffrax.Euler(),
    "EulerHeun": diffrax.EulerHeun(),
    "ItoMilstein": diffrax.ItoMilstein(),
    "StratonovichMilstein": diffrax.StratonovichMilstein(),
    "SEA": diffrax.SEA(),
    "SRA1": diffrax.SRA1(),
    "ShARK": diffrax.ShARK(),
    "GeneralShARK": diffrax.GeneralShARK(),
    "SlowRK": diffrax.SlowRK(),
    "SPaRK": diffrax.SPaRK(),
    "HalfSolver": diffrax.HalfSolver(diffrax.EulerHeun()),
    "HalfSolver(ReversibleHeun)": diffrax.HalfSolver(ReversibleHeun()),
    "Tsit5": diffrax.Tsit5(),
    "Kvaerno3": diffrax.Kvaerno3(root_finder=newton),
    "ImplicitEuler": diffrax.ImplicitEuler(root_finder=newton),
}
with_levy_area = ("SEA", "SRA1", "ShARK", "GeneralShARK", "SlowRK", "SPaRK")


def first_entry(t, y, args):
    """Not linear in the state, and dependent on everything else."""
    y, *_ = jtu.tree_leaves(y)
    return {"f": jnp.sin(args["rate"] * y + t), "t": t * y}


def make_saveat(name: str, times: Array) -> diffrax.SaveAt:
    sub = diffrax.SubSaveAt
    match name:
        case "t1":
            return diffrax.SaveAt(t1=True)
        case "ts":
            return diffrax.SaveAt(ts=times)
        case "t0, ts, t1":
            return diffrax.SaveAt(t0=True, ts=times, t1=True)
        case "steps":
            return diffrax.SaveAt(steps=True)
        case "steps=3":
            return diffrax.SaveAt(t0=True, steps=3, t1=True)
        case "steps, ts":
            return diffrax.SaveAt(steps=2, ts=times)
        case "fn":
            return diffrax.SaveAt(t0=True, ts=times, steps=2, t1=True, fn=first_entry)
        case "subs":
            return diffrax.SaveAt(
                subs={
                    "a": sub(ts=times, fn=first_entry),
                    "b": [sub(t0=True, steps=2), sub(t1=True, ts=times[1:3])],
                }
            )
        case "dense":
            return diffrax.SaveAt(dense=True, ts=times, steps=True)
        case _:
            raise AssertionError


def make_controller(
    name: str, direction: int, dtype: Any
) -> tuple[diffrax.AbstractStepSizeController, bool]:
    """And whether it takes a `dt0`."""
    rtol = 1e-3 if dtype == jnp.float64 else 1e-2
    pid = diffrax.PIDController(rtol=rtol, atol=rtol, pcoeff=0.1, icoeff=0.3, dcoeff=0)
    match name:
        case "constant":
            return diffrax.ConstantStepSize(), True
        case "step to":
            return diffrax.StepTo(
                jnp.linspace(0, 1, 12, dtype=dtype)[::direction] ** 2
            ), False
        case _:
            return make_adaptive(name, pid, dtype)


def make_adaptive(
    name: str, pid: diffrax.PIDController, dtype: Any
) -> tuple[diffrax.AbstractStepSizeController, bool]:
    """Those of adaptive steps."""
    array = lambda *x: jnp.array(x, dtype)
    match name:
        case "PID":
            return pid, True
        case "PID, no dt0":
            return pid, False
        case "clip":
            return diffrax.ClipStepSizeController(
                pid, step_ts=array(0.2, 0.45), store_rejected_steps=20
            ), True
        case "jumps":
            return diffrax.ClipStepSizeController(
                pid, step_ts=array(0.2), jump_ts=array(0.3, 0.5)
            ), True
        case _:
            raise AssertionError


@dataclasses.dataclass(frozen=True)
class Case:
    solver: str = "ReversibleHeun"
    noise: str = "diagonal"
    state: str = "array"
    saveat: str = "t0, ts, t1"
    controller: str = "constant"
    backward: bool = False
    dtype: Any = jnp.float64
    event: str | None = None
    checkpoint_every: int | None = None
    store_all: bool = False
    max_steps: int = 100
    differentiate_ts: bool = False
    differentiate_times: bool = False
    slow: bool = False

    @property
    def is_adaptive(self) -> bool:
        return self.controller not in ("constant", "step to")


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def restructured(case: Case):
    """The system of a case, its state and noise in other structures."""
    noise = "diagonal" if case.noise == "none" else case.noise
    drift, diffusion, y0, args = make_system(noise, case.dtype)
    shape = noise_shapes[noise]
    if case.state == "array":
        return drift, diffusion, y0, args, shape
    if case.state == "scalar":
        assert noise == "scalar"
        as_vector = lambda y: jnp.stack([y, 0.5 * y])
        return (
            lambda t, y, args: jnp.sum(drift(t, as_vector(y), args)),
            lambda t, y, args: jnp.sum(diffusion(t, as_vector(y), args)),
            y0[0],
            args,
            shape,
        )
    assert case.state == "tree" and noise == "general"
    # Each leaf has its own noise, and one leaf is empty.
    to_tree = lambda x, empty: {"a": x[:1], "b": (x[1:], empty)}
    to_vector = lambda y: jnp.concatenate([y["a"], y["b"][0]])
    return (
        lambda t, y, args: to_tree(drift(t, to_vector(y), args), y["b"][1]),
        lambda t, y, args: to_tree(
            diffusion(t, to_vector(y), args), jnp.ones((0, 2), case.dtype)
        ),
        to_tree(y0, jnp.ones(0, case.dtype)),
        args,
        {"a": shape, "b": (shape, (2,))},
    )


def make_loss(case: Case, has_record: bool = False):
    dtype = case.dtype
    drift, diffusion, y0, args, noise_shape = restructured(case)
    to_struct = lambda shape: struct(shape, dtype)
    noise_struct = jtu.tree_map(to_struct, noise_shape, is_leaf=is_shape)
    jumps = case.controller == "jumps"

    def drift_with_jumps(t, y, args):
        size = jnp.where(t < 0.3, 0, jnp.where(t < 0.5, 1.5, -1.0)) if jumps else 0.0
        add = lambda x: x + jnp.asarray(size, dtype) * args["rate"]
        return jtu.tree_map(add, drift(t, y, args))

    t0, t1, dt = (jnp.array(x, dtype) for x in (0, 1, 0.1))
    direction = -1 if case.backward else 1
    levy_area = (
        diffrax.SpaceTimeLevyArea
        if case.solver in with_levy_area
        else diffrax.BrownianIncrement
    )
    # One array, as it is the largest of its entries that errors are relative to.
    step_times = jnp.stack((t1, t0, -dt) if case.backward else (t0, t1, dt))
    times = jnp.array([0.0, 0.05, 0.3, 0.31, 0.31, 0.9, 1.0], dtype)[::direction]
    controller, has_dt0 = make_controller(case.controller, direction, dtype)
    if has_record:
        controller = Recording(controller, case.max_steps)

    if case.event is None:
        event = None
    elif case.event == "boolean":
        event = diffrax.Event(
            lambda t, y, args, **kwargs: jnp.sum(jtu.tree_leaves(y)[0]) > 0.6
        )
    else:
        root_finder = None
        if case.event == "root":
            root_finder = optx.Newton(1e-10, 1e-10, optx.rms_norm)
        event = diffrax.Event(
            lambda t, y, args, **kwargs: (
                jnp.sum(jtu.tree_leaves(y)[0]) - 1.5 * args["rate"]
            ),
            root_finder,
        )

    def loss(
        adjoint,
        params,
        y0,
        args,
        differentiable_times,
        differentiable_steps,
        record=None,
    ):
        """And a record of the steps, for making the same again."""
        drift_scale, new_diffusion = params
        if new_diffusion is None:
            new_diffusion = diffusion
        save_times = differentiable_times if case.differentiate_ts else times
        start, end, dt0 = (
            differentiable_steps if case.differentiate_times else step_times
        )

        def scaled_drift(t, y, args):
            dy = drift_with_jumps(t, y, args)
            return jtu.tree_map(lambda x: drift_scale * x, dy)

        def solve(key, shift, record):
            if case.noise == "none":
                terms = diffrax.ODETerm(scaled_drift)
            else:
                path = (
                    BrownianInterval(
                        t0,
                        t1,
                        noise_struct,
                        key,
                        dt=dt,
                        levy_area=levy_area,
                    )
                    if case.slow or case.solver in with_levy_area
                    else SmoothPath(noise_struct, key)
                )
                terms = make_terms(scaled_drift, new_diffusion, path)
            sol = diffrax.diffeqsolve(
                terms,
                solvers[case.solver],
                start,
                end,
                dt0 if has_dt0 else None,
                jtu.tree_map(lambda y: y + shift, y0),
                args,
                saveat=eqx.tree_at(
                    lambda x: x.controller_state,
                    make_saveat(case.saveat, save_times),
                    has_record,
                ),
                stepsize_controller=controller if record is None else Repeating(record),
                adjoint=adjoint,
                event=event,
                max_steps=case.max_steps,
                throw=False,
            )
            out = sol.ys
            if case.saveat == "dense":
                out = (out, sol.evaluate(save_times[2]), sol.derivative(times[1]))
            # Elsewhere they are constants.
            if case.event == "root" or (case.differentiate_times and case.is_adaptive):
                out = (out, sol.ts)
            if has_record and record is None:
                assert sol.controller_state is not None
                *_, record = sol.controller_state
            return out, record

        shifts = jnp.array([0.0, 0.25], dtype)
        out, record = jax.vmap(solve)(keys(2), shifts, record)
        out = jtu.tree_map(lambda x: jnp.where(jnp.isfinite(x), x, 0), out)
        leaves = [x.astype(jnp.float64).ravel() for x in jtu.tree_leaves(out)]
        x = jnp.concatenate(leaves)
        return jnp.sum(jnp.cos(1 + jnp.arange(x.size)) * (x + x**2)), record

    params = (jnp.ones((), dtype), diffusion if case.state == "array" else None)
    return loss, params, y0, args, times, step_times


def assert_equal_gradients(case: Case):
    """Of an adaptive solve, the reference makes the very steps that `StochasticAdjoint`
    made: see `recorded_steps.py`.
    """
    same_steps = case.is_adaptive and not case.differentiate_times
    loss, *inputs = make_loss(case, has_record=same_steps)

    def value(inputs, adjoint, record=None):
        return loss(adjoint, *inputs, record=record)

    inputs = tuple(inputs)
    adjoint = StochasticAdjoint(case.checkpoint_every, case.store_all)
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(value, has_aux=True))
    (actual_value, record), actual = gradient(inputs, adjoint)
    (expected_value, _), expected = reference_value_and_grad(
        lambda inputs, adjoint: value(inputs, adjoint, record),
        inputs,
        solvers[case.solver],
    )
    assert any(np.any(x != 0) for x in jtu.tree_leaves(expected))
    tol = 1e-9 if case.dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(actual_value, expected_value, rtol=tol)
    # A gradient in one parameter alone may be a small sum of large terms.
    as_vector = lambda grads: eqx.tree_at(
        lambda g: g[2], grads, jnp.stack(jtu.tree_leaves(grads[2]))
    )
    assert relative_error(as_vector(actual), as_vector(expected)) < tol


_for_additive_noise = ("SEA", "SRA1", "ShARK")
_for_odes = ("Tsit5", "Kvaerno3", "ImplicitEuler")
# Each is two programs to compile. Most are slow, as random programs meet them as well.
cases = {
    "f32 replay": Case(
        "Heun", dtype=jnp.float32, saveat="subs", controller="PID", slow=True
    ),
    "store all": Case("Euler", saveat="fn", store_all=True),
    "Euler, few checkpoints": Case("Euler", saveat="t1", checkpoint_every=3, slow=True),
    **{
        f"store all, {s}, {saveat}": Case(
            s,
            noise="none" if s in _for_odes else "diagonal",
            saveat=saveat,
            controller=controller,
            backward=backward,
            store_all=True,
            slow=True,
        )
        for s, saveat, controller, backward in (
            ("ReversibleHeun", "subs", "jumps", False),
            ("Heun", "dense", "clip", True),
            ("Tsit5", "fn", "PID", False),
            ("Kvaerno3", "steps, ts", "PID", False),
            ("SPaRK", "steps=3", "constant", True),
            ("HalfSolver", "ts", "PID", False),
        )
    },
    "times, Heun, clip, steps": Case(
        "Heun",
        noise="none",
        saveat="steps",
        controller="clip",
        backward=True,
        differentiate_times=True,
        slow=True,
    ),
    **{
        name: Case(name, slow=True)
        for name in solvers
        if name not in (*_for_odes, *_for_additive_noise)
    },
    **{
        f"{s}, {state}": Case(s, state=state, noise=noise, slow=True)
        for s in ("ReversibleHeun", "Heun")
        for state, noise in (("scalar", "scalar"), ("tree", "general"))
    },
    **{name: Case(name, noise="additive", slow=True) for name in _for_additive_noise},
    **{name: Case(name, noise="none", slow=True) for name in _for_odes},
    **{
        f"{s}, {x}": Case(s, saveat=x, slow=True)
        for s in ("ReversibleHeun", "Heun")
        for x in ("steps", "steps=3", "steps, ts", "fn", "subs", "dense")
    },
    **{
        f"{s}, {x}, ts": Case(s, saveat=x, differentiate_ts=True, slow=True)
        for s in ("ReversibleHeun", "Heun")
        for x in ("t0, ts, t1", "fn", "subs", "dense")
    },
    **{
        f"{s}, {x}": Case(s, controller=x, slow=True)
        for s in ("ReversibleHeun", "Heun")
        for x in ("step to", "PID", "PID, no dt0", "clip", "jumps")
    },
    **{
        f"{s}, {x} event": Case(
            s,
            event=x,
            noise="none" if x == "root" else "diagonal",
            saveat="steps, ts",
            slow=(s, x) != ("Heun", "root"),
        )
        for s in ("ReversibleHeun", "Heun")
        for x in ("boolean", "float", "root")
    },
    "backward, PID, subs": Case(
        controller="PID", saveat="subs", backward=True, slow=True
    ),
    "backward, jumps, fn": Case(
        "Heun", controller="jumps", saveat="fn", backward=True, slow=True
    ),
    "backward, jumps, reversible": Case(
        controller="jumps", saveat="fn", backward=True, slow=True
    ),
    **{
        f"times, {s}, {controller}, {saveat}": Case(
            s,
            noise="none",
            saveat=saveat,
            controller=controller,
            backward=backward,
            event=event,
            differentiate_times=True,
            slow=True,
        )
        for s, controller, saveat, backward, event in (
            ("ReversibleHeun", "constant", "t0, ts, t1", False, None),
            ("ReversibleHeun", "PID", "dense", True, None),
            ("Tsit5", "PID", "subs", False, None),
            ("Heun", "PID, no dt0", "steps=3", False, None),
            ("ReversibleHeun", "jumps", "fn", False, None),
            ("Kvaerno3", "PID", "t1", False, "root"),
        )
    },
    "checkpoints": Case(checkpoint_every=3, slow=True),
    "checkpoints, replay": Case("Heun", checkpoint_every=3, slow=True),
    "incomplete": Case(max_steps=4, saveat="subs", slow=True),
    "incomplete replay": Case("Heun", max_steps=4, saveat="subs", slow=True),
    "f32": Case(dtype=jnp.float32, saveat="subs", controller="PID", slow=True),
}


# Of what both solvers are tried with, Heun is with the half: it is the solver that
# differs, and not what is saved. And of solvers, those with another like them: Heun,
# ItoMilstein, ShARK and SPaRK.
_long = (
    *(f"Heun, {x}" for x in ("steps", "steps=3", "fn", "dense", "fn, ts", "dense, ts")),
    *(f"Heun, {x}" for x in ("step to", "PID, no dt0", "jumps", "float event")),
    *("ReversibleHeun, fn, ts", "ReversibleHeun, PID, no dt0"),
    "HalfSolver(ReversibleHeun)",
    *("Midpoint", "Ralston", "EulerHeun", "StratonovichMilstein", "SRA1", "SlowRK"),
)


@pytest.mark.parametrize(
    "name", by_default_unless(lambda name: cases[name].slow, cases, long=_long)
)
def test_equals_another_adjoint(name):
    assert_equal_gradients(cases[name])
