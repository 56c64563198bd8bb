r"""The Itô and the Stratonovich form of the same SDE.

With the columns $g_j$ of the diffusion,

$\mathrm{d}y = f\,\mathrm{d}t + \sum_j g_j\,\mathrm{d}W^j \quad\text{(Itô)}
\quad\Longleftrightarrow\quad
\mathrm{d}y = (f - c)\,\mathrm{d}t + \sum_j g_j \circ \mathrm{d}W^j,
\qquad c = \frac{1}{2} \sum_j \frac{\partial g_j}{\partial y} g_j$.

Each summand is the derivative of `g_j` in the direction `g_j`: one JVP.
"""

from collections.abc import Callable, Sequence

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._autodiff.dependence import depends_on
from .._compat import Args, RealScalarLike, Y
from .._term.base import Rate, is_single_term
from .._term.noise import (
    AbstractConvertedDrift,
    Sense,
    check_independent,
    has_own_control,
    is_noise,
    without_path,
)


def correction(
    noise: diffrax.AbstractTerm,
    t: RealScalarLike,
    y: Y,
    args: Args,
    elementwise: bool = False,
) -> Y | None:
    """Half of the derivatives of the columns of the diffusion in their own directions,
    as a rate of change of `y`; `None` if the diffusion does not depend on `y`.
    """
    struct = eqx.filter_eval_shape(noise.contr, t, t)
    zero = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)

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
    total = None
    for i, leaf in enumerate(leaves):
        unit_vectors = jnp.eye(leaf.size, dtype=leaf.dtype)

        def of_unit_vector(x, i=i, leaf=leaf):
            others = [*leaves[:i], x.reshape(leaf.shape), *leaves[i + 1 :]]
            return derivative(jtu.tree_unflatten(treedef, others))

        out = jax.vmap(of_unit_vector)(unit_vectors)
        out = jtu.tree_map(lambda x: 0.5 * jnp.sum(x, axis=0), out)
        total = out if total is None else jtu.tree_map(jnp.add, total, out)
    return total


class _CorrectedDrift(AbstractConvertedDrift):
    """A drift, with the corrections for some noises added to it or subtracted: for the
    Itô solution, or the Stratonovich one.
    """

    drift: Callable[[RealScalarLike, Y, Args], Y] | None
    noises: Sequence[diffrax.AbstractTerm]
    sense: Sense = eqx.field(static=True)
    elementwise: bool = eqx.field(static=True)

    def __call__(self, t: RealScalarLike, y: Y, args: Args) -> Y:
        if self.drift is None:
            out = jtu.tree_map(jnp.zeros_like, y)
        else:
            out = self.drift(t, y, args)
        for noise in self.noises:
            change = correction(noise, t, y, args, self.elementwise)
            if change is not None:
                add = jnp.add if self.sense == "ito" else jnp.subtract
                out = jtu.tree_map(add, out, change)
        return out


def ito_to_stratonovich(
    terms: PyTree[diffrax.AbstractTerm], *, elementwise: bool = False
) -> diffrax.MultiTerm:
    r"""Terms whose Stratonovich solution is the Itô solution of `terms`.

    So an Itô model can be solved with a solver for Stratonovich SDEs, such as
    [`diffrax_sde_adjoint.ReversibleHeun`][], and has exact gradients in constant
    memory.

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
    by a path that is not its control; if `terms` is not a term, or has those of
    underdamped Langevin dynamics; and, when the drift is evaluated, if
    `elementwise` is set and the noise is not of the shape of the state.

    **Cost:**

    Each evaluation of the drift also makes one JVP of the diffusion for each number of
    the noise, all at once (by `jax.vmap`), so that memory is that of so many
    evaluations. It is one for scalar noise, and with `elementwise`; and none for
    additive noise, which is recognised by the diffusion not depending on the state.

    !!! warning

        The gradient of the correction is made of second derivatives of the diffusion.
        Those of a network with ReLUs are zero (almost everywhere), though the corners
        take part in the correction: use a smooth activation in the diffusion, such as
        `jax.nn.softplus`. And the derivative of a root is infinite at zero: keep it
        away from there, as in `jnp.sqrt(jnp.maximum(variance, 1e-4))`.

    !!! note

        The result refers to what is in the diffusion twice. To differentiate with
        respect to arrays inside of terms, convert inside of the function that is
        differentiated.

    ??? cite "Reference"

        ```bibtex
        @book{kloeden1992numerical,
            author={Kloeden, Peter E. and Platen, Eckhard},
            title={{N}umerical {S}olution of {S}tochastic {D}ifferential {E}quations},
            year={1992},
            publisher={Springer},
            note={Section 4.9}
        }
        ```
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
            f"`{name}(terms)` must be a term, such as "
            "`diffrax.MultiTerm(diffrax.ODETerm(...), diffrax.ControlTerm(...))`, but "
            f"is of type `{type(terms).__name__}`."
        )
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    if not any(map(is_noise, leaves)):
        raise ValueError(
            f"`{name}(terms)` must have a term that is driven by a Brownian path: "
            "otherwise there is nothing to convert."
        )
    langevin = (
        diffrax.UnderdampedLangevinDriftTerm,
        diffrax.UnderdampedLangevinDiffusionTerm,
    )
    if any(isinstance(x, langevin) for x in leaves):
        raise ValueError(
            f"`{name}(terms)` does not support terms of underdamped Langevin dynamics. "
            "Their noise is additive, so that the Itô and the Stratonovich solution "
            "are the same: use them as they are."
        )
    noises = [x for x in leaves if is_noise(x)]
    check_independent(noises)
    noises = [without_path(x) for x in noises]
    # The drift may be a user's own term too. It is a part of the new one, so that there
    # is no term more than before, for solvers that take just two.
    is_drift = [
        isinstance(x, diffrax.ODETerm) and not has_own_control(x) for x in leaves
    ]
    first = is_drift.index(True) if True in is_drift else None
    drift = None if first is None else Rate(leaves[first])
    corrected = diffrax.ODETerm(
        _CorrectedDrift(
            drift=drift, noises=noises, sense=sense, elementwise=elementwise
        )
    )
    if first is None:
        return diffrax.MultiTerm(corrected, *leaves)
    return diffrax.MultiTerm(*leaves[:first], corrected, *leaves[first + 1 :])
