"""Terms of subclasses of diffrax's: they are taken for what they are, or refused."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import pytest
from helpers import make_system, noise_shapes, relative_error, struct

from diffrax_sde_adjoint import (
    BackwardSDEAdjoint,
    BrownianInterval,
    ReversibleHeun,
    forward_sensitivity,
    ito_to_stratonovich,
    path_kl,
    path_kl_of_shift,
    stratonovich_to_ito,
)


def twice(tree):
    return jtu.tree_map(lambda x: 2 * x, tree)


class TwiceTheProduct(diffrax.ControlTerm):
    def prod(self, vf, control):
        return twice(super().prod(vf, control))

    def vf_prod(self, t, y, args, control):
        return self.prod(self.vf(t, y, args), control)


class TwiceTheVectorField(diffrax.ControlTerm):
    def vf(self, t, y, args):
        return twice(super().vf(t, y, args))


class TwiceTheControl(diffrax.ControlTerm):
    def contr(self, t0, t1, **kwargs):
        return twice(super().contr(t0, t1, **kwargs))


class TwiceTheDrift(diffrax.ODETerm):
    def prod(self, vf, control):
        return twice(super().prod(vf, control))


class TwiceTheTime(diffrax.ODETerm):
    def contr(self, t0, t1, **kwargs):
        return 2 * super().contr(t0, t1, **kwargs)


noises = ("general", "diagonal")
transforms = {
    "ito_to_stratonovich": ito_to_stratonovich,
    "stratonovich_to_ito": stratonovich_to_ito,
    "path_kl": lambda terms: path_kl(
        terms, lambda t, y, args: 2 * args["drift"](t, y, args), throw=False
    ),
    "path_kl, log ratio": lambda terms: path_kl_of_shift(
        terms,
        lambda t, y, args: jnp.full(args["noise"].shape, 0.3),
        log_ratio="stratonovich",
    ),
    "forward_sensitivity": forward_sensitivity,
    "backward SDE": lambda terms: terms,
}


def rates(transform, noise, cls, ode_cls):
    """The change of the state by each of the transformed terms, with a diffusion that
    is doubled: in the terms if these are plain.
    """
    drift, diffusion, y, args = make_system(noise)
    args["drift"] = drift
    args["noise"] = jnp.zeros(noise_shapes[noise])
    if cls is diffrax.ControlTerm:
        diffusion = lambda t, y, args, inner=diffusion: twice(inner(t, y, args))
    if ode_cls is diffrax.ODETerm:
        drift = lambda t, y, args, inner=drift: twice(inner(t, y, args))
    path = BrownianInterval(
        0.0, 1.0, struct(noise_shapes[noise], jnp.float64), jr.key(0)
    )
    terms = transform(diffrax.MultiTerm(ode_cls(drift), cls(diffusion, path)))
    t = jnp.array(0.2)
    if transform is forward_sensitivity:
        y = (y, jnp.eye(2))
        args = (args, None)
    elif isinstance(terms, diffrax.MultiTerm) and transform not in (
        ito_to_stratonovich,
        stratonovich_to_ito,
    ):
        y = (y, jnp.array(0.0))
    controls = terms.contr(t, t + 0.1)
    return [
        term.vf_prod(t, y, args, control)
        for term, control in zip(terms.terms, controls, strict=True)
    ]


@pytest.mark.parametrize("noise", noises)
@pytest.mark.parametrize("cls", (TwiceTheProduct, TwiceTheVectorField))
@pytest.mark.parametrize("name", [x for x in transforms if x != "backward SDE"])
def test_equal_to_plain_terms(name, cls, noise):
    if name == "forward_sensitivity":
        # `args` hold a function, for the others.
        transform = forward_sensitivity
    else:
        transform = transforms[name]
    actual = rates(transform, noise, cls, TwiceTheDrift)
    expected = rates(transform, noise, diffrax.ControlTerm, diffrax.ODETerm)
    # As many terms as before, as some solvers take just two.
    assert len(actual) == len(expected) == 2
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("cls", (TwiceTheProduct, TwiceTheVectorField))
@pytest.mark.parametrize(
    "solver",
    (diffrax.Euler(), diffrax.Heun()),
    ids=str,
)
def test_backward_sde(solver, cls):
    def gradient(cls, ode_cls):
        drift, diffusion, y0, args = make_system("general")
        if cls is diffrax.ControlTerm:
            diffusion = lambda t, y, args, inner=diffusion: twice(inner(t, y, args))
            drift = lambda t, y, args, inner=drift: twice(inner(t, y, args))

        def loss(y0, args):
            path = BrownianInterval(0.0, 1.0, (3,), jr.key(0), dt=0.02)
            terms = diffrax.MultiTerm(ode_cls(drift), cls(diffusion, path))
            adjoint = BackwardSDEAdjoint()
            sol = diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, 0.02, y0, args, adjoint=adjoint
            )
            return jnp.sum(sol.ys**2)

        return jax.jit(jax.grad(loss, (0, 1)))(y0, args)

    actual = gradient(cls, TwiceTheDrift)
    assert (
        relative_error(actual, gradient(diffrax.ControlTerm, diffrax.ODETerm)) < 1e-12
    )


def test_controls_of_their_own():
    """It is not known what noise these are: an error that names the class."""
    drift, diffusion, y0, args = make_system("general")
    path = BrownianInterval(0.0, 1.0, (3,), jr.key(0), dt=0.1)
    terms = diffrax.MultiTerm(diffrax.ODETerm(drift), TwiceTheControl(diffusion, path))
    match = "`TwiceTheControl`.* has a method `contr` of its own"
    for name in ("ito_to_stratonovich", "stratonovich_to_ito", "path_kl"):
        with pytest.raises(ValueError, match=match):
            transforms[name](terms)
    adjoint = BackwardSDEAdjoint()
    with pytest.raises(ValueError, match=match):
        diffrax.diffeqsolve(
            terms, diffrax.Heun(), 0.0, 1.0, 0.1, y0, args, adjoint=adjoint
        )
    plain = diffrax.ControlTerm(diffusion, path)
    with pytest.raises(
        ValueError, match=r"`TwiceTheTime`.* a method `contr` of its own"
    ):
        path_kl(diffrax.MultiTerm(TwiceTheTime(drift), plain), drift)


def test_terms_around_a_noise():
    """The error says how to change a product."""

    class Around(diffrax.AbstractTerm):
        term: diffrax.ControlTerm

        def vf(self, t, y, args):
            return self.term.vf(t, y, args)

        def contr(self, t0, t1, **kwargs):
            return self.term.contr(t0, t1, **kwargs)

        def prod(self, vf, control):
            return twice(self.term.prod(vf, control))

    path = BrownianInterval(0.0, 1.0, (), jr.key(0), dt=0.1)
    term = Around(diffrax.ControlTerm(lambda t, y, args: y, path))
    with pytest.raises(ValueError, match=r"(?s)inside of a `Around`.*a subclass of"):
        ito_to_stratonovich(term)
    # Where nothing has to be known of the noise, it is a term as any other.
    solve = lambda term: (
        diffrax.diffeqsolve(term, ReversibleHeun(), 0.0, 1.0, 0.1, jnp.array(1.0)).ys
    )
    expected = solve(diffrax.ControlTerm(lambda t, y, args: 2 * y, path))
    assert relative_error(solve(term), expected) < 1e-14


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.ItoMilstein(),
        pytest.param(diffrax.ReversibleHeun(), marks=pytest.mark.slow),
    ),
    ids=str,
)
def test_solvers_that_take_vector_fields_apart(solver):
    """Of `path_kl`, where the product is a user's own: the one differentiates vector
    fields, the other chooses between them after a jump.
    """

    def solve(cls, factor):
        path = BrownianInterval(0.0, 1.0, (2,), jr.key(0), dt=0.25)
        diffusion = lambda t, y, args: lx.DiagonalLinearOperator(
            factor * (0.5 + 0.1 * jnp.sin(y))
        )
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y), cls(diffusion, path)
        )
        sol = diffrax.diffeqsolve(
            path_kl(terms, lambda t, y, args: -2 * y, log_ratio="ito"),
            solver,
            0.0,
            1.0,
            0.25,
            (jnp.array([0.3, -0.6]), jnp.array(0.0)),
            saveat=diffrax.SaveAt(t1=True, dense=True),
        )
        return sol.ys

    expected = solve(diffrax.ControlTerm, 2)
    assert relative_error(solve(TwiceTheProduct, 1), expected) < 1e-12
