"""The temporary memory of a compiled gradient, as a function of the number of steps."""

import math

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import ou
import pytest

from diffrax_sde_adjoint import ReversibleHeun


_nums_steps = (100, 1_000, 10_000, 100_000)


def _temporary_bytes(loss: ou.Loss, *args) -> int:
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = gradient.lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(), (64,)], ids=str)
@pytest.mark.parametrize("solver", ("ReversibleHeun", "Heun"))
def test_growth(solver, shape, dtype, record_row):
    """Beside the tape, none if steps are undone; if they are made again, that of the
    states that are kept.
    """
    args = (*ou.initial(shape, dtype), jr.key(0))
    solvers = {"ReversibleHeun": ReversibleHeun(), "Heun": diffrax.Heun()}
    ours, checkpointed = (
        [
            _temporary_bytes(make_loss(num_steps, solver=solvers[solver]), *args)
            for num_steps in _nums_steps
        ]
        for make_loss in (ou.ours, ou.checkpointed)
    )
    for name, sizes in (
        ("StochasticAdjoint", ours),
        ("RecursiveCheckpointAdjoint", checkpointed),
    ):
        growth = (sizes[-1] - sizes[0]) / (_nums_steps[-1] - _nums_steps[0])
        record_row(
            f"Temporary memory of the gradient of an OU process, {solver}, kB",
            {
                "": f"{name}, {jnp.dtype(dtype).name}, shape {shape}",
                **{
                    f"{num_steps} steps": f"{size / 1000:.1f}"
                    for num_steps, size in zip(_nums_steps, sizes, strict=True)
                },
                "growth, bytes a step": f"{growth:.2f}",
            },
        )
    state_bytes = jnp.dtype(dtype).itemsize * math.prod(shape)
    for num_steps, size in zip(_nums_steps, ours, strict=True):
        kept = 0 if solver == "ReversibleHeun" else 2 * math.isqrt(num_steps) + 2
        more = size - ours[0]
        assert more <= 16 * (num_steps - _nums_steps[0]) + 1.1 * kept * state_bytes
