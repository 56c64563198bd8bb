"""What is assumed of the private parts of diffrax and equinox.

Each test says in one sentence what has changed, if it fails.
"""

import dataclasses
import inspect

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import diffrax_sde_adjoint._compat as compat


def names(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "name", ("Args", "BoolScalarLike", "DenseInfo", "RealScalarLike", "VF", "Y")
)
def test_annotations(name):
    step = diffrax.AbstractSolver.step.__annotations__
    used = str([*step.values(), *diffrax.AbstractSolver.func.__annotations__.values()])
    assert str(getattr(compat, name)) in used, (
        f"diffrax no longer annotates its solvers with `_custom_types.{name}`."
    )


def test_is_unsafe_sde():
    unsafe = diffrax.UnsafeBrownianPath((), jr.key(0))
    safe = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jr.key(0))
    term = lambda path: diffrax.ControlTerm(lambda t, y, args: y, path)
    ode = diffrax.ODETerm(lambda t, y, args: y)
    found = [
        compat.is_unsafe_sde(diffrax.MultiTerm(ode, term(path)))
        for path in (unsafe, safe)
    ]
    assert found == [True, False], (
        "diffrax's `_heuristics.is_unsafe_sde` no longer finds `UnsafeBrownianPath`s."
    )


def test_is_sde():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jr.key(0))
    ode = diffrax.ODETerm(lambda t, y, args: y)
    sde = diffrax.ControlTerm(lambda t, y, args: y, path)
    assert [compat.is_sde(x) for x in (ode, sde)] == [False, True], (
        "diffrax's `_heuristics.is_sde` no longer finds Brownian paths."
    )


def test_state():
    fields = {field.name for field in dataclasses.fields(compat.State)}
    needed = {
        "y",
        "tprev",
        "tnext",
        "made_jump",
        "solver_state",
        "controller_state",
        "save_state",
        "num_steps",
        "num_accepted_steps",
        "dense_ts",
        "dense_infos",
        "dense_save_index",
        "event_tprev",
        "event_tnext",
        "event_dense_info",
    }
    assert needed <= fields, (
        f"diffrax's `_integrate.State` no longer has {needed - fields}."
    )


def test_save_state():
    fields = {field.name for field in dataclasses.fields(compat.SaveState)}
    needed = {"saveat_ts_index", "ts", "ys", "save_index"}
    assert needed <= fields, (
        f"diffrax's `_integrate.SaveState` no longer has {needed - fields}."
    )


def test_prevbefore():
    x = compat.prevbefore(jnp.array(1.0))
    assert x == jnp.nextafter(1.0, -jnp.inf), (
        "equinox's `internal.prevbefore` is no longer the number just below."
    )


def test_loop():
    """The adjoint gets, and passes on, all arguments of the integration loop."""
    got = {}

    class Adjoint(diffrax.AbstractAdjoint):
        def loop(self, **kwargs):
            got.update(kwargs)
            return diffrax.RecursiveCheckpointAdjoint().loop(**kwargs)

    diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: y),
        diffrax.Heun(),
        0.0,
        1.0,
        0.1,
        1.0,
        adjoint=Adjoint(),
    )
    of_loop = names(Adjoint()._loop) - {"inner_while_loop", "outer_while_loop"}
    of_adjoint = {"throw", "passed_solver_state", "passed_controller_state"}
    assert set(got) == of_loop | of_adjoint, (
        "diffrax's `AbstractAdjoint.loop` is called with other arguments than before: "
        f"{set(got) ^ (of_loop | of_adjoint)}."
    )
    assert isinstance(got["init_state"], compat.State), (
        "diffrax's integration loop no longer starts from an `_integrate.State`."
    )
    assert got["init_state"].made_jump is False, (
        "diffrax no longer starts a solve with a `made_jump` that is known to be False."
    )
    assert isinstance(got["init_state"].save_state, compat.SaveState), (
        "diffrax's integration loop no longer keeps what it saves in a `SaveState`."
    )


def test_wrap_term():
    ode = diffrax.ODETerm(lambda t, y, args: y)
    assert compat.WrapTerm(ode, 1).term is ode, (
        "diffrax's `_term.WrapTerm` no longer holds a `term`."
    )


def test_save_y():
    assert diffrax.SubSaveAt(t1=True).fn is compat.save_y, (
        "diffrax's `_saveat.save_y` is no longer the default of `SaveAt(fn=...)`."
    )


def test_while_loop():
    assert {"max_steps", "buffers", "kind"} <= names(compat.while_loop), (
        "equinox's `internal.while_loop` has lost one of the arguments that we pass."
    )
    total = compat.while_loop(
        lambda x: x < 10, lambda x: x + 3, jnp.array(0), kind="lax"
    )
    assert total == 12, "equinox's `internal.while_loop(kind='lax')` does not loop."


def test_nondifferentiable():
    for function, message in (
        (compat.nondifferentiable, "`nondifferentiable`"),
        (compat.nondifferentiable_backward, "`nondifferentiable_backward`"),
    ):
        with pytest.raises(RuntimeError, match="the name"):
            jax.grad(lambda x, f=function: f(x, name="the name"))(1.0)
            pytest.fail(f"equinox's {message} no longer raises.")
