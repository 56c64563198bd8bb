"""What a sweep's distance from the solve is worth to the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_sde_adjoint._forward.return_error import (
    ReturnError,
    near_exact_tolerance,
    size_of_loss,
)


eps = 2.0**-52
single_eps = 2.0**-23


def error_of(scale=1.0, dtype=jnp.float64, least_tolerance=0.0):
    return ReturnError.none(jnp.array(scale), jnp.zeros(2, dtype), least_tolerance)


def test_worth_adds_up():
    """Entries do not cancel, nor do leaves or states."""
    error = error_of()
    assert error.weighted_error == 0.0
    known = {"y": jnp.array([1.0, -1.0]), "z": jnp.array(2.0)}
    found = {"y": jnp.array([1.5, -1.25]), "z": jnp.array(1.0)}
    grad = {"y": jnp.array([2.0, 4.0]), "z": jnp.array(3.0)}
    once = error.arrived(found, known, grad)
    assert once.weighted_error == 2 * 0.5 + 4 * 0.25 + 3 * 1.0
    minus = jax.tree.map(lambda x: -x, grad)
    assert once.arrived(found, known, minus).weighted_error == 2 * once.weighted_error
    assert once.arrived(known, known, grad).weighted_error == once.weighted_error
    assert (once.scale, once.tolerance) == (error.scale, error.tolerance)


def test_leaves_without_cotangent():
    """Such as integers, which it does not look at."""
    state = lambda x, n: {"y": jnp.array(x), "count": jnp.array(n), "none": None}
    grad = {"y": jnp.array(2.0), "count": None, "none": None}
    error = error_of().arrived(state(1.0, 3), state(0.5, 7), grad)
    assert error.weighted_error == 1.0
    assert error_of().arrived(state(1.0, 3), state(0.5, 7), None).weighted_error == 0.0


def test_single_precision():
    """States may be, while the sum is not."""
    x = jnp.array([1.0, 2.0], jnp.float32)
    error = error_of(dtype=jnp.float32).arrived(x, 2 * x, x)
    assert error.weighted_error.dtype == jnp.float64
    assert error.weighted_error == 5.0


def test_complex_numbers():
    y = jnp.array([3.0 + 4.0j])
    assert error_of().arrived(y, 0 * y, jnp.array([2.0 + 0.0j])).weighted_error == 10.0


@pytest.mark.parametrize(
    "dtypes,least_tolerance,expected",
    (
        ((jnp.float64,), 0.0, eps ** (1 / 3)),
        ((jnp.float32,), 0.0, single_eps ** (1 / 3)),
        ((jnp.complex64,), 0.0, single_eps ** (1 / 3)),
        ((jnp.float64, jnp.float32), 0.0, single_eps ** (1 / 3)),
        ((jnp.float64,), near_exact_tolerance, single_eps ** (1 / 3)),
        ((jnp.float32,), 0.1, 0.1),
        ((), 0.1, 0.1),
    ),
)
def test_tolerance(dtypes, least_tolerance, expected):
    y = [jnp.zeros(2, dtype) for dtype in dtypes]
    error = ReturnError.none(jnp.array(1.0), y, least_tolerance)
    np.testing.assert_allclose(error.tolerance, expected, rtol=1e-12)


def test_is_too_large():
    """Relative to the size of the loss."""
    error = error_of(scale=100.0)
    at = lambda x: error.arrived(jnp.array(x), jnp.array(0.0), jnp.array(-1.0))
    limit = 100.0 * eps ** (1 / 3)
    assert not at(0.99 * limit).is_too_large()
    assert at(1.01 * limit).is_too_large()
    assert at(-1.01 * limit).is_too_large()
    assert not error.is_too_large()
    assert not error_of(scale=0.0).is_too_large()


def test_what_is_not_finite():
    """NaNs of cotangents, and of solves that end with one, are let pass; and what was
    found is not, if it is not finite and should be.
    """
    zero, one, nan = map(jnp.array, (0.0, 1.0, np.nan))
    assert error_of().arrived(nan, zero, one).is_too_large()
    assert error_of().arrived(nan, zero, one).arrived(one, one, one).is_too_large()
    assert error_of().arrived(jnp.array(np.inf), zero, nan).is_too_large()
    assert not error_of().arrived(nan, nan, one).is_too_large()
    assert not error_of().arrived(one, zero, nan).is_too_large()
    assert not error_of(scale=np.nan).arrived(one, zero, one).is_too_large()
    of_nan = ReturnError.none(one, nan, 0.0)
    assert not of_nan.arrived(nan, zero, one).is_too_large()


largest_y = {"y": jnp.array([3.0, 0.5]), "z": jnp.array(2.0)}
grad_y = {"y": jnp.array([1.0, -4.0]), "z": jnp.array(0.5)}


def test_size_by_leaf():
    """The largest entry of the solution stands for all."""
    assert size_of_loss(largest_y, [grad_y], None, None) == (1 + 4) * 3.0 + 0.5 * 2


def test_size_by_entry():
    size = size_of_loss(largest_y, [grad_y], None, None, by_entry=True)
    assert size == 1 * 3.0 + 4 * 0.5 + 0.5 * 2


def test_size_of_saved_solutions():
    """Of all times, which the cotangents have one more axis for."""
    saved = jax.tree.map(lambda x: jnp.stack([x, -x, 0 * x]), grad_y)
    by_leaf = size_of_loss(largest_y, [grad_y, saved], None, None)
    assert by_leaf == 3 * ((1 + 4) * 3.0 + 0.5 * 2)
    by_entry = size_of_loss(largest_y, [grad_y, saved], None, None, by_entry=True)
    assert by_entry == 3 * (1 * 3.0 + 4 * 0.5 + 0.5 * 2)


@pytest.mark.parametrize("by_entry", (False, True))
def test_size_of_other_outputs(by_entry):
    """By leaf in any case; entries that have not been saved to are infinite."""
    others = {"out": jnp.array([[1.0, -5.0], [np.inf, np.inf]]), "count": jnp.array(3)}
    grad_others = {"out": jnp.array([[0.5, 2.0], [0.0, 1.0]]), "count": None}
    size = size_of_loss(largest_y, [], others, grad_others, by_entry)
    assert size == (0.5 + 2 + 1) * 5
    both = size_of_loss(largest_y, [grad_y], others, grad_others, by_entry)
    assert both == size + size_of_loss(largest_y, [grad_y], None, None, by_entry)


def test_size_of_nothing():
    assert size_of_loss(largest_y, [], None, None) == 0.0
    none = jnp.zeros((0, 2))
    assert size_of_loss(largest_y, [], [none], [none]) == 0.0
    infinite = jnp.full(2, np.inf)
    assert size_of_loss(largest_y, [], [infinite], [jnp.ones(2)]) == 0.0


def test_size_in_single_precision():
    x = jnp.array([1.0, -2.0], jnp.float32)
    size = size_of_loss(x, [x], [jnp.array(2.0)], [jnp.array(3.0)])
    assert size.dtype == jnp.float64
    assert size == 3 * 2 + 6
