"""The picture of the README: time and memory of a gradient against the number of steps.

    python docs/figures/cost.py

draws `docs/assets/cost.png`, and prints its numbers (seconds, then megabytes). It is
the neural SDE of the benchmarks, with a batch of 64. Needs torchsde; takes about two
minutes on two cores.
"""

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
STEPS = (10, 30, 100, 300, 1000)
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


def measure(num_steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each, and the megabytes of temporary memory of JAX's programs."""
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
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    functions[TORCHSDE] = neural_sde.torchsde_gradient(size)
    return interleaved_minima(functions, seconds=2.0), memory


def main():
    results = [measure(num_steps) for num_steps in STEPS]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, style in STYLES.items():
        for ax, values in zip(axes, zip(*results, strict=True), strict=True):
            if name in values[0]:
                line = [value[name] for value in values]
                print(name, *(f"{x:.4f}" for x in line))
                ax.loglog(STEPS, line, label=name, **style)
    axes[0].set(title="Time of a gradient", xlabel="steps", ylabel="s", ylim=(1e-3, 30))
    axes[1].set(title="Its temporary memory", xlabel="steps", ylabel="MB")
    axes[0].legend(frameon=False, fontsize=9)
    fig.savefig(ASSETS / "cost.png", dpi=150)


if __name__ == "__main__":
    main()
