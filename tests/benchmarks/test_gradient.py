"""The cost of a gradient, per step or per solve.

`StochasticAdjoint` on a `BrownianInterval` is compared with diffrax's default, which is
`RecursiveCheckpointAdjoint` on a `VirtualBrownianTree`, and with what could be done by
hand.
"""

import importlib.util
import time

import diffrax
import hand_written
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import neural_sde
import optimistix as optx
import ou
import pytest
from ou import number
from timing import interleaved_minima

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


_num_steps = 10_000


def _gradients(losses, *args):
    def compiled(loss):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: gradient(*args)

    return {name: compiled(loss) for name, loss in losses.items()}


# As then rounding can be told from an error.
@pytest.mark.float64
def test_hand_written_gradients_are_ours():
    num_steps = 100
    for by_hand, solver in (
        (hand_written.sweep, ReversibleHeun()),
        (hand_written.scan, ReversibleHeun()),
        (hand_written.nested_scans, diffrax.Heun()),
    ):
        losses = {
            "ours": ou.ours(num_steps, solver),
            "by hand": by_hand(ou.model, num_steps),
        }
        for shape in ((), (3,)):
            gradients = _gradients(losses, *ou.initial(shape, jnp.float64), jr.key(0))
            for a, b in zip(
                jtu.tree_leaves(gradients["ours"]()),
                jtu.tree_leaves(gradients["by hand"]()),
                strict=True,
            ):
                assert jnp.allclose(a, b, rtol=1e-10, atol=0)


_shapes = pytest.mark.parametrize("shape", [(), (64,)], ids=str)


def _default(solvers, path=ou.virtual_brownian_tree):
    return {
        f"default, {type(solver).__name__}": ou.checkpointed(_num_steps, path, solver)
        for solver in solvers
    }


def _fastest_default(times):
    return min(time for name, time in times.items() if name.startswith("default"))


@_shapes
def test_ou(shape, record_row):
    losses = {
        "ours": ou.ours(_num_steps),
        "sweep": hand_written.sweep(ou.model, _num_steps),
        "scan": hand_written.scan(ou.model, _num_steps),
        "checkpointed": ou.checkpointed(_num_steps),
        **_default([diffrax.Heun(), diffrax.ReversibleHeun()]),
    }
    gradients = _gradients(losses, *ou.initial(shape, jnp.float32), jr.key(0))
    # Every step depends on the one before, and its arrays are small: one core.
    times = interleaved_minima(gradients, clock=time.process_time)

    ours = times["ours"]
    default_over_ours = _fastest_default(times) / ours
    over_sweep = ours / times["sweep"]
    microseconds = lambda t: f"{1e6 * t / _num_steps:.2f}"
    record_row(
        f"Gradient of an OU process, {_num_steps} steps, float32, µs a step",
        {
            "shape": str(shape),
            "StochasticAdjoint, BrownianInterval": microseconds(ours),
            "by hand: sweep": microseconds(times["sweep"]),
            "by hand: autodiff of a scan": microseconds(times["scan"]),
            "RecursiveCheckpointAdjoint, BrownianInterval": microseconds(
                times["checkpointed"]
            ),
            "diffrax default": microseconds(_fastest_default(times)),
            "default / ours": f"{default_over_ours:.1f}",
            "ours / sweep": f"{over_sweep:.2f}",
        },
    )
    assert default_over_ours >= 40
    assert over_sweep <= 1.5


@pytest.mark.parametrize("solver", ("Heun", "Euler", "SPaRK"))
@_shapes
def test_replay(shape, solver, record_row):
    """Solvers whose steps cannot be undone."""
    solver = getattr(diffrax, solver)()
    losses = {
        "ours": ou.ours(_num_steps, solver),
        "checkpointed": ou.checkpointed(_num_steps, ou.brownian_interval, solver),
        **_default([solver]),
    }
    if type(solver) is diffrax.Heun:
        losses["by hand"] = hand_written.nested_scans(ou.model, _num_steps)
    gradients = _gradients(losses, *ou.initial(shape, jnp.float32), jr.key(0))
    times = interleaved_minima(gradients, clock=time.process_time)

    ours = times["ours"]
    default_over_ours = _fastest_default(times) / ours
    microseconds = lambda t: f"{1e6 * t / _num_steps:.2f}"
    row = {
        "solver": f"{type(solver).__name__}, {shape}",
        "StochasticAdjoint, BrownianInterval": microseconds(ours),
        "by hand: nested scans": "",
        "RecursiveCheckpointAdjoint, BrownianInterval": microseconds(
            times["checkpointed"]
        ),
        "diffrax default": microseconds(_fastest_default(times)),
        "default / ours": f"{default_over_ours:.1f}",
        "ours / nested scans": "",
    }
    if "by hand" in times:
        row["by hand: nested scans"] = microseconds(times["by hand"])
        row["ours / nested scans"] = f"{ours / times['by hand']:.2f}"
    record_row(
        f"Gradient of an OU process by making steps again, {_num_steps} steps, "
        "float32, µs a step",
        row,
    )
    assert default_over_ours >= 25
    if "by hand" in times:
        assert ours <= 1.5 * times["by hand"]


_small = neural_sde.Size()
_large = neural_sde.Size(batch=1024, width=256)


@pytest.mark.parametrize("vmapped", (False, True), ids=("batched", "vmapped"))
@pytest.mark.parametrize("size", (_small, _large), ids=("small", "large"))
def test_neural_sde(size, vmapped, record_row):
    losses = {
        "ours": neural_sde.ours(size, vmapped),
        "sweep": hand_written.sweep(neural_sde.batched, size.num_steps),
        "checkpointed": neural_sde.checkpointed(size, vmapped),
        **{
            f"default, {type(solver).__name__}": neural_sde.default(
                size, vmapped, solver
            )
            for solver in (diffrax.Heun(), diffrax.ReversibleHeun())
        },
    }
    gradients = _gradients(losses, *neural_sde.initial(size), jr.key(0))
    has_torchsde = importlib.util.find_spec("torchsde") is not None
    if has_torchsde and size == _small and not vmapped:
        gradients["torchsde"] = neural_sde.torchsde_gradient(size)
    times = interleaved_minima(gradients, rounds=30)

    ours = times["ours"]
    default = _fastest_default(times)
    milliseconds = lambda name: f"{1e3 * times[name]:.0f}" if name in times else ""
    record_row(
        f"Gradient of a neural SDE, dimension {size.dim}, {size.num_steps} steps, "
        "float32, ms",
        {
            "batch": f"{size.batch}{', vmapped' if vmapped else ''}",
            "width": f"{size.width}",
            "StochasticAdjoint, BrownianInterval": milliseconds("ours"),
            "by hand: sweep": milliseconds("sweep"),
            "RecursiveCheckpointAdjoint, BrownianInterval": milliseconds(
                "checkpointed"
            ),
            "diffrax default": f"{1e3 * default:.0f}",
            "torchsde, sdeint_adjoint": milliseconds("torchsde"),
            "default / ours": f"{default / ours:.1f}",
            "ours / sweep": f"{ours / times['sweep']:.2f}",
        },
    )
    assert default >= (7 if size == _small else 5) * ours
    assert ours <= (1.5 if vmapped else 1.2) * times["sweep"]
    if "torchsde" in times:
        assert times["torchsde"] >= 4 * ours


@pytest.mark.parametrize("vmapped", (False, True), ids=("batched", "vmapped"))
@pytest.mark.parametrize("size", (_small, _large), ids=("small", "large"))
def test_kept_or_made_again(size, vmapped, record_row):
    """A solver whose steps cannot be undone, and the limits of both ways."""
    solver = diffrax.Heun()
    losses = {
        "replayed": neural_sde.ours(size, vmapped, solver),
        "nested scans": hand_written.nested_scans(neural_sde.batched, size.num_steps),
        "store_all": neural_sde.ours(size, vmapped, solver, store_all=True),
        "scan": hand_written.scan_of_heun(neural_sde.batched, size.num_steps),
    }
    gradients = _gradients(losses, *neural_sde.initial(size), jr.key(0))
    times = interleaved_minima(gradients, rounds=30)
    milliseconds = lambda name: f"{1e3 * times[name]:.0f}"
    of_scan = times["scan"] / times["store_all"]
    of_nested_scans = times["nested scans"] / times["replayed"]
    record_row(
        "Gradient of a neural SDE by keeping steps or making them again, Heun, "
        f"dimension {size.dim}, {size.num_steps} steps, float32, ms",
        {
            "batch": f"{size.batch}{', vmapped' if vmapped else ''}",
            "width": f"{size.width}",
            "StochasticAdjoint": milliseconds("replayed"),
            "by hand: nested scans": milliseconds("nested scans"),
            "StochasticAdjoint(store_all=True)": milliseconds("store_all"),
            "by hand: scan": milliseconds("scan"),
            "nested scans / ours": f"{of_nested_scans:.2f}",
            "scan / ours": f"{of_scan:.2f}",
        },
    )
    assert of_nested_scans >= 0.95
    assert of_scan >= 0.9


_newton = optx.Newton(1e-4, 1e-4)
_solvers = {
    "Euler": diffrax.Euler(),
    "EulerHeun": diffrax.EulerHeun(),
    "Heun": diffrax.Heun(),
    "Midpoint": diffrax.Midpoint(),
    "ReversibleHeun": ReversibleHeun(),
    "ItoMilstein": diffrax.ItoMilstein(),
    "SPaRK": diffrax.SPaRK(),
    "SlowRK": diffrax.SlowRK(),
    "Tsit5": diffrax.Tsit5(),
    "Dopri8": diffrax.Dopri8(),
    "ImplicitEuler": diffrax.ImplicitEuler(root_finder=_newton),
    "Kvaerno3": diffrax.Kvaerno3(root_finder=_newton),
    "Kvaerno5": diffrax.Kvaerno5(root_finder=_newton),
    "KenCarp3": diffrax.KenCarp3(root_finder=_newton),
    "Sil3": diffrax.Sil3(root_finder=_newton),
}


_split = ("KenCarp3", "Sil3")
_of_odes = ("Tsit5", "Dopri8", "ImplicitEuler", "Kvaerno3", "Kvaerno5", *_split)
# A step of these has derivatives of the vector field in the state, and so is not made
# of all states in one; and ODEs are by `vmap` too.
_of_one = ("ItoMilstein", *_of_odes)


@pytest.mark.parametrize(
    "name,vmapped",
    [(x, b) for x in _solvers for b in (False, True) if b or x not in _of_one],
)
def test_kept_by_every_solver(name, vmapped, record_row):
    """Against a scan of the very steps, on the same path."""
    solver = _solvers[name]
    is_split, is_ode = name in _split, name in _of_odes
    size = neural_sde.Size(batch=64, dim=4) if name in _of_one else neural_sde.Size()
    model = neural_sde.single if vmapped else neural_sde.batched
    shape = (size.dim,) if vmapped else (size.batch, size.dim)

    t0, t1, dt = (number(x, jnp.float32) for x in (0, 1, size.dt))

    def make_terms(key):
        drift = diffrax.ODETerm(model.drift)
        if is_split:
            return diffrax.MultiTerm(drift, diffrax.ODETerm(model.diffusion))
        if is_ode:
            return drift
        path = BrownianInterval(
            t0,
            t1,
            jax.ShapeDtypeStruct(shape, jnp.float32),
            key,
            dt=dt,
            levy_area=diffrax.SpaceTimeLevyArea,
        )
        diffusion = lambda *args: lx.DiagonalLinearOperator(model.diffusion(*args))
        return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))

    def ours(params, y0, key):
        sol = diffrax.diffeqsolve(
            make_terms(key),
            solver,
            t0,
            t1,
            dt,
            y0,
            params,
            adjoint=StochasticAdjoint(store_all=True),
            max_steps=size.num_steps,
        )
        assert sol.ys is not None
        return jnp.mean(sol.ys[-1] ** 2)

    def of_batch(loss):
        if not vmapped:
            return loss
        return lambda *args: jnp.mean(jax.vmap(loss, (None, 0, None))(*args))

    by_hand = hand_written.scan_of_steps(solver, make_terms, size.num_steps)
    losses = {"ours": of_batch(ours), "scan": of_batch(by_hand)}
    gradients = _gradients(losses, *neural_sde.initial(size), jr.key(0))
    for actual, expected in zip(
        *(jtu.tree_leaves(gradients[x]()) for x in losses), strict=True
    ):
        size_of_leaf = jnp.max(jnp.abs(expected))
        assert jnp.max(jnp.abs(actual - expected)) <= 1e-3 * size_of_leaf
    times = interleaved_minima(gradients, rounds=30)
    record_row(
        "Gradient by keeping steps, of every solver: a neural SDE or ODE, "
        f"width {size.width}, {size.num_steps} steps, float32, ms",
        {
            "solver": name,
            "batch": f"{size.batch}{', vmapped' if vmapped else ''}",
            "dimension": f"{size.dim}",
            "StochasticAdjoint(store_all=True)": f"{1e3 * times['ours']:.1f}",
            "by hand: scan of its steps": f"{1e3 * times['scan']:.1f}",
            "ours / scan": f"{times['ours'] / times['scan']:.2f}",
        },
    )
    assert times["ours"] <= 1.1 * times["scan"]
