"""The cost of a gradient on an accelerator, where there is one.

There a small step is a matter of how many kernels it starts, and of how often the host
is asked whether to go on.
"""

import collections
import glob
import gzip
import importlib.util
import json
import time

import diffrax
import hand_written
import jax
import jax.random as jr
import kuramoto
import neural_sde
import pytest

from diffrax_sde_adjoint import EES25, ReversibleHeun, StochasticAdjoint


pytestmark = pytest.mark.skipif(
    jax.default_backend() == "cpu", reason="there is no accelerator"
)


def _fastest(function, seconds: float = 2.0) -> float:
    """In seconds, of at most ten runs; the first one is not counted."""
    jax.block_until_ready(function())
    runs = []
    while len(runs) < 10 and (len(runs) == 0 or sum(runs) < seconds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        runs.append(time.perf_counter() - start)
    return min(runs)


def _kernels(function, folder) -> tuple[int, int, float]:
    """How many kernels a run starts, how often it copies something to the host, and for
    which part of the time the accelerator is busy.
    """
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(function())
    (file,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(file) as lines:
        events = json.load(lines)["traceEvents"]
    threads = {
        (x["pid"], x["tid"]): x["args"]["name"]
        for x in events
        if x.get("name") == "thread_name"
    }
    number, busy, times = collections.Counter(), 0.0, []
    for x in events:
        thread = threads.get((x.get("pid"), x.get("tid")), "")
        if x.get("ph") == "X" and thread.startswith("Stream"):
            is_copy = x["name"].startswith("Memcpy")
            number[x["name"] if is_copy else "kernel"] += 1
            busy += x["dur"]
            times += [x["ts"], x["ts"] + x["dur"]]
    return number["kernel"], number["MemcpyD2H"], busy / (max(times) - min(times))


def _row(loss, args, num_steps, folder=None) -> dict[str, str]:
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
    memory = program.memory_analysis()
    seconds = _fastest(lambda: program(*args))
    row = {
        "ms": f"{1e3 * seconds:.1f}",
        "us a step": f"{1e6 * seconds / num_steps:.1f}",
        "memory, MB": f"{memory.temp_size_in_bytes / 1e6:.1f}",
    }
    if folder is not None:
        kernels, copies, busy = _kernels(lambda: program(*args), folder)
        row["kernels a step"] = f"{kernels / num_steps:.1f}"
        row["copies to the host a step"] = f"{copies / num_steps:.2f}"
        row["busy"] = f"{100 * busy:.0f}%"
    return row


_exact = StochasticAdjoint()


@pytest.mark.parametrize(
    "batch,num_steps",
    ((64, 100), (4096, 100), (65536, 100), (64, 10_000), (4096, 10_000)),
)
def test_neural_sde(batch, num_steps, record_row, tmp_path):
    size = neural_sde.Size(batch=batch, num_steps=num_steps)
    args = (*neural_sde.initial(size), jr.key(0))
    ours = lambda *args, **kwargs: neural_sde.ours(size, False, *args, **kwargs)
    losses = {
        "reversible Heun": ours(),
        "reversible Heun, by hand": hand_written.sweep(neural_sde.batched, num_steps),
    }
    if num_steps == 100:
        checkpointed = neural_sde.checkpointed(size, False)
        losses["reversible Heun, `store_all`"] = ours(store_all=True)
        losses["Heun, made again"] = ours(diffrax.Heun())
        losses["`RecursiveCheckpointAdjoint`"] = checkpointed
    if (batch, num_steps) == (4096, 100):
        losses["default"] = neural_sde.default(size, False, diffrax.Heun())
    title = f"Neural SDE, batch {batch}, {num_steps} steps"
    for name, loss in losses.items():
        folder = tmp_path / name[-9:] if num_steps == 100 else None
        record_row(title, {"": name, **_row(loss, args, num_steps, folder)})
    if importlib.util.find_spec("torchsde") and num_steps == 100:
        import torch

        gradient = neural_sde.torchsde_gradient(size, device="cuda")

        def run():
            gradient()
            torch.cuda.synchronize()

        seconds = _fastest(run)
        peak = torch.cuda.max_memory_allocated()
        row = {
            "": "torchsde, adjoint",
            "ms": f"{1e3 * seconds:.1f}",
            "us a step": f"{1e6 * seconds / num_steps:.1f}",
            "memory, MB": f"{peak / 1e6:.1f}",
        }
        record_row(title, row)


@pytest.mark.parametrize("num_steps", (50, 10_000))
def test_kuramoto(num_steps, record_row):
    """A thousand oscillators, 64 times."""
    args = (*kuramoto.initial(64, 1000), jr.key(0))
    checkpointed = diffrax.RecursiveCheckpointAdjoint()
    ways = {
        "reversible Heun": (ReversibleHeun(), _exact),
        "EES25": (EES25(), _exact),
        "Heun, made again": (diffrax.Heun(), _exact),
        "Heun, `RecursiveCheckpointAdjoint`": (diffrax.Heun(), checkpointed),
    }
    if num_steps > 1000:
        ways = {x: ways[x] for x in ("reversible Heun", "Heun, made again")}
    for name, (solver, adjoint) in ways.items():
        loss = kuramoto.diffrax_loss(num_steps, solver, adjoint)
        row = {"": name, **_row(loss, args, num_steps)}
        record_row(f"1 000 oscillators, 64 times, {num_steps} steps", row)
