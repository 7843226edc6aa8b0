"""What a fitted subspace says of models, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import subspace
from jaxsub.linalg import rebuild
from jaxsub.linalg.gram import CHUNK
from tests.selected import first

SHAPE = (3, CHUNK + 5)  # chunks of features, and a rest


def linear(rng, dtype):
    size = int(np.prod(SHAPE))
    basis = np.linalg.qr(rng.standard_normal((size, 4)))[0].T
    given = (jnp.asarray(a, dtype) for a in (rng.standard_normal(size), basis))
    return subspace.LinearSubspace(*given, None, SHAPE, None, None)


def tucker(rng, dtype, mean_shape=SHAPE, axes=(0, 1)):
    frames = {axis: np.linalg.qr(rng.standard_normal((SHAPE[axis], 2)))[0].T for axis in axes}
    factors = {axis: jnp.asarray(frame, dtype) for axis, frame in frames.items()}
    return subspace.TuckerSubspace(jnp.asarray(rng.standard_normal(mean_shape), dtype), factors, {}, SHAPE, None, None)


def broadcast(rng, dtype):
    return tucker(rng, dtype, (1, 1))


def one_axis(rng, dtype):
    return tucker(rng, dtype, axes=(1,))


def rebuilt(space, c):
    mean = np.asarray(space.mean, np.float64)
    if isinstance(space, subspace.LinearSubspace):
        return (mean + c @ np.asarray(space.basis, np.float64)).reshape(-1, *SHAPE)
    for axis, factor in space.factors.items():
        c = np.moveaxis(np.tensordot(c, np.asarray(factor, np.float64), ([axis + 1], [0])), -1, axis + 1)
    return mean + c


@pytest.mark.parametrize("stored", first(["bfloat16", "float32", "float64"]))
@pytest.mark.parametrize("make", [linear, tucker, broadcast, one_axis])
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
        for given in (x, np.asarray(x)):
            distances = subspace.from_mean(space, given)[:5]
            np.testing.assert_allclose(distances, np.square(exact - mean).sum((1, 2)), rtol=1e-12)


@pytest.mark.parametrize("make", [linear, tucker])
def test_a_model_too_small_for_xla_is_missed_like_the_others(make):
    """XLA takes float32 numbers under 2**-126 for zero, coefficients that stand for such weights too."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        space = make(rng, "float32")
        space = dataclasses.replace(space, mean=0 * space.mean)
        x = rng.standard_normal((3, *SHAPE)).astype(np.float32)
        x[1] *= np.float32(1e-41)
        _, left = subspace.missed(space, jnp.asarray(x), np.zeros((3, *np.shape(subspace.project(space, x))[1:])))
        np.testing.assert_allclose(left, np.square(x.astype(np.float64)).sum((1, 2)), rtol=1e-6)
        c = rng.standard_normal(np.shape(subspace.project(space, x)))
        c[1] *= 1e-40  # float64: the bundle's, where float32 has no room
        x = jnp.asarray(rebuilt(space, c))
        norms, left = subspace.missed(space, x, c)
        assert np.all(left < 1e-12 * norms)


@pytest.mark.parametrize("make", [linear, tucker])
def test_no_models_miss_nothing(make):
    space = make(np.random.default_rng(4), "float32")
    x = np.zeros((0, *SHAPE), np.float32)
    for given in (x, jnp.asarray(x), jnp.zeros((5, *SHAPE))):
        c = subspace.project(space, given)[:0]
        assert [len(one) for one in subspace.missed(space, given, c)] == [0, 0]
    assert subspace.from_mean(space, jnp.asarray(x)).shape == (0,)


def test_models_of_the_host_are_taken_as_they_are():
    """One at a time, without a copy of all: of another byte order too."""
    space = linear(np.random.default_rng(5), "float32")
    x = np.random.default_rng(6).standard_normal((4, *SHAPE)).astype(np.float32)
    c = subspace.project(space, x)
    before = rebuild.missed_rows._cache_size()
    for given in (x.astype(">f4"), x[::-1][::-1]):
        np.testing.assert_array_equal(subspace.missed(space, given, c), subspace.missed(space, x, c))
    assert rebuild.missed_rows._cache_size() == before


@pytest.mark.parametrize("group", [1, 3, 4, 6])
@pytest.mark.parametrize("stored", ["bfloat16", "float32", ">f4", "float64"])
@pytest.mark.parametrize("make", first([linear, tucker]))
def test_models_of_the_host_in_groups_are_missed_as_one_by_one(make, stored, group, monkeypatch):
    rng = np.random.default_rng(8)
    with jax.enable_x64(True):
        space = make(rng, "float64" if stored == "float64" else "float32")
        x = rng.standard_normal((7, *SHAPE)).astype(jnp.bfloat16 if stored == "bfloat16" else stored)
        c = subspace.project(space, x)[:6]
        wanted = subspace.missed(space, x, c), subspace.missed(space, x)
        monkeypatch.setattr(subspace, "GROUP", group * x[0].nbytes)
        ran, by_kernel = [], subspace.rebuild.missed_rows
        monkeypatch.setattr(
            subspace.rebuild, "missed_rows", lambda x, *a, **k: ran.append(len(x)) or by_kernel(x, *a, **k)
        )
        found = subspace.missed(space, x, c), subspace.missed(space, x)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    if make is linear:
        assert set(ran) == {group} and len(ran) == (0 if group == 6 else -(-6 // group)) + -(-7 // group)


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


def test_the_error_of_a_model_that_is_zero_is_relative_to_the_others():
    """Not an absolute norm, which would hang on the unit of the weights."""
    for unit in (1.0, 1e6):
        found = subspace.relative(unit * np.array([1.0, 4.0, 9.0]), unit * np.array([4.0, 0.0, 12.0]))
        np.testing.assert_allclose(found, [0.5, np.sqrt(4 / 8), np.sqrt(9 / 12)])
    np.testing.assert_array_equal(subspace.relative(np.zeros(2), np.zeros(2)), 0.0)
