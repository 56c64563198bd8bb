"""The Itô and the Stratonovich form of the same SDE."""

from collections.abc import Callable, Iterable, Sequence

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._autodiff.dependence import depends_on
from .._compat import Args, RealScalarLike, Y
from .._misc import add, zeros_like
from .._term.base import is_single_term
from .._term.noise import (
    AbstractConvertedDrift,
    Sense,
    converted_drifts,
    independent_noises,
    with_drift,
    without_path,
)


def correction(
    noise: diffrax.AbstractTerm,
    t: RealScalarLike,
    y: Y,
    args: Args,
    elementwise: bool = False,
) -> Y | None:
    r"""$\frac{1}{2} \sum_j \frac{\partial g_j}{\partial y} g_j$, with the columns $g_j$
    of the diffusion, each of which takes one JVP: by how much the Itô drift is more
    than the Stratonovich one. `None` if the diffusion does not depend on `y`.
    """
    zero = zeros_like(eqx.filter_eval_shape(noise.contr, t, t))

    def column(control: PyTree[Array]) -> Callable[[Y], Y]:
        return lambda y: noise.vf_prod(t, y, args, control)

    if not depends_on(column(zero), y):
        return None

    def derivative(control: PyTree[Array]) -> Y:
        fn = column(control)
        direction = jtu.tree_map(lambda a, x: a.astype(x.dtype), fn(y), y)
        _, out = jax.jvp(fn, (y,), (direction,))
        return out

    if elementwise:
        shapes = lambda tree: jtu.tree_map(jnp.shape, tree)
        if shapes(zero) != shapes(y):
            raise ValueError(
                "`elementwise=True` is for diagonal noise, which has a number for each "
                f"one of the state. But the noise is of shape {shapes(zero)}, and the "
                f"state of shape {shapes(y)}."
            )
        out = derivative(jtu.tree_map(jnp.ones_like, zero))
        return jtu.tree_map(lambda x: 0.5 * x, out)

    leaves, treedef = jtu.tree_flatten(zero)

    def of_leaf(i):
        def of_unit_vector(x):
            others = [*leaves[:i], x.reshape(leaves[i].shape), *leaves[i + 1 :]]
            return derivative(jtu.tree_unflatten(treedef, others))

        unit_vectors = jnp.eye(leaves[i].size, dtype=leaves[i].dtype)
        out = jax.vmap(of_unit_vector)(unit_vectors)
        return jtu.tree_map(lambda x: 0.5 * jnp.sum(x, axis=0), out)

    return add(*map(of_leaf, range(len(leaves))))


def corrected(
    drift: Y,
    sense: Sense,
    noises: Iterable[diffrax.AbstractTerm],
    t: RealScalarLike,
    y: Y,
    args: Args,
    elementwise: bool = False,
) -> Y:
    """The value of a drift, with the corrections for some noises added to it or
    subtracted: for the Itô solution, or the Stratonovich one.
    """
    for noise in noises:
        change = correction(noise, t, y, args, elementwise)
        if change is not None:
            move = jnp.add if sense == "ito" else jnp.subtract
            drift = jtu.tree_map(move, drift, change)
    return drift


class _CorrectedDrift(AbstractConvertedDrift):
    """A drift, corrected for some noises."""

    drift: diffrax.ODETerm
    noises: Sequence[diffrax.AbstractTerm]
    sense: Sense = eqx.field(static=True)
    elementwise: bool = eqx.field(static=True)

    def __call__(self, t: RealScalarLike, y: Y, args: Args) -> Y:
        drift = self.drift.vf_prod(t, y, args, 1)
        return corrected(drift, self.sense, self.noises, t, y, args, self.elementwise)


def ito_to_stratonovich(
    terms: PyTree[diffrax.AbstractTerm], *, elementwise: bool = False
) -> diffrax.MultiTerm:
    r"""Terms whose Stratonovich solution is the Itô solution of `terms`.

    So an Itô model can be solved with a solver for Stratonovich SDEs, such as
    [`diffrax_sde_adjoint.ReversibleHeun`][].

    ```python
    terms = MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))
    diffeqsolve(
        ito_to_stratonovich(terms), ReversibleHeun(), ..., adjoint=StochasticAdjoint()
    )
    ```

    The drift $f$ becomes $f - \frac{1}{2} \sum_j \frac{\partial g_j}{\partial y} g_j$,
    where $g_j$ is the column of the diffusion for the $j$-th number of the noise, of
    any kind: diagonal, scalar, additive or general, as an array, a PyTree or a lineax
    operator. Terms that no Brownian path drives, such as those of a CDE, stay as they
    are.

    **Arguments:**

    - `terms`: a term, or a [`diffrax.MultiTerm`][] of any number of them, in which at
        least one is driven by a Brownian path: a [`diffrax.ControlTerm`][] with the
        path as its control. Paths must be independent of one another.
    - `elementwise`: a promise that noise is diagonal, and that each number of the
        diagonal depends on none of the state but its own. This needs one JVP, whatever
        the dimension. It is not checked: if it does not hold, then the correction is
        wrong.

    **Returns:**

    A [`diffrax.MultiTerm`][]. The correction is part of its first
    [`diffrax.ODETerm`][], or one of its own at the front if there is none. Every other
    term is that of `terms`.

    **Raises:**

    `ValueError` if no term is driven by a Brownian path, if two are by the same, or one
    by a path that is not its control; if `terms` is not a term, has been converted, or
    has those of underdamped Langevin dynamics; and, when the drift is evaluated, if
    `elementwise` is set and the noise is not of the shape of the state.

    **Cost:**

    Each evaluation of the drift also makes one JVP of the diffusion for each number of
    the noise, all at once, with the memory of so many evaluations; just one with
    `elementwise`, and none if the diffusion does not depend on the state.

    !!! warning

        The gradient of the correction is made of second derivatives of the diffusion.
        Those of a network with ReLUs are zero (almost everywhere), and so wrong: use a
        smooth activation, such as `jax.nn.softplus`. The derivative of a root is
        infinite at zero: keep away, as in `jnp.sqrt(jnp.maximum(variance, 1e-4))`.

    !!! note

        The result refers to what is in the diffusion twice. To differentiate with
        respect to arrays inside of terms, convert inside of the function that is
        differentiated.

    Source: Kloeden and Platen, *Numerical Solution of Stochastic Differential
    Equations*, Springer 1992, Section 4.9.
    """
    return _convert(terms, "stratonovich", elementwise, "ito_to_stratonovich")


def stratonovich_to_ito(
    terms: PyTree[diffrax.AbstractTerm], *, elementwise: bool = False
) -> diffrax.MultiTerm:
    """The inverse of [`diffrax_sde_adjoint.ito_to_stratonovich`][]: terms whose Itô
    solution is the Stratonovich solution of `terms`.

    Arguments, what is returned, errors and costs are the same.
    """
    return _convert(terms, "ito", elementwise, "stratonovich_to_ito")


def _convert(
    terms: PyTree[diffrax.AbstractTerm], sense: Sense, elementwise: bool, name: str
) -> diffrax.MultiTerm:
    if not isinstance(terms, diffrax.AbstractTerm):
        raise ValueError(
            f"`{name}(terms)` must be a term, such as `diffrax.MultiTerm(...)`, but is "
            f"of type `{type(terms).__name__}`."
        )
    if any(x.sense == sense for x in converted_drifts(terms)):
        raise ValueError(f"`{name}(terms)`: they come from it already. Convert once.")
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    noises = independent_noises(leaves, f"{name}(terms)", "there is nothing to convert")
    langevin = (
        diffrax.UnderdampedLangevinDriftTerm,
        diffrax.UnderdampedLangevinDiffusionTerm,
    )
    if any(isinstance(x, langevin) for x in leaves):
        raise ValueError(
            f"`{name}(terms)` does not support terms of underdamped Langevin dynamics. "
            "Their noise is additive, so that both solutions are the same: use them."
        )
    # A drift, of a user too, is part of the new one: some solvers take just two terms.
    first, leaves = with_drift(leaves)
    leaves[first] = diffrax.ODETerm(
        _CorrectedDrift(
            drift=leaves[first],
            noises=[without_path(x) for x in noises],
            sense=sense,
            elementwise=elementwise,
        )
    )
    return diffrax.MultiTerm(*leaves)
