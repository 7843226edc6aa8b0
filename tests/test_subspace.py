"""What a fitted subspace says of models, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import subspace
from jaxsub.linalg.gram import CHUNK

SHAPE = (3, CHUNK + 5)  # chunks of features, and a rest


def linear(rng, dtype):
    size = int(np.prod(SHAPE))
    basis = np.linalg.qr(rng.standard_normal((size, 4)))[0].T
    given = (jnp.asarray(a, dtype) for a in (rng.standard_normal(size), basis))
    return subspace.LinearSubspace(*given, None, SHAPE, None, None)


def tucker(rng, dtype, mean_shape=SHAPE):
    frames = {axis: np.linalg.qr(rng.standard_normal((size, 2)))[0].T for axis, size in enumerate(SHAPE)}
    factors = {axis: jnp.asarray(frame, dtype) for axis, frame in frames.items()}
    return subspace.TuckerSubspace(jnp.asarray(rng.standard_normal(mean_shape), dtype), factors, {}, SHAPE, None, None)


def rebuilt(space, c):
    mean = np.asarray(space.mean, np.float64)
    if isinstance(space, subspace.LinearSubspace):
        return (mean + c @ np.asarray(space.basis, np.float64)).reshape(-1, *SHAPE)
    return mean + np.einsum("nkl,ki,lj->nij", c, *(np.asarray(f, np.float64) for f in space.factors.values()))


@pytest.mark.parametrize("stored", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("make", [linear, tucker, lambda rng, dtype: tucker(rng, dtype, (1, 1))])
def test_what_is_missed_of_models_is_measured_entry_by_entry(make, stored):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        space = make(rng, "float64" if stored == "float64" else "float32")
        x = jnp.asarray(rng.standard_normal((7, *SHAPE)), stored)
        c = subspace.project(space, x)[:5]  # other models follow
        exact, tolerance = np.asarray(x, np.float64)[:5], 1e-12 if stored == "float64" else 2e-6
        for given in (x, np.asarray(x)):
            norms, left = subspace.missed(space, given, c)
            np.testing.assert_allclose(norms, np.square(exact).sum((1, 2)), rtol=1e-12)
            np.testing.assert_allclose(left, np.square(exact - rebuilt(space, c)).sum((1, 2)), rtol=tolerance)
        mean = np.broadcast_to(rebuilt(space, 0 * c.astype(np.float64)), exact.shape)
        np.testing.assert_allclose(subspace.from_mean(space, x)[:5], np.square(exact - mean).sum((1, 2)), rtol=1e-12)


def test_a_small_miss_beside_large_weights_is_not_lost():
    """Squares of differences, never differences of squares: those keep 1e-16 of the norm, here more than the miss."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        space = linear(rng, "float64")
        x = rebuilt(space, 1e3 * rng.standard_normal((2, 4)))
        x[:, 0, 0] += 1e-7
        c = subspace.project(space, x)
        _, left = subspace.missed(space, jnp.asarray(x), c)
        np.testing.assert_allclose(left, np.square(x - rebuilt(space, c)).sum((1, 2)), rtol=1e-2)
        assert np.all(left < 1e-13) and np.all(left > 1e-15)


@pytest.mark.parametrize("make", [linear, tucker])
def test_models_may_come_as_rows(make):
    rng = np.random.default_rng(2)
    space = make(rng, "float32")
    x = rng.standard_normal((3, *SHAPE)).astype(np.float32)
    np.testing.assert_array_equal(space.project(x), space.project(x.reshape(3, -1)))
    with pytest.raises(Exception, match="the subspace is of"):
        space.project(x[:, :, :-1])
