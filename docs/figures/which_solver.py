"""The figure and the measured tables of `docs/which_solver.md`.

    python docs/figures/which_solver.py

draws `docs/assets/which_solver.png`, errors of gradients against the step size, and
prints the tables. This takes about five minutes on two cores.
"""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np

from diffrax_sde_adjoint import (
    EES25,
    EES27,
    BackwardSDEAdjoint,
    BrownianInterval,
    Reversible,
    ReversibleHeun,
    StochasticAdjoint,
)


ASSETS = Path(__file__).parent.parent / "assets"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.45"

EXACT = StochasticAdjoint()
BACKWARD = BackwardSDEAdjoint()
REFERENCE = diffrax.RecursiveCheckpointAdjoint()
# From a name to a solver, an adjoint and a style.
WAYS = {
    "Midpoint, BacksolveAdjoint": (
        diffrax.Midpoint(),
        diffrax.BacksolveAdjoint(),
        dict(color=GREY, marker="s", linestyle="--"),
    ),
    "Heun, BacksolveAdjoint": (
        diffrax.Heun(),
        diffrax.BacksolveAdjoint(),
        dict(color=GREY, marker="o", linestyle="--"),
    ),
    "Midpoint, BackwardSDEAdjoint": (
        diffrax.Midpoint(),
        BACKWARD,
        dict(color=ORANGE, marker="s"),
    ),
    "Heun, BackwardSDEAdjoint": (
        diffrax.Heun(),
        BACKWARD,
        dict(color=ORANGE, marker="o"),
    ),
    "EES25": (EES25(), EXACT, dict(color=GREEN, marker="v")),
    "EES27": (EES27(), EXACT, dict(color=GREEN, marker="^")),
    "Reversible(Heun())": (
        Reversible(diffrax.Heun()),
        EXACT,
        dict(color=PURPLE, marker="o"),
    ),
    "ReversibleHeun": (ReversibleHeun(), EXACT, dict(color=BLUE, marker="o")),
}
BATCH, DIM, NOISE, WIDTH = 32, 32, 16, 8
STEPS = tuple(2**i for i in range(9))

# dy = -5 y dt + 0.5 dW over [0, 10] with steps of 0.01: from a name to a solver and a
# class of adjoints.
CONTRACTING = {
    "ReversibleHeun": (ReversibleHeun(), StochasticAdjoint),
    "EES25": (EES25(), StochasticAdjoint),
    "EES27": (EES27(), StochasticAdjoint),
    "Reversible(Heun(), coupling=0.999)": (
        Reversible(diffrax.Heun()),
        StochasticAdjoint,
    ),
    "Reversible(Heun(), coupling=0.9)": (
        Reversible(diffrax.Heun(), 0.9),
        StochasticAdjoint,
    ),
    "Heun, making steps again": (diffrax.Heun(), StochasticAdjoint),
    "Heun, BackwardSDEAdjoint": (diffrax.Heun(), BackwardSDEAdjoint),
}


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    errors = {name: measure(*way[:2]) for name, way in WAYS.items()}
    print_errors(errors)
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        draw(errors, ASSETS / "which_solver.png")
    print_contracting()


def neural_sde(key):
    """A drift and a diffusion for general noise: perceptrons with one hidden layer."""
    keys = jr.split(key, 4)
    normal = lambda key, n, m: jr.normal(key, (m, n)) / np.sqrt(n)
    return [
        (normal(keys[0], DIM + 1, WIDTH), normal(keys[1], WIDTH, DIM)),
        (normal(keys[2], DIM + 1, WIDTH), normal(keys[3], WIDTH, DIM * NOISE)),
    ]


def network(weights, t, y):
    first, second = weights
    return jnp.tanh(second @ jax.nn.silu(first @ jnp.append(y, t)))


def make_gradient(adjoint, solver):
    """Of the mean of the final states, in the weights and in the initial states, as a
    function of the step size.
    """

    def loss(weights, y0s, dt):
        def solve(y0, key):
            shape = jax.ShapeDtypeStruct((NOISE,), jnp.float64)
            path = BrownianInterval(0.0, 1.0, shape, key, dt=dt)
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: network(args[0], t, y)),
                diffrax.ControlTerm(
                    lambda t, y, args: network(args[1], t, y).reshape(DIM, NOISE), path
                ),
            )
            sol = diffrax.diffeqsolve(
                terms,
                solver,
                0.0,
                1.0,
                dt,
                y0,
                weights,
                adjoint=adjoint,
                max_steps=STEPS[-1],
                throw=False,
            )
            assert sol.ys is not None
            return jnp.mean(sol.ys[0])

        return jnp.mean(jax.vmap(solve)(y0s, jr.split(jr.key(0), BATCH)))

    weights = neural_sde(jr.key(1))
    y0s = jr.normal(jr.key(2), (BATCH, DIM))
    compiled = jax.jit(jax.grad(loss, (0, 1)))

    def gradient(dt):
        leaves = jtu.tree_leaves(compiled(weights, y0s, jnp.array(dt)))
        return np.concatenate([np.ravel(x) for x in leaves])

    return gradient


def measure(solver, adjoint):
    """The sum of the errors of a gradient, relative to the sum of its sizes, for each
    number of steps. The reference is the gradient of the same numerical solution.
    """
    errors = []
    gradients = [make_gradient(x, solver) for x in (adjoint, REFERENCE)]
    for num_steps in STEPS:
        actual, expected = (gradient(1 / num_steps) for gradient in gradients)
        errors.append(np.sum(np.abs(actual - expected)) / np.sum(np.abs(expected)))
    return errors


def entry(error):
    # With `throw=False`, where there would be an error, a gradient is NaN.
    return "error" if np.isnan(error) else f"{error:.0e}"


def print_errors(errors) -> None:
    print("| | " + " | ".join(f"1/{n}" if n > 1 else "1" for n in STEPS) + " |")
    print("| --- |" + " --: |" * len(STEPS))
    for name, row in errors.items():
        print(f"| {name} | " + " | ".join(map(entry, row)) + " |")


def draw(errors, path: Path) -> None:
    fig, ax = plt.subplots(figsize=(7.2, 4.2), constrained_layout=True)
    steps = [1 / n for n in STEPS]
    for name, (_, _, style) in WAYS.items():
        ax.loglog(steps, errors[name], label=name, markersize=5, **style)
    ax.set_xlabel("step size")
    ax.set_ylabel("relative error of the gradient")
    ax.set_xticks(steps, ["1", *(f"1/{n}" for n in STEPS[1:])])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=200)
    plt.close(fig)


def contracting(solver, adjoint, dtype):
    """The gradient and the final value."""
    t0, t1, dt = (jnp.array(x, dtype) for x in (0, 10, 0.01))

    @jax.jit
    @jax.value_and_grad
    def gradient(rate):
        shape = jax.ShapeDtypeStruct((), dtype)
        path = BrownianInterval(t0, t1, shape, jr.key(0), dt=dt)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, rate: -rate * y),
            diffrax.ControlTerm(lambda t, y, rate: jnp.array(0.5, dtype), path),
        )
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            t0,
            t1,
            dt,
            jnp.ones((), dtype),
            rate,
            saveat=diffrax.SaveAt(ts=jnp.linspace(t0, t1, 5, dtype=dtype)),
            adjoint=adjoint,
            max_steps=1000,
            throw=False,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys**2)

    value, grad = gradient(jnp.array(5, dtype))
    return float(grad), float(value)


def print_contracting() -> None:
    """Errors of gradients against the exact ones of the same numerical solution, and of
    the loss against that of Heun's method.
    """
    relative = lambda x, y: entry(abs(x - y) / abs(y))
    print("| | loss | gradient, float64 | gradient, float32 |")
    print("| --- | --: | --: | --: |")
    _, loss_of_heun = contracting(diffrax.Heun(), REFERENCE, jnp.float64)
    for name, (solver, adjoint_cls) in CONTRACTING.items():
        references = [
            contracting(solver, REFERENCE, dtype)
            for dtype in (jnp.float64, jnp.float32)
        ]
        (_, loss), _ = references
        for every in (None, 50):
            cells = [f"`{name}`", relative(loss, loss_of_heun)]
            if every is not None:
                cells[0] += f", `checkpoint_every={every}`"
            for dtype, (expected, _) in zip(
                (jnp.float64, jnp.float32), references, strict=True
            ):
                adjoint = adjoint_cls(checkpoint_every=every)
                actual, _ = contracting(solver, adjoint, dtype)
                cells.append(relative(actual, expected))
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
