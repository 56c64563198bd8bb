"""The figures of `docs/how_it_works/stochastic_adjoint.md`, and numbers of its limits.

    python docs/figures/stochastic_adjoint.py

draws `docs/assets/stochastic_adjoint_sweep.png`, the three things that a sweep does at
a step, and `docs/assets/stochastic_adjoint_limits.png`, errors of gradients of
contracting dynamics against the length of the solve; and prints what each remedy costs.
This takes about two minutes on two cores, which should be idle.
"""

import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


ASSETS = Path(__file__).parent.parent / "assets"
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "0.45"

# dy = -RATE y dt + 0.5 dW
RATE, STEP = 5.0, 0.01
HORIZONS = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
PATHS = 64
NUM_STEPS = 10_000  # of the solve whose cost is measured

# From a name to a solver and the adjoint's arguments.
WAYS = {
    "ReversibleHeun": (ReversibleHeun(), {}),
    "ReversibleHeun, checkpoint_every=50": (
        ReversibleHeun(),
        dict(checkpoint_every=50),
    ),
    "ReversibleHeun, checkpoint_every=10": (
        ReversibleHeun(),
        dict(checkpoint_every=10),
    ),
    "Heun": (diffrax.Heun(), {}),
}


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    print_costs()
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        draw_sweep(ASSETS / "stochastic_adjoint_sweep.png")
        draw_limits(ASSETS / "stochastic_adjoint_limits.png")


def loss(params, key, horizon, step, max_steps, solver, adjoint):
    """The mean square of the state at five times of the last quarter of the solve."""
    rate, scale = params
    dtype = horizon.dtype
    number = lambda x: jnp.asarray(x, dtype)
    struct = jax.ShapeDtypeStruct((), dtype)
    path = BrownianInterval(number(0), horizon, struct, key, dt=step)
    sol = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -rate * y),
            diffrax.ControlTerm(lambda t, y, args: scale, path),
        ),
        solver,
        number(0),
        horizon,
        step,
        number(1),
        saveat=diffrax.SaveAt(ts=horizon * jnp.linspace(0.75, 1, 5, dtype=dtype)),
        adjoint=adjoint,
        max_steps=max_steps,
        throw=False,
    )
    assert sol.ys is not None
    return jnp.mean(sol.ys**2)


def make_gradients(dtype, solver, adjoint):
    """From a horizon to the gradient for each path."""

    @jax.jit
    def gradients(horizon):
        params = jnp.asarray([RATE, 0.5], dtype)
        step = jnp.asarray(STEP, dtype)
        max_steps = round(max(HORIZONS) / STEP) + 10
        gradient = lambda key: jax.grad(loss)(
            params, key, horizon, step, max_steps, solver, adjoint
        )
        return jax.vmap(gradient)(jr.split(jr.key(0), PATHS))

    return lambda horizon: np.asarray(gradients(jnp.asarray(horizon, dtype)), float)


def draw_limits(out: Path) -> None:
    """What the solver does to the gradient, and what undoing its steps does."""
    fig, axes = plt.subplots(
        1, 3, figsize=(10.2, 3.9), sharex=True, layout="constrained"
    )
    checkpointing = diffrax.RecursiveCheckpointAdjoint()
    # Noise differs between dtypes.
    exact = {
        (type(solver).__name__, dtype): list(
            map(make_gradients(dtype, solver, checkpointing), HORIZONS)
        )
        for solver in (ReversibleHeun(), diffrax.Heun())
        for dtype in (jnp.float64, jnp.float32)
    }
    error = lambda a, b: np.mean(np.abs(a - b)) / np.mean(np.abs(b))
    axes[0].semilogy(
        RATE * np.array(HORIZONS),
        list(
            map(
                error,
                exact["ReversibleHeun", jnp.float64],
                exact["Heun", jnp.float64],
            )
        ),
        "o-",
        color=ORANGE,
        ms=4,
    )
    axes[0].set_title("the solver:\nReversibleHeun against Heun", fontsize=10)
    axes[0].set_ylabel("relative difference of gradients")
    for ax, dtype in zip(axes[1:], (jnp.float64, jnp.float32), strict=True):
        draw_ways(ax, dtype, exact, error)
    for ax in axes:
        ax.set_xlabel(r"$\lambda T$")
    handles = axes[1].get_legend_handles_labels()
    fig.legend(*handles, fontsize=9, frameon=False, loc="outside lower center", ncols=4)
    save(fig, out)


def draw_ways(ax: Axes, dtype, exact, error) -> None:
    colours = (ORANGE, GREEN, BLUE, GREY)
    for (name, (solver, options)), colour in zip(WAYS.items(), colours, strict=True):
        gradients = make_gradients(dtype, solver, StochasticAdjoint(**options))
        references = exact[type(solver).__name__, dtype]
        errors = [
            error(gradients(horizon), reference)
            for horizon, reference in zip(HORIZONS, references, strict=True)
        ]
        print(jnp.dtype(dtype).name, name, " ".join(f"{x:.1e}" for x in errors))
        ax.semilogy(
            RATE * np.array(HORIZONS), errors, "o-", ms=4, color=colour, label=name
        )
        # Elsewhere, at least one path raises.
        raises = [x for x, y in zip(HORIZONS, errors, strict=True) if np.isnan(y)]
        if raises:
            ax.axvline(RATE * raises[0], color=colour, lw=0.8, ls=":")
    ax.set_title(
        f"undoing steps, {jnp.dtype(dtype).name}:\nerror of the gradient", fontsize=10
    )


def print_costs() -> None:
    print(f"OU process, {NUM_STEPS} steps, float32: µs a step, temporary memory in kB")
    for name, (solver, options) in {
        **WAYS,
        "ReversibleHeun, float64": (ReversibleHeun(), {}),
    }.items():
        dtype = jnp.float64 if name.endswith("float64") else jnp.float32
        params = jnp.asarray([0.7, 0.5], dtype)
        adjoint = StochasticAdjoint(**options)
        one = jnp.asarray(1, dtype)
        step = jnp.asarray(1 / NUM_STEPS, dtype)
        gradient = jax.jit(
            lambda params, key, one, step=step, solver=solver, adjoint=adjoint: (
                jax.grad(loss)(params, key, one, step, NUM_STEPS, solver, adjoint)
            )
        )
        program = gradient.lower(params, jr.key(0), one).compile()
        times = []
        for _ in range(20):
            start = time.process_time()
            jax.block_until_ready(program(params, jr.key(0), one))
            times.append(time.process_time() - start)
        memory = program.memory_analysis()
        assert memory is not None
        kilobytes = memory.temp_size_in_bytes / 1000
        print(f"{name}: {1e6 * min(times) / NUM_STEPS:.2f}, {kilobytes:.0f}")


def draw_sweep(out: Path) -> None:
    """A solve from left to right, and a step of the sweep from right to left."""
    fig, ax = plt.subplots(figsize=(7.2, 3.5), layout="constrained")
    times = np.array([0.0, 1.1, 2.0, 3.2, 4.0, 5.1])
    ys = np.array([0.2, 0.62, 0.42, 0.86, 0.66, 1.0])
    ax.plot(times, ys, "o-", color=GREY, lw=1, ms=5)
    for i in range(len(times)):
        ax.text(times[i], -0.38, f"$t_{i}$", ha="center", color=GREY)
        ax.plot([times[i]] * 2, [-0.3, -0.24], color=GREY, lw=1)
    ax.plot(times[[0, -1]], [-0.27] * 2, color=GREY, lw=1)
    ax.text(5.35, -0.27, "the tape", color=GREY, va="center", fontsize=9)
    ax.text(5.35, 1.0, "the solve", color=GREY, va="center", fontsize=9)

    left, right = 2, 3
    arrow = lambda a, b, colour, bend: ax.add_patch(
        FancyArrowPatch(
            a,
            b,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=13,
            color=colour,
            lw=1.6,
            shrinkA=5,
            shrinkB=5,
        )
    )
    ax.plot(times[[left, right]], ys[[left, right]], "o", color=ORANGE, ms=7)
    arrow((times[right], ys[right]), (times[left], ys[left]), ORANGE, 0.45)
    ax.text(
        2.1, 0.98, "1. undo the step\n(or make it again)", color=ORANGE, ha="center"
    )

    saved = 2.65
    value = np.interp(saved, times, ys)
    ax.plot([saved], [value], "D", color=GREEN, ms=6)
    ax.text(3.05, 0.36, "2. add what the loss passes to\nsaved outputs", color=GREEN)
    ax.plot([saved, 3.02], [value - 0.03, 0.47], color=GREEN, lw=1)

    for i in (left, right):
        ax.plot(times[i], 0.0, "s", color=BLUE, ms=7)
    arrow((times[-1], 0.0), (times[right], 0.0), BLUE, 0.0)
    arrow((times[right], 0.0), (times[left], 0.0), BLUE, 0.0)
    ax.text(2.6, -0.14, "3. pull the gradient back", color=BLUE, ha="center")
    label = "gradient of the loss\nin the state"
    ax.text(5.35, 0.0, label, color=BLUE, va="center", fontsize=9)
    ax.set_xlim(-0.2, 6.6)
    ax.set_ylim(-0.45, 1.25)
    ax.axis("off")
    save(fig, out)


def save(fig, out: Path) -> None:
    fig.savefig(out, dpi=150)
    plt.close(fig)
    print(out)


if __name__ == "__main__":
    main()
