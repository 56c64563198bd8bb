"""The terms of an SDE that a Brownian path drives."""

import itertools
import operator
from typing import Any, Literal, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import RealScalarLike, is_sde
from .base import unwrap


Sense: TypeAlias = Literal["ito", "stratonovich"]


class AbstractConvertedDrift(eqx.Module):
    """A drift whose SDE is meant in one sense, and has come from the other one."""

    sense: eqx.AbstractVar[Sense]


def is_noise(term: diffrax.AbstractTerm) -> bool:
    """Whether a Brownian path drives the term. An error if it is not known how."""
    inner = unwrap(term)
    if isinstance(inner, diffrax.ODETerm | diffrax.UnderdampedLangevinDriftTerm):
        return False
    if isinstance(inner, diffrax.UnderdampedLangevinDiffusionTerm):
        return True
    if isinstance(inner, diffrax.ControlTerm) and isinstance(
        inner.control, diffrax.AbstractBrownianPath
    ):
        if has_own_control(inner):
            raise ValueError(
                f"`{type(inner).__name__}` has a method `contr` of its own, so that it "
                "is not known what noise drives it. Let its control be the increment "
                "of the path, as that of `diffrax.ControlTerm` is, and scale it in "
                "`prod`."
            )
        return True
    if is_sde(inner):
        raise ValueError(
            f"There is a Brownian path inside of a `{type(inner).__name__}`, but not "
            "as its control, so that it is not known what noise this is. Make the path "
            "the control, as in `diffrax.ControlTerm(vector_field, path)`; to change "
            "how the two are multiplied, make a subclass of `diffrax.ControlTerm` with "
            "a method `prod` of its own."
        )
    return False


def has_own_control(term: diffrax.ODETerm | diffrax.ControlTerm) -> bool:
    """Whether the term is of a subclass whose control is not time or what it holds."""
    return type(term).contr not in (diffrax.ODETerm.contr, diffrax.ControlTerm.contr)


def check_independent(noises: list[diffrax.AbstractTerm]) -> None:
    """An error if two noises are known to have the same path."""
    all_arrays = [
        [x for x in jtu.tree_leaves(_control(noise)) if eqx.is_array(x)]
        for noise in noises
    ]
    for arrays, others in itertools.combinations(all_arrays, 2):
        if len(arrays) == len(others) > 0 and all(map(operator.is_, arrays, others)):
            raise ValueError(
                "Two terms have the same Brownian path. Their noises would be taken "
                "for independent ones: make one `diffrax.ControlTerm` of them, whose "
                "vector field is the sum of theirs."
            )


def _control(noise: diffrax.AbstractTerm) -> Any:
    inner: Any = unwrap(noise)
    return inner.control


class _Shape(diffrax.AbstractPath):
    """A path of which no more is known than what its increments look like."""

    t0: RealScalarLike
    t1: RealScalarLike
    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree[Array]:
        del t0, t1, left
        zeros = [jnp.zeros(x.shape, x.dtype) for x in self.leaves]
        return jtu.tree_unflatten(self.treedef, zeros)


def without_path(term: diffrax.ControlTerm) -> diffrax.ControlTerm:
    """The same term, with no more of the path than what its increments look like."""
    path = term.control
    t0 = jnp.asarray(path.t0)
    struct = eqx.filter_eval_shape(path.evaluate, t0, t0)
    leaves, treedef = jtu.tree_flatten(struct)
    shape = _Shape(path.t0, path.t0, tuple(leaves), treedef)
    # Not a new `ControlTerm`: a subclass may have a `vf` or a `prod` of its own.
    return eqx.tree_at(lambda x: x.control, term, shape)
