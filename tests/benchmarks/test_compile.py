"""The time it takes to trace, lower and compile a gradient."""

import time

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import neural_sde
import ou
import pytest


def _compile(loss: ou.Loss, args) -> None:
    jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()


def _ou(solver):
    args = (*ou.initial((64,), jnp.float32), jr.key(0))
    return ou.ours(1000, solver), ou.checkpointed(1000, solver=solver), args


def _neural_sde(vmapped):
    size = neural_sde.Size()
    args = (*neural_sde.initial(size), jr.key(0))
    make_losses = (neural_sde.ours, neural_sde.checkpointed)
    return *(make_loss(size, vmapped) for make_loss in make_losses), args


@pytest.mark.parametrize(
    "name,make",
    {
        "OU process, ReversibleHeun": lambda: _ou(diffrax.ReversibleHeun()),
        "OU process, Heun": lambda: _ou(diffrax.Heun()),
        "OU process, SPaRK": lambda: _ou(diffrax.SPaRK()),
        "neural SDE, batched": lambda: _neural_sde(False),
        "neural SDE, vmapped": lambda: _neural_sde(True),
    }.items(),
)
def test_compile_time(name, make, record_row):
    fastest = {"ours": float("inf"), "checkpointed": float("inf")}
    # The first round also fills the caches of everything that is traced only once.
    for _ in range(4):
        ours, checkpointed, args = make()
        for label, loss in (("ours", ours), ("checkpointed", checkpointed)):
            jax.clear_caches()
            start = time.perf_counter()
            _compile(loss, args)
            fastest[label] = min(fastest[label], time.perf_counter() - start)
    record_row(
        "Time to trace, lower and compile a gradient, s",
        {
            "": name,
            "StochasticAdjoint, BrownianInterval": f"{fastest['ours']:.2f}",
            "RecursiveCheckpointAdjoint, BrownianInterval": (
                f"{fastest['checkpointed']:.2f}"
            ),
        },
    )
    assert fastest["ours"] <= fastest["checkpointed"]
