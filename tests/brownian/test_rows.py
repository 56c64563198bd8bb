"""Some rows of a path are those of the whole, whoever draws them."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest

from diffrax_sde_adjoint import BrownianInterval
from diffrax_sde_adjoint._brownian.draws import draw


def make(num, dtype, rest, rows=None):
    structs = [jax.ShapeDtypeStruct((num, *shape), dtype) for shape in rest]
    return BrownianInterval(
        jnp.float32(0),
        jnp.float32(1),
        structs if len(structs) > 1 else structs[0],
        jr.key(1),
        dt=jnp.float32(0.125),
        levels=3,
        levy_area=diffrax.SpaceTimeLevyArea,
        rows=rows,
    )


def increments(path):
    """Of a cell, of half of one, and of a query that is neither."""
    t0, t1 = jnp.float32([[0.25, 0.25, 0.22], [0.375, 0.3125, 0.71]])
    query = lambda t0, t1: path.evaluate(t0, t1, use_levy=True)
    inc = jax.vmap(query)(t0, t1)
    return [jnp.asarray(x, jnp.result_type(x)) for x in jax.tree.leaves((inc.W, inc.H))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, total, num, rest",
    [
        (jnp.float32, 6, 2, [(3,)]),
        # An odd number of numbers: two of a hash are in different parts.
        (jnp.float32, 5, 2, [(), (1, 3)]),
        (jnp.float64, 4, 3, [(3,)]),
        (jnp.float16, 4, 3, [(3,)]),
        (jnp.complex64, 3, 2, [(1,)]),
    ],
)
def test_rows_are_those_of_the_whole(dtype, total, num, rest):
    tol = max(float(jnp.finfo(dtype).eps), 1e-7) * 8
    firsts = jnp.arange(total - num + 1)

    @jax.jit
    def both():
        of_rows = lambda i: increments(make(num, dtype, rest, (i, total)))
        return increments(make(total, dtype, rest)), jax.vmap(of_rows)(firsts)

    for whole, parts in zip(*both(), strict=True):
        for i in firsts:
            expected = whole[:, i : i + num]
            np.testing.assert_allclose(parts[i], expected, rtol=tol, atol=tol)


@pytest.mark.slow
def test_first_row_of_one_that_is_one_number():
    for num in (1, 2):
        path = BrownianInterval(0.0, 1.0, (num,), jr.key(0))
        whole = path.evaluate(0.0, 1.0)
        for i in range(num):
            one = BrownianInterval(0.0, 1.0, (1,), jr.key(0), rows=(i, num))
            assert one.evaluate(0.0, 1.0) == whole[i]


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_double_precision_is_that_of_jax(dtype):
    like = jax.ShapeDtypeStruct((5, 3), dtype)
    ours, theirs = draw(jr.key(3), like, None), jr.normal(jr.key(3), (5, 3), dtype)
    np.testing.assert_allclose(ours, theirs, rtol=1e-15)


def test_rows_that_are_none(monkeypatch):
    # Users do not have the type checks that the tests have.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for rows, message in [
        ((4, 5), "not among those of the batch"),
        ((-1, 5), "not among those of the batch"),
        ((2**32, 5), "not among those of the batch"),
        ((0, 2**31), "less than 2\\*\\*31 numbers"),
        ((0, 5.0), "must have an integer `total`"),
        ((0.0, 5), "must have an integer `first`"),
    ]:
        with pytest.raises(ValueError, match=message):
            BrownianInterval(0.0, 1.0, (2,), jr.key(0), rows=rows)
    with pytest.raises(ValueError, match="less than"):
        area = diffrax.SpaceTimeTimeLevyArea
        BrownianInterval(0.0, 1.0, (2, 2), jr.key(0), rows=(0, 2**29), levy_area=area)
    with pytest.raises(ValueError, match="same number of rows"):
        BrownianInterval(0.0, 1.0, (), jr.key(0), rows=(0, 5))

    @jax.jit
    def traced(first):
        path = BrownianInterval(0.0, 1.0, (2,), jr.key(0), rows=(first, 5))
        return path.evaluate(0.0, 1.0)

    whole = BrownianInterval(0.0, 1.0, (5,), jr.key(0)).evaluate(0.0, 1.0)
    np.testing.assert_allclose(traced(3), whole[3:], rtol=1e-12)
    assert jnp.isnan(traced(4)).all()
    with jax.threefry_partitionable(False):
        with pytest.raises(ValueError, match="jax_threefry_partitionable"):
            BrownianInterval(0.0, 1.0, (2,), jr.key(0), rows=(0, 5))
