"""By what the noise of one SDE is moved to have another, whose drift is different."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._compat import VF, Args, RealScalarLike, Y
from .._misc import add
from .._term.products import check_products


Divergence: TypeAlias = Float[Array, "..."]
Drift: TypeAlias = Callable[[RealScalarLike, Y, Args], Y]

_singular = (
    "`path_kl`: the difference between the drift of the posterior and that of the "
    "prior is not in the range of the diffusion, for example as this is zero, so that "
    "the divergence would be infinite. Keep the diffusion away from zero; or write the "
    "posterior as what the noise can do, with `path_kl_of_shift`."
)


def sum_like(tree: PyTree[Array], divergence: Divergence) -> Divergence:
    """The sum over all leaves and all axes behind those of the divergence."""
    num_axes = divergence.ndim
    total = jnp.zeros_like(divergence)
    for x in jtu.tree_leaves(tree):
        if x.shape[:num_axes] != divergence.shape:
            raise ValueError(
                f"The divergence in `y0 = (y, divergence)` is of shape "
                f"{divergence.shape}, which should be `()`, or the first axes of each "
                f"array of noise, such as those of a batch. But one has {x.shape}."
            )
        axes = tuple(range(num_axes, x.ndim))
        total = total + jnp.sum(x, axis=axes).astype(total.dtype)
    return total


class GirsanovShift(eqx.Module):
    """By what the noise of the prior is moved to have the posterior: `u`, for each of
    the noises. It is given as `shift`, or is what moves the drift from that of the
    `prior` to the sum of the `drifts`, where `throw` says whether there has to be one.
    """

    drifts: Sequence[diffrax.ODETerm]
    noises: Sequence[diffrax.ControlTerm]
    prior: Drift | None = None
    shift: Callable[[RealScalarLike, Y, Args], PyTree[Array]] | None = None
    throw: bool = eqx.field(static=True, default=False)

    def __call__(
        self, t: RealScalarLike, y: Y, args: Args, divergence: Divergence
    ) -> tuple[list[PyTree[Array]], Divergence | None]:
        """Also, if this is known, where the divergence would be infinite."""
        if any(map(jnp.iscomplexobj, jtu.tree_leaves(y))):
            raise ValueError(
                "`path_kl` and `path_kl_of_shift` do not support complex states. Let "
                "the state be a pair of its real and its imaginary part."
            )
        if self.shift is not None:
            u = jtu.tree_map(jnp.asarray, self.shift(t, y, args))
            return ([u] if len(self.noises) == 1 else list(u)), None
        assert self.prior is not None
        posterior = add(*(drift.vf_prod(t, y, args, 1) for drift in self.drifts))
        prior = self.prior(t, y, args)
        difference = jtu.tree_map(jnp.subtract, posterior, prior)
        size = jtu.tree_map(lambda a, b: jnp.abs(a) + jnp.abs(b), posterior, prior)
        vfs = [noise.vf(t, y, args) for noise in self.noises]
        structs = [eqx.filter_eval_shape(noise.contr, t, t) for noise in self.noises]
        check_products(diffrax.MultiTerm(*self.noises), tuple(vfs), tuple(structs), y)
        diagonal = _diagonal(self.noises, vfs, structs, difference)
        if diagonal is None:
            if divergence.ndim > 0:
                raise ValueError(
                    "`path_kl` supports a batch in one state, with a divergence for "
                    "each of its elements, for diagonal noise only (as a "
                    "`lineax.DiagonalLinearOperator`). Use `jax.vmap` instead."
                )
            u, product = _least_squares(self.noises, vfs, structs, difference)
            of_leaves = jtu.tree_map(lambda x: jnp.max(x, initial=0), size)
            largest = jtu.tree_reduce(jnp.maximum, of_leaves)
            size = jtu.tree_map(lambda x: largest.astype(x.dtype), size)
        else:
            u = [jtu.tree_map(_divide, difference, diagonal)]
            product = jtu.tree_map(jnp.multiply, diagonal, *u)
        is_off = jtu.tree_map(_is_off, product, difference, size)
        num_off = sum_like(is_off, divergence)
        if self.throw:
            return eqx.error_if(u, num_off > 0, _singular), None
        return u, num_off


def _is_off(
    product: Float[Array, "..."],
    difference: Float[Array, "..."],
    size: Float[Array, "..."],
) -> Array:
    eps = float(jnp.finfo(size.dtype).eps)
    return jnp.abs(product - difference) > eps**0.5 * size


def _divide(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Zero, also in its derivatives, where `y` is."""
    is_zero = y == 0
    return jnp.where(is_zero, 0, x / jnp.where(is_zero, 1, y))


def _diagonal(
    noises: Sequence[diffrax.ControlTerm],
    vfs: list[VF],
    structs: list[PyTree[jax.ShapeDtypeStruct]],
    like: Y,
) -> Y | None:
    """The diffusion, if it is known to be diagonal."""
    if len(noises) > 1 or type(noises[0]).prod is not diffrax.ControlTerm.prod:
        return None
    (vf,), (struct,) = vfs, structs
    if isinstance(vf, lx.DiagonalLinearOperator):
        return vf.diagonal
    # Of numbers, as plain arrays.
    are_numbers = jtu.tree_structure(struct) == jtu.tree_structure(like) and all(
        x.shape == () for x in (*jtu.tree_leaves(struct), *jtu.tree_leaves(like))
    )
    if are_numbers and not isinstance(vf, lx.AbstractLinearOperator):
        return vf
    return None


def _least_squares(
    noises: Sequence[diffrax.ControlTerm],
    vfs: list[VF],
    structs: list[PyTree[jax.ShapeDtypeStruct]],
    difference: Y,
) -> tuple[list[PyTree[Array]], Y]:
    """The smallest `u` that comes closest to the difference, and what it comes to."""

    def product(u):
        parts = zip(noises, vfs, u, strict=True)
        return add(*(noise.prod(vf, x) for noise, vf, x in parts))

    operator = lx.FunctionLinearOperator(product, structs)
    solver = lx.AutoLinearSolver(well_posed=False)
    u = lx.linear_solve(operator, difference, solver).value
    return u, product(u)
