"""The temporary memory of a compiled gradient, as a function of the number of steps."""

import math

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import ou
import pytest

from diffrax_sde_adjoint import (
    EES25,
    EES27,
    BackwardSDEAdjoint,
    Reversible,
    ReversibleHeun,
    StochasticAdjoint,
)


_nums_steps = (100, 1_000, 10_000, 100_000)


def _temporary_bytes(loss: ou.Loss, *args) -> int:
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = gradient.lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


# Solvers, adjoints, and whether steps are made again.
_exact, _backward = StochasticAdjoint(), BackwardSDEAdjoint()
_ways = {
    "ReversibleHeun": (ReversibleHeun(), _exact, False),
    "Heun": (diffrax.Heun(), _exact, True),
    "EES25": (EES25(), _exact, False),
    "EES27": (EES27(), _exact, False),
    "Reversible(Heun())": (Reversible(diffrax.Heun()), _exact, False),
    "Heun, BackwardSDEAdjoint": (diffrax.Heun(), _backward, False),
    "Euler, BackwardSDEAdjoint": (diffrax.Euler(), _backward, False),
    "SPaRK, BackwardSDEAdjoint": (diffrax.SPaRK(), _backward, False),
}
_cases = [
    *(
        (way, shape, dtype)
        for way in ("ReversibleHeun", "Heun")
        for shape in ((), (64,))
        for dtype in (jnp.float32, jnp.float64)
    ),
    *((way, (), jnp.float32) for way in list(_ways)[2:]),
]


@pytest.mark.parametrize("way,shape,dtype", _cases)
def test_growth(way, shape, dtype, record_row):
    """Beside the tape, none if steps are undone, or for the backward SDE; if they are
    made again, that of the states that are kept.
    """
    args = (*ou.initial(shape, dtype), jr.key(0))
    solver, adjoint, is_replayed = _ways[way]
    sizes = lambda make_loss: [
        _temporary_bytes(make_loss(num_steps), *args) for num_steps in _nums_steps
    ]
    ours = sizes(lambda num_steps: ou.ours(num_steps, solver, adjoint))
    checkpointed = sizes(lambda num_steps: ou.checkpointed(num_steps, solver=solver))
    for name, sizes in (
        ("StochasticAdjoint", ours),
        ("RecursiveCheckpointAdjoint", checkpointed),
    ):
        growth = (sizes[-1] - sizes[0]) / (_nums_steps[-1] - _nums_steps[0])
        record_row(
            f"Temporary memory of the gradient of an OU process, {way}, kB",
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
        kept = 2 * math.isqrt(num_steps) + 2 if is_replayed else 0
        more = size - ours[0]
        assert more <= 16 * (num_steps - _nums_steps[0]) + 1.1 * kept * state_bytes
