"""Products of rows with themselves in blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub.linalg import symmetric

pytestmark = pytest.mark.usefixtures("x64")
SIZES = [1, 2, 127, 128, 129, 255, 256, 257, 500]


@pytest.mark.parametrize("size", SIZES)
def test_blocks_put_together_are_the_whole_product(size):
    y = np.random.default_rng(size).normal(size=(size, 40))
    np.testing.assert_allclose(symmetric.assemble(symmetric.multiply(jnp.asarray(y)), size), y @ y.T, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_sums_keep_their_own_dtype(size):
    """A term lost in the dtype of the products, 2^-14 beside 2^12, is kept by the sums."""
    large = jnp.full((size, 1), 64.0, "float32")
    small = jnp.asarray(np.random.default_rng(size).choice([-(2.0**-7), 2.0**-7], size=(size, 1)), "float32")
    sums = symmetric.zeros(size, "float64")
    for y in (large, small):
        sums = symmetric.add(sums, symmetric.multiply(y))
    whole = symmetric.assemble(sums, size)
    assert whole.dtype == "float64"
    np.testing.assert_array_equal(whole, 64.0**2 + np.float64(small) @ np.float64(small).T)


@pytest.mark.parametrize(("size", "most"), [(128, 0.75), (200, 0.75), (256, 0.625), (500, 0.625), (4096, 0.625)])
def test_less_is_multiplied_than_the_whole(size, most):
    assert sum(block.size for block in symmetric.zeros(size, "float32")) <= most * size**2
