"""The temporary memory of a compiled gradient, as a function of the number of steps."""

import math

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import ou
import pytest

from diffrax_sde_adjoint import EES25, EES27, BackwardSDE, Reversible, ReversibleHeun


_nums_steps = (100, 1_000, 10_000, 100_000)


def _temporary_bytes(loss: ou.Loss, *args) -> int:
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = gradient.lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


# Solvers, what is passed to the adjoint, and whether steps are made again.
_backward = dict(backward=BackwardSDE())
_ways = {
    "ReversibleHeun": (ReversibleHeun(), {}, False),
    "Heun": (diffrax.Heun(), {}, True),
    "EES25": (EES25(), {}, False),
    "EES27": (EES27(), {}, False),
    "Reversible(Heun())": (Reversible(diffrax.Heun()), {}, False),
    "Heun, BackwardSDE": (diffrax.Heun(), _backward, False),
    "Euler, BackwardSDE": (diffrax.Euler(), _backward, False),
    "SPaRK, BackwardSDE": (diffrax.SPaRK(), _backward, False),
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
    solver, kwargs, is_replayed = _ways[way]
    sizes = lambda make_loss: [
        _temporary_bytes(make_loss(num_steps), *args) for num_steps in _nums_steps
    ]
    ours = sizes(lambda num_steps: ou.ours(num_steps, solver, **kwargs))
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
