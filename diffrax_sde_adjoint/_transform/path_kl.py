r"""The Kullback-Leibler divergence between the laws of two SDEs, along a solve.

Let the posterior $Q$ and the prior $P$ be the laws of two SDEs with drifts $f_Q$ and
$f_P$ and the same diffusion $g$, and let $g u = f_Q - f_P$. By Girsanov's theorem,
along a solution of the first,

$\log\frac{\mathrm{d}Q}{\mathrm{d}P} = \frac{1}{2} \int |u|^2\,\mathrm{d}t
+ \int u^\top\,\mathrm{d}W,$

where the second integral is an Itô integral and so has no expectation: the divergence
is that of the first. Either is one more number of the state, with a drift and, for the
second, a diffusion of its own. Whether the SDEs are meant in the sense of Itô or of
Stratonovich makes no difference to $u$, as it does not to the difference of drifts.
"""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, PyTree

from .._compat import VF, Args, RealScalarLike, Y
from .._misc import add
from .._term.base import is_single_term
from .._term.noise import (
    Sense,
    has_own_control,
    independent_noises,
    with_drift,
    without_path,
)
from .._term.products import check_products
from .girsanov import Divergence, GirsanovShift, sum_like
from .ito import corrected


def _pair(y_and_divergence: Any) -> tuple[Y, Divergence]:
    if not isinstance(y_and_divergence, tuple) or len(y_and_divergence) != 2:
        raise ValueError(
            "Terms by `path_kl` and `path_kl_of_shift` are for a pair, of the solution "
            "and of the divergence: `diffeqsolve(..., y0=(y0, jnp.array(0.0)))`."
        )
    return y_and_divergence


class _AugmentedDrift(eqx.Module):
    """The drift of the solution, and that of the divergence, which is corrected for
    some noises: only the terms of the solution are in the sense of the solver already.
    """

    drift: diffrax.ODETerm
    shift: GirsanovShift | None
    noises: Sequence[diffrax.ControlTerm]

    def __call__(
        self, t: RealScalarLike, y_and_divergence: tuple[Y, Divergence], args: Args
    ) -> tuple[Y, Divergence]:
        y, divergence = _pair(y_and_divergence)
        out = self.drift.vf_prod(t, y, args, 1)
        if self.shift is None:
            return out, jnp.zeros_like(divergence)
        u, is_infinite = self.shift(t, y, args, divergence)
        if self.shift.shift is not None:
            for noise, x in zip(self.shift.noises, u, strict=True):
                out = add(out, noise.vf_prod(t, y, args, x))
        rate = sum_like(jtu.tree_map(lambda x: 0.5 * x**2, u), divergence)
        if is_infinite is not None:
            rate = jnp.where(is_infinite > 0, jnp.nan, rate)
        _, rate = corrected(
            (out, rate), "stratonovich", self.noises, t, y_and_divergence, args
        )
        return out, rate


class _AugmentedDiffusion(eqx.Module):
    """The diffusion of the solution, and that of the divergence, if it has one: the
    part of `shift` number `index`, as a linear form.
    """

    noise: diffrax.ControlTerm
    shift: GirsanovShift | None
    index: int | None = eqx.field(static=True)

    def __call__(
        self, t: RealScalarLike, y_and_divergence: tuple[Y, Divergence], args: Args
    ) -> tuple[VF, PyTree[Array] | None, Divergence]:
        y, divergence = _pair(y_and_divergence)
        form = None
        if self.shift is not None:
            assert self.index is not None
            u, _ = self.shift(t, y, args, divergence)
            form = u[self.index]
        vf = self.noise.vf(t, y, args)
        check_products(self.noise, vf, eqx.filter_eval_shape(self.noise.contr, t, t), y)
        # Not the divergence itself: solvers for additive noise look for the state in
        # what this is.
        return vf, form, jnp.zeros_like(divergence)


class _AugmentedNoise(diffrax.ControlTerm):
    """A term of the solution and of the divergence."""

    vector_field: _AugmentedDiffusion  # pyright: ignore[reportIncompatibleMethodOverride]

    def prod(
        self, vf: tuple[VF, PyTree[ArrayLike] | None, ArrayLike], control: PyTree[Array]
    ) -> tuple[Y, Divergence]:
        vf, form, divergence = *vf[:2], jnp.asarray(vf[2])
        if form is not None:
            products = jtu.tree_map(jnp.multiply, form, control)
            divergence = sum_like(products, divergence)
        return self.vector_field.noise.prod(vf, control), divergence


def path_kl(
    terms: PyTree[diffrax.AbstractTerm],
    prior: Callable[[RealScalarLike, Y, Args], Y],
    *,
    log_ratio: Sense | None = None,
    throw: bool = True,
) -> diffrax.MultiTerm:
    r"""Terms that also carry how far their law is from that of a prior: the
    Kullback-Leibler divergence on the space of paths, which is what a latent SDE adds
    to its loss.

    ```python
    posterior = MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))
    sol = diffeqsolve(
        path_kl(posterior, prior_drift), solver, t0, t1, dt0, (y0, jnp.array(0.0)), args
    )
    ys, divergence = sol.ys
    ```

    The state is a pair of that of `terms`, any PyTree, and of the divergence so far,
    which grows at the rate $\frac{1}{2} |u|^2$ with $g u = f_Q - f_P$. Here $f_Q$ is
    the drift of `terms`, $f_P$ that of the prior, and $g$ the diffusion of both. Its
    mean over paths is the divergence between the two laws, to which that of the initial
    distributions is to be added.

    In a state that is a batch with diagonal noise, the divergence may be one of each
    element: then its shape is that of the first axes of the noise. Solve forwards in
    time, in the sense that `terms` are meant in, or convert them afterwards, as in
    `ito_to_stratonovich(path_kl(terms, prior))`. The
    [page of this function](path_kl.md#what-it-takes) has more on noise and solvers.

    **Arguments:**

    - `terms`: those of the posterior: a [`diffrax.MultiTerm`][] of
        [`diffrax.ODETerm`][] and [`diffrax.ControlTerm`][] of independent Brownian
        paths, or one of the latter. Terms with other controls belong to both laws.
    - `prior`: the drift of the prior, a function of `(t, y, args)` as that of a
        [`diffrax.ODETerm`][].
    - `log_ratio`: carry the whole logarithm of the density of the posterior with
        respect to the prior, $\frac{1}{2} \int |u|^2\,\mathrm{d}t + \int u^\top
        \mathrm{d}W$, as for importance weights. By default there is just the first
        integral, whose mean is the same and whose variance is smaller. The second one
        is an Itô integral, whichever the solver; so this must be the sense that `terms`
        will be solved in, which cannot be seen here: `"ito"` or `"stratonovich"`.
    - `throw`: raise an error where the divergence would be infinite. If `False`, it is
        NaN from there on, and not infinity.

    **Returns:**

    A [`diffrax.MultiTerm`][] of as many terms as there were, or one more if there was
    no [`diffrax.ODETerm`][], which is then at the front.

    **Raises:**

    `ValueError` if `terms` holds other kinds of terms, or subclasses of these with a
    method `contr` of their own; if there is no Brownian path, or two of the same; if
    `log_ratio` is something else; and, when the drift is evaluated, if the state is no
    pair, or the divergence does not have one of the shapes above. A runtime error if
    the divergence would be infinite.

    **Cost:**

    Each evaluation of the drift makes one each of the drift of the prior and of the
    diffusion, and if this is not diagonal, its singular value decomposition. With
    `log_ratio="stratonovich"` it also makes one JVP of them for each number of the
    noise, for the difference between the two kinds of integral.

    !!! note

        The result refers to what is in the vector fields more than once. To
        differentiate with respect to arrays inside of `terms`, call this inside of the
        function that is differentiated.

    Source: Li, Wong, Chen and Duvenaud, *Scalable Gradients for Stochastic Differential
    Equations*, AISTATS 2020, Section 5.
    """
    return _augment(terms, log_ratio, "path_kl", prior=prior, throw=throw)


def path_kl_of_shift(
    terms: PyTree[diffrax.AbstractTerm],
    shift: Callable[[RealScalarLike, Y, Args], PyTree[Array]],
    *,
    log_ratio: Sense | None = None,
) -> diffrax.MultiTerm:
    r"""Terms of the posterior that a prior becomes as its noise is given a drift, with
    the divergence between them.

    As [`diffrax_sde_adjoint.path_kl`][], but `terms` are those of the prior, and the
    drift of the posterior is $f_P + g u$ for a given $u$ (a shift of Wiener space, as
    in Cameron and Martin's theorem). Every such posterior has a finite divergence,
    whatever the diffusion, and there is nothing to be solved or checked.

    **Arguments:**

    - `terms`: those of the prior, as for [`diffrax_sde_adjoint.path_kl`][].
    - `shift`: $u$, a function of `(t, y, args)` with the structure of an increment of
        the Brownian path; if there is more than one, a tuple or list of them in the
        order of `terms`.
    - `log_ratio`: as for [`diffrax_sde_adjoint.path_kl`][].

    Each evaluation of the drift makes one of the shift and one of the diffusion. What
    else is returned, raised and spent is as for [`diffrax_sde_adjoint.path_kl`][], but
    there is no runtime error.
    """
    return _augment(terms, log_ratio, "path_kl_of_shift", shift=shift)


def _augment(
    terms: PyTree[diffrax.AbstractTerm],
    log_ratio: str | None,
    name: str,
    **posterior: Any,
) -> diffrax.MultiTerm:
    if log_ratio not in (None, *get_args(Sense)):
        raise ValueError(
            f"`{name}(..., log_ratio=...)` is the sense in which the terms are solved, "
            f'`"ito"` or `"stratonovich"`, or `None`, but is `{log_ratio!r}`.'
        )
    leaves = jtu.tree_leaves(terms, is_leaf=is_single_term)
    for leaf in leaves:
        if not isinstance(leaf, diffrax.ODETerm | diffrax.ControlTerm):
            raise ValueError(
                f"`{name}(terms, ...)` must consist of `diffrax.ODETerm` and "
                f"`diffrax.ControlTerm`, but there is a `{type(leaf).__name__}`."
            )
        if has_own_control(leaf):
            raise ValueError(
                f"`{name}(terms, ...)` does not support `{type(leaf).__name__}`, which "
                "has a method `contr` of its own. Let its control be that of the class "
                "that it is derived from, and scale it in `prod`."
            )
    noises = independent_noises(
        leaves,
        f"{name}(terms, ...)",
        "no two laws have a finite divergence, but equal ones",
    )
    first, leaves = with_drift(leaves)
    drifts = [x for x in leaves if isinstance(x, diffrax.ODETerm)]
    shift = GirsanovShift(drifts, [without_path(x) for x in noises], **posterior)

    def augment_noise(term: diffrax.ControlTerm) -> _AugmentedNoise:
        index = next((i for i, x in enumerate(noises) if x is term), None)
        its_shift = None if index is None or log_ratio is None else shift
        diffusion = _AugmentedDiffusion(without_path(term), its_shift, index)
        return _AugmentedNoise(diffusion, term.control)

    corrections = []
    if log_ratio == "stratonovich":
        corrections = [without_path(augment_noise(x)) for x in noises]
    augmented = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, diffrax.ControlTerm):
            augmented.append(augment_noise(leaf))
        else:
            # The divergence is a matter of all drifts together, and is in the first.
            drift = _AugmentedDrift(leaf, shift if i == first else None, corrections)
            augmented.append(diffrax.ODETerm(drift))
    return diffrax.MultiTerm(*augmented)
