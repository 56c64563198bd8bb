"""How much is too much of the spurious solution of reversible Heun."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_sde_adjoint._forward.instability import Spurious, has_overflowed
from diffrax_sde_adjoint._forward.tape import Tape


def spurious_of(worth, change):
    return Spurious(jnp.asarray(worth, float), jnp.asarray(change, float))


def test_at():
    """The largest of what has been seen, of the change for each entry."""
    y0 = {"y": jnp.array([1.0, 2.0]), "z": jnp.array(0.0)}
    y = {"y": jnp.array([1.5, 0.0]), "z": jnp.array(-1.0)}
    spurious = Spurious.none(y, y0)
    assert spurious.worth == 0.0
    np.testing.assert_array_equal(spurious.change["y"], [0.5, 2.0])
    np.testing.assert_array_equal(spurious.change["z"], 1.0)

    y = {"y": jnp.array([4.0, 2.5]), "z": jnp.array(0.5)}
    spurious = spurious.at(jnp.array(-3.0), y, y0)
    assert spurious.worth == 3.0
    np.testing.assert_array_equal(spurious.change["y"], [3.0, 2.0])
    np.testing.assert_array_equal(spurious.change["z"], 1.0)

    spurious = spurious.at(jnp.array(2.0), y0, y0)
    assert spurious.worth == 3.0
    np.testing.assert_array_equal(spurious.change["y"], [3.0, 2.0])


def test_nan_stays():
    y = jnp.array(1.0)
    spurious = Spurious.none(y, y).at(jnp.array(np.nan), y, y)
    assert np.isnan(spurious.at(jnp.array(1.0), y, y).worth)


def test_without_a_batch():
    """Of the size of the loss, 13% are let pass."""
    for worth, expected in ((0.129, False), (0.131, True)):
        is_any, is_here = spurious_of(worth, [0.25]).is_too_large(jnp.array(1.0), ())
        assert is_any == is_here == expected
    assert not spurious_of(0.2, [0.25]).is_too_large(jnp.array(2.0), ())[0]


def size_of_change(change, largest_y, at_pages, y0, num_pages, dtype=float):
    """For a solution of one entry."""
    array = lambda x: jnp.array([x], dtype)
    num_steps = jnp.array(2 * num_pages)
    ends = jnp.zeros((num_pages, 3), dtype)
    tape = Tape(ends, None, None, array(largest_y), array(at_pages), num_steps)
    spurious = Spurious(jnp.array(0.0), array(change))
    (size,) = spurious.size_of_change(tape, array(y0))
    return size


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_solution_that_does_not_move(dtype):
    """There the distance is compared with rounding."""
    size = size_of_change(0.0, 100.0, 0.0, 100.0, 1, dtype)
    np.testing.assert_allclose(size, 100 * float(jnp.finfo(dtype).eps) ** 0.5)
    assert size_of_change(0.0, 0.0, 0.0, 0.0, 1, dtype) == 0


def test_size_of_change():
    """What the forward solve knows, and for a solve of one page what was found again,
    within what is possible.
    """
    cases = (
        # change, largest_y, at_pages, y0, num_pages, expected
        (0.3, 1.0, 0.1, 1.0, 1, 0.3),
        (0.3, 1.0, 0.1, 1.0, 2, 0.1),
        (1e9, 1.0, 0.1, -1.0, 1, 2.0),
        (1e9, 1.0, 0.1, -1.0, 3, 0.1),
        (0.0, 1.0, 0.0, 0.2, 1, 0.8),
    )
    for *inputs, expected in cases:
        np.testing.assert_allclose(size_of_change(*inputs), expected, atol=1e-7)


def measure(worths, changes, num_axes=1):
    """Over the batch, and for each element."""
    names = ("inner", "outer")[:num_axes]

    def one(worth, change):
        return spurious_of(worth, change).is_too_large(jnp.sum(change), names)

    for name in names:
        one = jax.vmap(one, axis_name=name, out_axes=(None, 0))
    return jax.jit(one)(jnp.array(worths, float), jnp.array(changes, float))


def test_less_is_tolerated_of_many():
    """3%, and 10% over the square root of their number."""
    for num in (1, 100):
        limit = 0.03 + 0.1 / num**0.5
        for factor, expected in ((0.99, False), (1.01, True)):
            is_any, is_here = measure(num * [factor * limit], num * [1.0])
            assert is_any == expected
            assert np.all(is_here == expected)


def test_sums_over_the_batch():
    """Of which those that are off themselves are told apart."""
    tolerance = 0.03 + 0.1 / 2
    is_any, is_here = measure([0.0, 0.0, 0.2, 0.13], [1.0, 1.0, 1.0, 1.0])
    assert 0.33 > 4 * tolerance
    assert is_any
    np.testing.assert_array_equal(is_here, [False, False, True, True])
    # As many are off, but not the sum.
    is_any, is_here = measure([0.0, 0.0, 0.15, 0.13], [1.0, 1.0, 1.0, 1.0])
    assert 0.28 < 4 * tolerance
    assert not is_any
    assert not np.any(is_here)


def test_sums_over_two_axes():
    limit = 0.03 + 0.1 / 6**0.5
    worths = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]) * limit
    for factor, expected in ((0.99, False), (1.01, True)):
        is_any, is_here = measure(factor * worths, np.ones((2, 3)), num_axes=2)
        assert is_any == expected
        np.testing.assert_array_equal(is_here, expected & (factor * worths > limit))


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_elements_that_are_not_finite(bad):
    """They do not count, in the sums or in the number of elements."""
    limit = 0.03 + 0.1 / 2**0.5
    for factor, expected in ((0.99, False), (1.01, True)):
        worth = factor * limit
        is_any, is_here = measure([worth, bad, worth], [1.0, 1.0, 1.0])
        assert is_any == expected
        np.testing.assert_array_equal(is_here[::2], expected)
        is_any, is_here = measure([worth, 0.0, worth], [1.0, bad, 1.0])
        assert is_any == expected
        np.testing.assert_array_equal(is_here, [expected, False, expected])
    is_any, _ = measure([bad, bad], [1.0, bad])
    assert not is_any


def test_has_no_derivative():
    """As it is looked at in a rule that may be differentiated."""

    def number(worth):
        is_any, _ = spurious_of(worth, [1.0]).is_too_large(jnp.array(1.0), ())
        return jnp.where(is_any, 1.0, 0.0)

    assert jax.grad(number)(0.5) == 0.0


def test_overflow():
    """Is none if it was there at the start, or if nothing depends on the solution."""
    one, nan, inf = map(jnp.array, (1.0, np.nan, np.inf))
    parameters = {"count": jnp.array(1), "bound": inf, "fn": abs}
    for y in (nan, inf):
        assert has_overflowed(y, one, parameters, [one, 0 * one])
        assert has_overflowed(y, one, parameters, [nan])
        assert not has_overflowed(y, one, parameters, [0 * one, None])
        assert not has_overflowed(y, inf, parameters, [one])
        assert not has_overflowed(y, one, parameters | {"bound": nan}, [one])
    assert not has_overflowed(one, one, parameters, [one])
