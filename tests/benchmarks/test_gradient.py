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
import neural_sde
import ou
import pytest
from timing import interleaved_minima


_num_steps = 10_000


def _gradients(losses, *args):
    def compiled(loss):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: gradient(*args)

    return {name: compiled(loss) for name, loss in losses.items()}


def test_hand_written_gradients_are_ours():
    # In float64, as then it can be told from an error.
    num_steps = 100
    losses = {
        "ours": ou.ours(num_steps),
        "sweep": hand_written.sweep(num_steps),
        "scan": hand_written.scan(num_steps),
    }
    for shape in ((), (3,)):
        gradients = _gradients(losses, *ou.initial(shape, jnp.float64), jr.key(0))
        expected = gradients["ours"]()
        for name in ("sweep", "scan"):
            for a, b in zip(
                jtu.tree_leaves(gradients[name]()),
                jtu.tree_leaves(expected),
                strict=True,
            ):
                assert jnp.allclose(a, b, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(), (64,)], ids=str)
def test_ou(shape, record_row):
    on_tree = lambda solver: ou.checkpointed(
        _num_steps, ou.virtual_brownian_tree, solver
    )
    losses = {
        "ours": ou.ours(_num_steps),
        "sweep": hand_written.sweep(_num_steps),
        "scan": hand_written.scan(_num_steps),
        "checkpointed": ou.checkpointed(_num_steps),
        "default, Heun": on_tree(diffrax.Heun()),
        "default, ReversibleHeun": on_tree(diffrax.ReversibleHeun()),
    }
    gradients = _gradients(losses, *ou.initial(shape, jnp.float32), jr.key(0))
    # Every step depends on the one before, and its arrays are small: one core.
    times = interleaved_minima(gradients, clock=time.process_time)

    ours = times["ours"]
    default = min(times["default, Heun"], times["default, ReversibleHeun"])
    default_over_ours = default / ours
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
            "diffrax default": microseconds(default),
            "default / ours": f"{default_over_ours:.1f}",
            "ours / sweep": f"{over_sweep:.2f}",
        },
    )
    if shape == ():
        assert default_over_ours >= 40
        assert over_sweep <= 1.5


def test_neural_sde(record_row):
    losses = {
        "ours": neural_sde.ours(),
        "checkpointed": neural_sde.checkpointed(),
        "default, Heun": neural_sde.default(diffrax.Heun()),
        "default, ReversibleHeun": neural_sde.default(diffrax.ReversibleHeun()),
    }
    gradients = _gradients(losses, *neural_sde.initial(), jr.key(0))
    if importlib.util.find_spec("torchsde") is not None:
        gradients["torchsde"] = neural_sde.torchsde_gradient()
    times = interleaved_minima(gradients, rounds=30)

    ours = times["ours"]
    default = min(times["default, Heun"], times["default, ReversibleHeun"])
    row = {
        "StochasticAdjoint, BrownianInterval": ours,
        "RecursiveCheckpointAdjoint, BrownianInterval": times["checkpointed"],
        "diffrax default": default,
    }
    if "torchsde" in times:
        row["torchsde, sdeint_adjoint"] = times["torchsde"]
    record_row(
        f"Gradient of a neural SDE, batch {neural_sde.batch}, "
        f"dimension {neural_sde.dim}, width {neural_sde.width}, "
        f"{neural_sde.num_steps} steps, float32",
        {
            "": "ms",
            **{name: f"{1e3 * t:.0f}" for name, t in row.items()},
            "default / ours": f"{default / ours:.1f}",
        },
    )
