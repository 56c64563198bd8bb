"""The picture of the README: time and memory of a gradient against the number of steps.

    python docs/figures/cost.py

draws `docs/assets/cost.png`, and prints its numbers. It is the neural SDE of the
benchmarks, with a batch of 64. Needs torchsde; takes about five minutes on two cores.
"""

import multiprocessing
import resource
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "benchmarks"))

import diffrax
import jax
import jax.random as jr
import matplotlib.pyplot as plt
import neural_sde
from timing import interleaved_minima

from diffrax_sde_adjoint import ReversibleHeun


ASSETS = Path(__file__).parents[1] / "assets"
STEPS = (10, 30, 100, 300, 1000, 3000)
HEUN = diffrax.Heun()
OURS_HEUN = "ours, Heun"
OURS = "ours, reversible Heun"
DEFAULT = "diffrax's default, Heun"
TORCHSDE = "torchsde, reversible Heun and its adjoint"
STYLES = {
    OURS_HEUN: dict(color="#009E73", marker="^"),
    OURS: dict(color="#0072B2", marker="o"),
    DEFAULT: dict(color="#D55E00", marker="s"),
    TORCHSDE: dict(color="0.45", marker="v"),
}


def size_of(num_steps: int) -> neural_sde.Size:
    return neural_sde.Size(batch=64, num_steps=num_steps)


def torchsde_memory(num_steps: int) -> int:
    """What the peak of a process of its own grows by in a gradient, in bytes."""
    gradient = neural_sde.torchsde_gradient(size_of(2))
    gradient()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    neural_sde.torchsde_gradient(size_of(num_steps))()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def measure(num_steps: int) -> dict[str, tuple[float, float]]:
    """Seconds and bytes of each."""
    size = size_of(num_steps)
    losses = {
        OURS_HEUN: neural_sde.ours(size, False, HEUN),
        OURS: neural_sde.ours(size, False, ReversibleHeun()),
        DEFAULT: neural_sde.default(size, False, HEUN),
    }
    args = (*neural_sde.initial(size), jr.key(0))
    functions, memory = {}, {}
    for name, loss in losses.items():
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
        functions[name] = lambda compiled=compiled: compiled(*args)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    functions[TORCHSDE] = neural_sde.torchsde_gradient(size)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory[TORCHSDE] = pool.apply(torchsde_memory, (num_steps,))
    seconds = interleaved_minima(functions, seconds=2.0)
    return {name: (seconds[name], memory[name]) for name in functions}


def main():
    results = [measure(num_steps) for num_steps in STEPS]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, style in STYLES.items():
        seconds, memory = zip(*(result[name] for result in results), strict=True)
        print(name, *(f"{1e3 * x:.1f} ms" for x in seconds))
        print(name, *(f"{x / 1e6:.2f} MB" for x in memory))
        axes[0].loglog(STEPS, seconds, label=name, **style)
        axes[1].loglog(STEPS, [x / 1e6 for x in memory], **style)
    axes[0].set(title="Time of a gradient", xlabel="steps", ylabel="s")
    axes[1].set(title="Its memory", xlabel="steps", ylabel="MB")
    axes[0].legend(frameon=False, fontsize=9)
    fig.savefig(ASSETS / "cost.png", dpi=150)


if __name__ == "__main__":
    main()
