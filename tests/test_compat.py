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
    "name", ("Args", "BoolScalarLike", "DenseInfo", "RealScalarLike", "Y")
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


def test_control_of_solver():
    asked = []

    class Path(diffrax.AbstractPath):
        t0: float = 0.0
        t1: float = 1.0

        def evaluate(self, t0, t1=None, left=True, use_levy=False):
            if use_levy:
                asked.append(compat.control_of_solver())
            raise ZeroDivisionError

    term = lambda control: diffrax.ControlTerm(lambda t, y, args: y, control)
    terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: y), term(Path()))
    with pytest.raises(ZeroDivisionError):
        diffrax.diffeqsolve(terms, diffrax.SPaRK(), 0.0, 1.0, 0.1, jnp.array(1.0))
    assert asked == [diffrax.AbstractSpaceTimeLevyArea], (
        "diffrax's check of terms, in `_integrate._assert_term_compatible`, no longer "
        "asks for a control in a function `_check` with a variable "
        "`control_type_expected`."
    )
    assert compat.control_of_solver() is None


def test_known_value():
    found = []

    class Adjoint(diffrax.AbstractAdjoint):
        def loop(self, *, t0, t1, dt0, terms, **kwargs):
            found.append(
                [compat.known_value(x) for x in (t0, t1, dt0, terms.direction)]
            )
            raise ZeroDivisionError

    def solve(t0, t1, dt0):
        term = diffrax.ODETerm(lambda t, y, args: y)
        diffrax.diffeqsolve(
            term, diffrax.Euler(), t0, t1, dt0, jnp.array(1.0), adjoint=Adjoint()
        )

    for fn in (solve, lambda *times: jax.jit(lambda: solve(*times))()):
        with pytest.raises(ZeroDivisionError):
            fn(1.0, 0, -0.25)
        with pytest.raises(ZeroDivisionError):
            fn(0.0, jnp.array(1.0), 0.25)
    known, unknown, *_ = found
    assert known == [-1, 0, 0.25, -1], (
        "JAX no longer keeps what a traced array was computed from as its `parent`, "
        "with `in_tracers`, `primitive`, `params` and `outvars`."
    )
    assert unknown[1] is None


def test_unvmap_any():
    fn = lambda x: (x, compat.unvmap_any(x))
    _, out = jax.vmap(fn, out_axes=(0, None))(jnp.array([False, True]))
    assert out.shape == () and out, (
        "equinox's `internal.unvmap_any` is no longer whether any of a batch is true."
    )


def test_direction():
    assert "direction" in {x.name for x in dataclasses.fields(compat.WrapTerm)}, (
        "diffrax's `_term.WrapTerm` no longer has a field `direction`."
    )
