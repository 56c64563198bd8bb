r"""The Kullback-Leibler divergence between the laws of two SDEs, along a solve.

Let the posterior $Q$ and the prior $P$ be the laws of

$\mathrm{d}y = f_Q\,\mathrm{d}t + g\,\mathrm{d}W$ and
$\mathrm{d}y = f_P\,\mathrm{d}t + g\,\mathrm{d}W$,

with the same diffusion, and let $g u = f_Q - f_P$. By Girsanov's theorem, along a
solution of the first,

$\log\frac{\mathrm{d}Q}{\mathrm{d}P} = \frac{1}{2} \int |u|^2\,\mathrm{d}t
+ \int u^\top\,\mathrm{d}W,$

where the second integral is an Itô integral and so has no expectation: the divergence
is that of the first. Either is one more number of the state, with a drift and, for the
second, a diffusion of its own. Whether the SDEs are meant in the sense of Itô or of
Stratonovich makes no difference to $u$, as it does not to the difference of drifts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._compat import VF, Args, RealScalarLike, Y
from .._term.base import Rate, is_single_term
from .._term.noise import (
    Sense,
    check_independent,
    has_own_control,
    is_noise,
    without_path,
)
from .girsanov import Divergence, Drift, GirsanovShift, add, sum_like
from .ito import correction


class _Augmented(lx.AbstractLinearOperator):
    """A vector field `vf` of the solution, as `term` multiplies it with a control, and
    a linear form for the divergence.
    """

    term: diffrax.ControlTerm
    vf: VF
    form: PyTree[Array] | None
    divergence: Divergence
    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def mv(self, vector: PyTree[Array]) -> tuple[Y, Divergence]:
        divergence = jnp.asarray(self.divergence)
        out = jnp.zeros_like(divergence)
        if self.form is not None:
            products = jtu.tree_map(lambda u, x: u * x, self.form, vector)
            out = sum_like(products, divergence)
        return self.term.prod(self.vf, vector), out

    def as_matrix(self) -> Float[Array, "out in"]:
        zero, unravel = jfu.ravel_pytree(
            jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), self.in_structure())
        )
        mv = lambda x: jfu.ravel_pytree(self.mv(unravel(x)))[0]
        return jax.jacfwd(mv)(zero)

    def transpose(self) -> lx.AbstractLinearOperator:
        return lx.FunctionLinearOperator(self.mv, self.in_structure()).T

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return jtu.tree_unflatten(self.treedef, self.leaves)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return eqx.filter_eval_shape(self.mv, self.in_structure())


for _is in (
    lx.is_symmetric,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    _is.register(_Augmented)(lambda operator: False)


class _AugmentedDrift(eqx.Module):
    """The drift of the solution, and that of the divergence."""

    drift: Drift | None
    shift: GirsanovShift | None
    noises: Sequence[diffrax.ControlTerm]

    def __call__(
        self, t: RealScalarLike, y_and_divergence: tuple[Y, Divergence], args: Args
    ) -> tuple[Y, Divergence]:
        y, divergence = y_and_divergence
        if self.drift is None:
            out = jtu.tree_map(jnp.zeros_like, y)
        else:
            out = self.drift(t, y, args)
        if self.shift is None:
            return out, jnp.zeros_like(divergence)
        u, is_infinite = self.shift(t, y, args, divergence)
        if self.shift.shift is not None:
            for noise, x in zip(self.shift.noises, u, strict=True):
                out = add(out, noise.vf_prod(t, y, args, x))
        rate = sum_like(jtu.tree_map(lambda x: 0.5 * x**2, u), divergence)
        if is_infinite is not None:
            rate = jnp.where(is_infinite > 0, jnp.nan, rate)
        for noise in self.noises:
            change = correction(noise, t, y_and_divergence, args)
            if change is not None:
                rate = rate - change[1]
        return out, rate


class _AugmentedDiffusion(eqx.Module):
    """The diffusion of the solution, and that of the divergence, if it has one."""

    noise: diffrax.ControlTerm
    shift: GirsanovShift | None
    index: int | None = eqx.field(static=True)

    def __call__(
        self, t: RealScalarLike, y_and_divergence: tuple[Y, Divergence], args: Args
    ) -> _Augmented:
        y, divergence = y_and_divergence
        vf = self.noise.vf(t, y, args)
        form = None
        if self.shift is not None:
            assert self.index is not None
            u, _ = self.shift(t, y, args, divergence)
            form = u[self.index]
        struct = eqx.filter_eval_shape(self.noise.contr, t, t)
        leaves, treedef = jtu.tree_flatten(struct)
        # Not itself: solvers for additive noise look for the state in what this is.
        like = jnp.zeros_like(divergence)
        term = self.noise
        if type(term).prod is diffrax.ControlTerm.prod:
            # This needs nothing of the term, and an operator is to consist of arrays.
            parts = lambda term: (term.vector_field, term.control)
            term = eqx.tree_at(parts, term, (None, None))
        return _Augmented(term, vf, form, like, tuple(leaves), treedef)


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
    the drift of `terms`, $f_P$ that of the prior, and $g$ the diffusion of both. This
    is the integral along one path; its mean over paths is the divergence between the
    two laws, given that they start in the same state. (The divergence of the initial
    distributions is to be added.) What an interval adds is the difference of what is
    saved at its ends.

    - *Noise*: diagonal noise (`lineax.DiagonalLinearOperator`; or scalar states and
        noise) takes a division. Any other, such as scalar, additive or general noise,
        of one path or several, takes the smallest $u$ of a least-squares problem, by a
        singular value decomposition (`lineax.SVD`) of the diffusion.
    - *Zero or singular diffusion*: where $f_Q - f_P$ is zero to rounding in what the
        noise does not reach, $u$ is zero in it. Elsewhere the divergence would be
        infinite, and an error is raised.
    - *Batches*: in a state that is a batch with diagonal noise, the divergence may be
        one of each element: then its shape is that of the first axes of the noise.
    - *Solvers*: any that takes the terms, in the sense (Itô or Stratonovich) that they
        are meant in; and any adjoint. Convert Itô models afterwards, as in
        `ito_to_stratonovich(path_kl(terms, prior))`. An adaptive step size controller
        sees the divergence as part of the state.
    - *Direction*: solve forwards in time. Backwards, what is carried has the opposite
        sign.

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
    `log_ratio` is something else; and, when the drift is evaluated, if the divergence
    does not have one of the shapes above. A runtime error if the divergence would be
    infinite.

    **Cost:**

    Each evaluation of the drift makes one each of the drift of the prior and of the
    diffusion. With `log_ratio="stratonovich"` it also makes one JVP of them for each
    number of the noise, for the difference between the two kinds of integral.

    !!! note

        The result refers to what is in the vector fields of `terms` more than once. To
        differentiate with respect to arrays inside of terms, call this inside of the
        function that is differentiated.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{li2020scalable,
            author={Li, Xuechen and Wong, Ting-Kam Leonard and Chen, Ricky T. Q. and
                    Duvenaud, David},
            title={{S}calable {G}radients for {S}tochastic {D}ifferential
                   {E}quations},
            booktitle={International Conference on Artificial Intelligence and
                       Statistics},
            year={2020},
            note={Section 5}
        }
        ```
    """
    make_shift = functools.partial(GirsanovShift, prior=prior, shift=None, throw=throw)
    return _augment(terms, make_shift, log_ratio, "path_kl")


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

    **Returns:**

    A [`diffrax.MultiTerm`][], as [`diffrax_sde_adjoint.path_kl`][], for the same pair
    of a state.

    **Raises:**

    As [`diffrax_sde_adjoint.path_kl`][]; there is no runtime error.

    **Cost:**

    Each evaluation of the drift makes one of the shift, and one of the diffusion. With
    `log_ratio="stratonovich"` it also makes one JVP of them for each number of the
    noise.
    """
    make_shift = functools.partial(GirsanovShift, prior=None, shift=shift, throw=False)
    return _augment(terms, make_shift, log_ratio, "path_kl_of_shift")


def _augment(
    terms: PyTree[diffrax.AbstractTerm],
    make_shift: Callable[..., GirsanovShift],
    log_ratio: str | None,
    name: str,
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
    noises = [x for x in leaves if is_noise(x)]
    if len(noises) == 0:
        raise ValueError(
            f"`{name}(terms, ...)` must have a term that is driven by a Brownian path: "
            "otherwise no two laws have a finite divergence, but equal ones."
        )
    check_independent(noises)
    drifts = [Rate(x) for x in leaves if isinstance(x, diffrax.ODETerm)]
    shift = make_shift(drifts=drifts, noises=[without_path(x) for x in noises])

    def diffusion(term: diffrax.ControlTerm) -> _AugmentedDiffusion:
        index = next((i for i, x in enumerate(noises) if x is term), None)
        is_form = index is not None and log_ratio is not None
        return _AugmentedDiffusion(
            without_path(term), shift if is_form else None, index
        )

    corrected = []
    if log_ratio == "stratonovich":
        corrected = [
            diffrax.ControlTerm(diffusion(x), without_path(x).control) for x in noises
        ]
    augmented = []
    if len(drifts) == 0:
        augmented.append(diffrax.ODETerm(_AugmentedDrift(None, shift, corrected)))
    is_first = True
    for leaf in leaves:
        if isinstance(leaf, diffrax.ControlTerm):
            new = diffrax.ControlTerm(diffusion(leaf), leaf.control)
        else:
            new = diffrax.ODETerm(
                _AugmentedDrift(Rate(leaf), shift if is_first else None, corrected)
            )
            is_first = False
        augmented.append(new)
    return diffrax.MultiTerm(*augmented)
