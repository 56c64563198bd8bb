"""Products of vector fields and controls that are not of the structure of the solution
are errors that name the way out.
"""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import make_terms, struct

from diffrax_sde_adjoint import BrownianInterval, ReversibleHeun, StochasticAdjoint


y3 = jnp.ones(3)
pair = (jnp.ones(3), jnp.array(1.0))
# Diffusion, shape of the noise, `y0`, and what the error says.
wrong = {
    "vector times vector": (
        jnp.array([1.0, 2.0, 3.0]),
        (3,),
        y3,
        r"`f64\[3\]`, the control is `f64\[3\]`, and `y` is `f64\[3\]`.*"
        "lineax.DiagonalLinearOperator",
    ),
    "sizes that do not fit": (
        jnp.ones((3, 2)),
        (3,),
        y3,
        r"`f64\[3,2\]`, the control is `f64\[3\]`.*lineax.DiagonalLinearOperator",
    ),
    "columns first": (jnp.ones((2, 3)), (2,), y3, "followed by that of the control"),
    "scalar in a vector": (jnp.array(1.0), (), y3, "followed by that of the control"),
    "pair with array noise": (
        (jnp.ones((3, 3)), jnp.ones(3)),
        (3,),
        pair,
        "PyTree structure of `y`.*`BrownianInterval\\(shape=...\\)`",
    ),
    "noise in float64": (
        jnp.ones((3, 3), jnp.float32),
        (3,),
        jnp.ones(3, jnp.float32),
        r"`float64`, and the solution `y` is `float32`.*jax.ShapeDtypeStruct",
    ),
}


class Customised(diffrax.Euler):
    """A solver that a user wrote, which goes by `vf` and `prod`."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        vf = terms.vf(t0, y0, args)
        change = terms.prod(vf, terms.contr(t0, t1))
        y1 = jax.tree.map(lambda a, b: a + b, y0, change)
        info = dict(y0=y0, y1=y1)
        return y1, None, info, None, diffrax.RESULTS.successful


@pytest.mark.parametrize("case", wrong.values(), ids=wrong)
@pytest.mark.parametrize(
    "solver,adjoint",
    [
        (ReversibleHeun(), diffrax.RecursiveCheckpointAdjoint()),
        (diffrax.ReversibleHeun(), StochasticAdjoint()),
        (diffrax.Heun(), StochasticAdjoint()),
        (Customised(), StochasticAdjoint()),
    ],
    ids=["ours", "diffrax's", "Heun", "custom"],
)
def test_wrong_structure(case, solver, adjoint):
    vf, shape, y0, match = case
    dtype = jnp.result_type(*jax.tree.leaves(y0))
    times = jnp.array([0.0, 1.0, 0.1], dtype)

    def solve(y0):
        path = BrownianInterval(0.0, 1.0, struct(shape, jnp.float64), jr.key(0), dt=0.1)
        terms = make_terms(
            lambda t, y, args: jax.tree.map(jnp.zeros_like, y),
            lambda t, y, args: vf,
            path,
        )
        t0, t1, dt0 = times
        return diffrax.diffeqsolve(terms, solver, t0, t1, dt0, y0, adjoint=adjoint).ys

    # Standard promotion, as for a user.
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(ValueError, match=f"(?s){match}"):
            jax.eval_shape(solve, y0)


def test_types_that_do_not_mix():
    """With strict promotion, a narrower product is an error as well."""
    path = BrownianInterval(0.0, 1.0, struct((), jnp.float32), jr.key(0), dt=0.1)
    terms = make_terms(
        lambda t, y, args: -y, lambda t, y, args: jnp.array(1, jnp.float32), path
    )
    with pytest.raises(ValueError, match="of `y0` or, if this is wider, of the times"):
        diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            jnp.array(0.0),
            jnp.array(1.0),
            jnp.array(0.1),
            jnp.array(1, jnp.float32),
            adjoint=StochasticAdjoint(),
        )


def test_errors_of_a_vector_field_are_its_own():
    def diffusion(t, y, args):
        raise TypeError("of the user")

    path = BrownianInterval(0.0, 1.0, (3,), jr.key(0), dt=0.1)
    terms = make_terms(lambda t, y, args: -y, diffusion, path)
    for solver in (ReversibleHeun(), diffrax.Heun()):
        with pytest.raises(TypeError, match="of the user"):
            diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, 0.1, y3, adjoint=StochasticAdjoint()
            )


def test_errors_of_a_product_are_its_own():
    class Picky(diffrax.ControlTerm):
        def prod(self, vf, control):
            raise ValueError("of the user")

    path = BrownianInterval(0.0, 1.0, (3,), jr.key(0), dt=0.1)
    noise = Picky(lambda t, y, args: jnp.eye(3), path)
    terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: -y), noise)
    with pytest.raises(ValueError, match=r"^of the user"):
        diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, 1.0, 0.1, y3, adjoint=StochasticAdjoint()
        )


def test_one_term_for_each_part_of_the_solution():
    """A solver that takes a tuple of terms."""

    def loss(scale, adjoint):
        terms = (
            diffrax.ODETerm(lambda t, y, args: scale * y),
            diffrax.ODETerm(lambda t, y, args: -y),
        )
        y0 = (jnp.array(1.0), jnp.array(0.0))
        solver = diffrax.SemiImplicitEuler()
        ys = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.1, y0, adjoint=adjoint).ys
        return ys[0][-1]

    ours = jax.value_and_grad(loss)(1.3, StochasticAdjoint())
    expected = jax.jvp(lambda scale: loss(scale, diffrax.ForwardMode()), (1.3,), (1.0,))
    assert jnp.allclose(jnp.stack(ours), jnp.stack(expected), rtol=1e-13)
