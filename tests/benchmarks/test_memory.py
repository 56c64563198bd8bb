"""The temporary memory of a compiled gradient, as a function of the number of steps."""

import jax
import jax.numpy as jnp
import jax.random as jr
import ou
import pytest


_nums_steps = (100, 1_000, 10_000, 100_000)


def _temporary_bytes(loss: ou.Loss, *args) -> int:
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = gradient.lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(), (64,)], ids=str)
def test_growth(shape, dtype, record_row):
    args = (*ou.initial(shape, dtype), jr.key(0))
    ours, checkpointed = (
        [_temporary_bytes(make_loss(num_steps), *args) for num_steps in _nums_steps]
        for make_loss in (ou.ours, ou.checkpointed)
    )
    growths = {}
    for name, sizes in (
        ("StochasticAdjoint", ours),
        ("RecursiveCheckpointAdjoint", checkpointed),
    ):
        growths[name] = (sizes[-1] - sizes[0]) / (_nums_steps[-1] - _nums_steps[0])
        record_row(
            "Temporary memory of the gradient of an OU process, kB",
            {
                "": f"{name}, {jnp.dtype(dtype).name}, shape {shape}",
                **{
                    f"{num_steps} steps": f"{size / 1000:.1f}"
                    for num_steps, size in zip(_nums_steps, sizes, strict=True)
                },
                "growth, bytes a step": f"{growths[name]:.2f}",
            },
        )
    assert growths["StochasticAdjoint"] <= 16
