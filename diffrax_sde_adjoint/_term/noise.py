"""The terms of an SDE that a Brownian path drives, and its drift."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import Args, RealScalarLike, Y, is_sde
from .._misc import zeros_like
from .base import unwrap


Sense: TypeAlias = Literal["ito", "stratonovich"]


class AbstractConvertedDrift(eqx.Module):
    """A drift whose SDE is meant in one sense, and has come from the other one."""

    sense: eqx.AbstractVar[Sense]


def converted_drifts(terms: PyTree[Any]) -> list[AbstractConvertedDrift]:
    """Of each converted term the drift that its last conversion made."""
    is_converted = lambda x: isinstance(x, AbstractConvertedDrift)
    return list(filter(is_converted, jtu.tree_leaves(terms, is_leaf=is_converted)))


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


def with_drift(terms: Sequence[diffrax.AbstractTerm]) -> tuple[int, list[Any]]:
    """The index of the first of the terms that is a drift, and the terms: if none is,
    with one of zero at the front.
    """
    for i, term in enumerate(terms):
        if isinstance(term, diffrax.ODETerm) and not has_own_control(term):
            return i, [*terms]
    return 0, [diffrax.ODETerm(_no_drift), *terms]


def _no_drift(t: RealScalarLike, y: Y, args: Args) -> Y:
    del t, args
    return jtu.tree_map(jnp.zeros_like, y)


def independent_noises(
    terms: Sequence[diffrax.AbstractTerm], call: str, otherwise: str
) -> list[Any]:
    """Those of the terms that a Brownian path drives. An error if there is none, or if
    two are known to have the same path.
    """
    noises = [x for x in terms if is_noise(x)]
    if len(noises) == 0:
        raise ValueError(
            f"`{call}` must have a term that is driven by a Brownian path: otherwise "
            f"{otherwise}."
        )
    check_independent(noises)
    return noises


def check_independent(noises: list[diffrax.AbstractTerm]) -> None:
    """An error if two noises are known to have the same path."""
    all_arrays = [
        [x for x in jtu.tree_leaves(unwrap(noise).control) if eqx.is_array(x)]
        for noise in noises
    ]
    for arrays, others in itertools.combinations(all_arrays, 2):
        if len(arrays) == len(others) > 0 and all(map(operator.is_, arrays, others)):
            raise ValueError(
                "Two terms have the same Brownian path. Their noises would be taken "
                "for independent ones: make one `diffrax.ControlTerm` of them, whose "
                "vector field is the sum of theirs."
            )


class _Shape(eqx.Module):
    """In place of a path: what its increments look like."""

    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def evaluate(self, t0: RealScalarLike, t1: RealScalarLike) -> PyTree[Array]:
        del t0, t1
        return zeros_like(jtu.tree_unflatten(self.treedef, self.leaves))


def without_path(term: diffrax.ControlTerm) -> diffrax.ControlTerm:
    """The same term, with no more of the path than what its increments look like."""
    t0 = jnp.asarray(term.control.t0)
    struct = eqx.filter_eval_shape(term.contr, t0, t0)
    leaves, treedef = jtu.tree_flatten(struct)
    shape = _Shape(tuple(leaves), treedef)
    # Not a new `ControlTerm`: a subclass may have a `vf` or a `prod` of its own.
    return eqx.tree_at(lambda x: x.control, term, shape)
