r"""Derivatives of the solution of an SDE, solved forwards together with it.

In a direction $(\dot y_0, \dot\theta)$ of the initial state and the parameters, the
derivative $\dot y$ of the solution of
$\mathrm{d}y = f(y, \theta)\,\mathrm{d}t + g(y, \theta)\,\mathrm{d}W$ is itself that of

$\mathrm{d}\dot y
= (\partial_y f\,\dot y + \partial_\theta f\,\dot\theta)\,\mathrm{d}t
+ (\partial_y g\,\dot y + \partial_\theta g\,\dot\theta)\,\mathrm{d}W,$

along the same path and in the same sense (Itô or Stratonovich): one JVP of each vector
field.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import VF, RealScalarLike
from .._term.base import is_single_term


# With the derivatives in several directions, along a new first axis of every array.
_WithTangents: TypeAlias = tuple[Any, Any]


def _check(pair: Any, name: str, none_is_zero: bool) -> _WithTangents:
    """A pair of a PyTree, in which the numbers of Python are arrays, and of derivatives
    of it in several directions, in which there is `None` for zero.
    """
    call = f"`forward_sensitivity`: `{name} = ({name}, dot_{name})`"
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(
            f"{call} must be a pair, of what it is without derivatives, and of these."
        )
    as_array = lambda x: jnp.asarray(x) if isinstance(x, float) else x
    tree, dot_tree = jtu.tree_map(as_array, pair[0]), pair[1]

    def check(x: Any, dot_x: Any) -> Any:
        if dot_x is None and (none_is_zero or x is None):
            return None
        if dot_x is None:
            raise ValueError(f"{call}: of `dot_{name}`, no part may be `None`.")
        if not eqx.is_inexact_array(x):
            raise ValueError(
                f"{call}: there is a derivative of {x!r}, which is not floating-point. "
                "Make it so, or pass `None` for its derivative."
            )
        if jnp.ndim(dot_x) == 0 or jnp.shape(dot_x)[1:] != jnp.shape(x):
            raise ValueError(
                f"{call}: each array of the second has to have the shape of that of "
                "the first, behind one more axis for the directions. But there are "
                f"{jnp.shape(dot_x)} and {jnp.shape(x)}."
            )
        return jnp.asarray(dot_x, jnp.result_type(x))

    if dot_tree is None:
        dot_tree = jtu.tree_map(lambda _: None, tree)
    return tree, jtu.tree_map(check, tree, dot_tree, is_leaf=lambda x: x is None)


def _push_forward(
    fn: Callable, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> _WithTangents:
    """`fn` of the primals, and its derivatives in all directions."""

    def in_one_direction(tangents):
        out, dot_out = eqx.filter_jvp(fn, primals, tangents)
        # Where nothing moves, there is `None`.
        is_still = lambda x, dot_x: dot_x is None and eqx.is_inexact_array(x)
        return out, jtu.tree_map(
            lambda x, dot_x: jnp.zeros_like(x) if is_still(x, dot_x) else dot_x,
            out,
            dot_out,
        )

    in_all = eqx.filter_vmap(in_one_direction, out_axes=(None, eqx.if_array(0)))
    return in_all(tangents)


class _Sensitivity(diffrax.AbstractTerm):
    """A term of the solution, and of its derivatives."""

    term: diffrax.AbstractTerm

    def _of_state_and_args(self, fn: Callable, y: Any, args: Any) -> _WithTangents:
        """`fn` of the solution and `args`, and its derivatives."""
        y, dot_y = _check(y, "y0", none_is_zero=False)
        args, dot_args = _check(args, "args", none_is_zero=True)
        return _push_forward(fn, (y, args), (dot_y, dot_args))

    def vf(self, t: RealScalarLike, y: Any, args: Any) -> VF:
        fn = lambda y, args: self.term.vf(t, y, args)
        return self._of_state_and_args(fn, y, args)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> PyTree:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: PyTree[Array]) -> _WithTangents:
        vf, dot_vf = vf
        # Not the product with `dot_vf`: it is linear in what an operator does, but the
        # operator need not be linear in its arrays.
        return _push_forward(lambda vf: self.term.prod(vf, control), (vf,), (dot_vf,))

    def vf_prod(
        self,
        t: RealScalarLike,
        y: Any,
        args: Any,
        control: PyTree[Array],
    ) -> _WithTangents:
        fn = lambda y, args: self.term.vf_prod(t, y, args, control)
        return self._of_state_and_args(fn, y, args)

    def is_vf_expensive(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Any,
        args: Any,
    ) -> bool:
        return self.term.is_vf_expensive(t0, t1, y[0], args[0])


def forward_sensitivity(terms: PyTree[diffrax.AbstractTerm]) -> diffrax.AbstractTerm:
    r"""Terms that also carry derivatives of their solution: the pathwise derivatives
    that are found by differentiating the stochastic flow.

    ```python
    sol = diffeqsolve(
        forward_sensitivity(terms), solver, t0, t1, dt0, (y0, dot_y0), (args, dot_args)
    )
    ys, dot_ys = sol.ys
    ```

    The derivatives are those in $m$ directions, one for each entry of the new first
    axis of `dot_y0` and `dot_args`. The solver makes them step by step, and so they are
    those of the numerical solution: what `jax.jvp` of the solve gives, for explicit
    steps of constant size. In contrast to it, they are there at every time at which the
    solution is saved, as a part of it.

    A gradient takes a direction for each parameter, where
    [`diffrax_sde_adjoint.StochasticAdjoint`][] takes one sweep for all of them. So this
    is for few parameters, many outputs, or derivatives that are wanted along the way.

    **Arguments:**

    - `terms`: a term, or a [`diffrax.MultiTerm`][] of any number of them, for any
        noise.

    **Returns:**

    A term of the same structure, for which

    - `y0` is a pair: of the initial state, and of its derivatives, which is the same
        PyTree with every array of one more axis at the front, of size $m$.
    - `args` is a pair: of `args`, and of its derivatives likewise. Of these, any part
        may be `None`, which stands for zero, and has to be where `args` are not
        floating-point.

    Parameters that are not in `args` but in `terms` have no derivative.

    **Raises:**

    `ValueError` if `terms` is not a term; when they are evaluated, if `y0` or `args`
    is not a pair as described.

    **Cost:**

    Memory and time of a step are those of $m$ JVPs of it; there is no backward pass.
    An adaptive step size controller sees the derivatives as part of the state.

    !!! note

        Solvers that are for one kind of noise may need another one for the derivatives:
        these have general noise, unless noise is scalar or additive. Those of
        Milstein's, for commutative noise, still converge.

    Source: Tzen and Raginsky, *Neural Stochastic Differential Equations: Deep Latent
    Gaussian Models in the Diffusion Limit*, arXiv:1905.09883, 2019, Section 5.
    """
    if not isinstance(terms, diffrax.AbstractTerm):
        raise ValueError(
            "`forward_sensitivity(terms)` must be a term, such as "
            "`diffrax.MultiTerm(diffrax.ODETerm(...), diffrax.ControlTerm(...))`, but "
            f"is of type `{type(terms).__name__}`."
        )
    return jtu.tree_map(_Sensitivity, terms, is_leaf=is_single_term)
