"""The terms of an SDE that a Brownian path drives."""

import itertools
import operator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._compat import RealScalarLike, WrapTerm, is_sde


def is_noise(term: diffrax.AbstractTerm) -> bool:
    """Whether a Brownian path drives the term. An error if it is not known how."""
    inner = term.term if isinstance(term, WrapTerm) else term
    if isinstance(inner, diffrax.ODETerm | diffrax.UnderdampedLangevinDriftTerm):
        return False
    if isinstance(inner, diffrax.UnderdampedLangevinDiffusionTerm):
        return True
    if isinstance(inner, diffrax.ControlTerm) and isinstance(
        inner.control, diffrax.AbstractBrownianPath
    ):
        return True
    if is_sde(inner):
        raise ValueError(
            "There is a Brownian path inside of a term, but not as its control, so "
            "that it is not known what noise this is. Make the path the control, as in "
            "`diffrax.ControlTerm(vector_field, path)`."
        )
    return False


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
    inner: Any = noise.term if isinstance(noise, WrapTerm) else noise
    return inner.control


class _Shape(diffrax.AbstractPath):
    """Of a path, no more than what its increments look like."""

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


def without_path(term: diffrax.AbstractTerm) -> diffrax.ControlTerm:
    """The vector field, and no more of the path than what its increments look like."""
    assert isinstance(term, diffrax.ControlTerm)
    path = term.control
    t0 = jnp.asarray(path.t0)
    struct = eqx.filter_eval_shape(path.evaluate, t0, t0)
    leaves, treedef = jtu.tree_flatten(struct)
    shape = _Shape(path.t0, path.t0, tuple(leaves), treedef)
    return diffrax.ControlTerm(term.vector_field, shape)
