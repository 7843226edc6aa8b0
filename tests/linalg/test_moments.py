"""Adding and removing models against recomputing, where a common base would cancel."""

import jax
import numpy as np
import pytest

from jaxsub import errors, placement
from jaxsub.linalg import gram, modes, moments, reference_geometry as reference
from tests.linalg.matrices import place

pytestmark = pytest.mark.usefixtures("x64")


def rows(n, d=8 * 640, seed=0, spread=1.0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (offset * np.random.default_rng(99).standard_normal(d) + spread * rng.standard_normal((n, d))).astype(
        np.float32
    )


def dense(x, devices, dtype):
    mesh, weights = placement.make_mesh(devices), np.zeros((0, len(x)), np.float32)
    return gram.dense_gram(place(x, mesh), weights, mesh=mesh, dtype=dtype)[0]


def border(old, new, mean, devices, dtype):
    mesh = placement.make_mesh(devices)
    return moments.border(*(place(a, mesh) for a in (old, new, mean)), mesh=mesh, dtype=dtype)


def compare(got, x, tolerance):
    for found, want in zip(got[:3], reference.moments(x), strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("counts", [(1, 1), (5, 1), (1, 6), (20, 12)])
def test_adding_equals_recomputing(devices, counts):
    old, new = rows(counts[0]), rows(counts[1], seed=1)
    mean = old.astype(np.float64).mean(0)
    found = moments.add_models(dense(old, devices, "float64"), border(old, new, mean, devices, "float64"))
    compare(found, np.concatenate([old, new]), 1e-13)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-9)])
def test_a_common_base_does_not_cancel(dtype, tolerance):
    """Deviations of 1e-4 of the base: what the raw inner products leave of the Gram matrix is rounding."""
    old, new = (rows(n, seed=n, spread=1e-4, offset=1) for n in (12, 4))
    both = np.concatenate([old, new])
    mean = old.astype(np.float64).mean(0)
    found = moments.add_models(dense(old, 1, dtype), border(old, new, mean, 1, dtype))
    exact = reference.moments(both)
    assert np.abs(found.gram - exact[0]).max() < tolerance * exact[0].max()
    np.testing.assert_allclose(found.cross, exact[1], atol=1e-5 * np.abs(exact[1]).max())
    assert found.mean_square == pytest.approx(exact[2], rel=1e-7)
    h = np.eye(16) - 1 / 16
    weak = h @ (both @ both.T).astype(np.float64) @ h
    assert np.abs(weak - exact[0]).max() > 0.1 * exact[0].max()
    # And a mean kept in float32, instead of float64, shows in the border.
    rough = moments.add_models(dense(old, 1, dtype), border(old, new, mean.astype(np.float32) * 1.0, 1, dtype))
    if dtype == "float64":
        assert np.abs(rough.gram - exact[0]).max() > 2 * np.abs(found.gram - exact[0]).max()


@pytest.mark.slow
def test_removing_equals_recomputing_and_undoes_adding():
    x = rows(14, offset=0.5)
    whole = dense(x, 1, "float64")
    for keep in ([3], [0, 1, 2, 5, 13], [13, 4, 4, 4], list(range(14))):
        compare(moments.remove_models(whole, np.array(keep)), x[keep], 1e-12)
    old, new = x[:9], x[9:]
    mean = old.astype(np.float64).mean(0)
    added = moments.add_models(dense(old, 1, "float64"), border(old, new, mean, 1, "float64"))
    compare(moments.remove_models(added, np.arange(9)), old, 1e-12)


def test_borders_add_over_blocks_and_zero_columns_do_not_show():
    old, new = rows(5), rows(3, seed=1)
    mean = old.astype(np.float64).mean(0)
    whole = border(old, new, mean, 1, "float64")
    pieces = [border(old[:, s], new[:, s], mean[s], 1, "float64") for s in (slice(0, 1111), slice(1111, None))]
    for got, want in zip(jax.tree.map(np.add, *pieces), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-9)
    padded = border(*(np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, 64)]) for a in (old, new, mean)), 1, "float64")
    np.testing.assert_allclose(padded.side, whole.side, rtol=1e-12, atol=1e-9)


def test_the_mean_survives_a_large_offset():
    x = rows(64, 500, offset=1e6, spread=1e-2)
    exact = x.astype(np.float64).mean(0)
    mean = x[:4].astype(np.float64).mean(0)
    naive = x[:4].sum(0)
    for j in range(4, 64, 4):
        mean = moments.shift_mean(mean, j, x[j : j + 4])
        naive = naive + x[j : j + 4].sum(0)  # a float32 running sum, divided at the end
    np.testing.assert_allclose(mean, exact, rtol=1e-15)
    assert np.abs(naive / 64 - exact).max() > 1e-2  # more than the models differ
    back = moments.shift_mean(mean, 64, x[10:], remove=True)
    np.testing.assert_allclose(back, x[:10].astype(np.float64).mean(0), rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2), (7,)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-11)])
def test_mode_grams_of_added_and_removed_models(shape, dtype, tolerance):
    x = rows(11, int(np.prod(shape)), spread=1e-2, offset=1)
    size = x.shape[1]
    for axis in range(len(shape)):
        old = modes.mode_gram(x[:7], shape=shape, axis=axis, dtype="float64")
        whole = np.asarray(modes.mode_gram(x, shape=shape, axis=axis, dtype="float64"))
        padded = np.pad(x, ((0, 0), (0, 3)))
        settings = dict(shape=shape, axis=axis, dtype=dtype)
        means = [x[:7].astype(np.float64).mean(0), x.astype(np.float64).mean(0)]
        added = moments.shift_mode_gram(old, means[0], 7, padded[7:], **settings)
        np.testing.assert_allclose(added, whole, atol=tolerance * whole.max())
        removed = moments.shift_mode_gram(whole, means[1], 11, padded[7:], remove=True, **settings)
        np.testing.assert_allclose(removed, old, atol=tolerance * whole.max())
        # Without the shift of the mean the two parts do not add up.
        own = modes.mode_gram(padded[7:], shape=shape, axis=axis, dtype="float64")
        assert np.abs(old + own - whole).max() > 1e-3 * whole.max()
        assert size == x.shape[1]


def test_bfloat16_rows_accumulate_wider():
    import ml_dtypes

    x = rows(9, 4096, offset=3).astype(ml_dtypes.bfloat16)
    mean = x[:6].astype(np.float64).mean(0)
    found = moments.add_models(dense(x[:6], 1, "float32"), border(x[:6], x[6:], mean, 1, "float32"))
    compare(found, x.astype(np.float64), 1e-6)


def test_refusals():
    found = dense(rows(3), 1, "float64")
    with pytest.raises(errors.ConfigError, match="need the same features"):
        border(np.ones((2, 8)), np.ones((2, 9)), np.ones(8), 1, "float64")
    with pytest.raises(errors.ConfigError, match="the border is of 2 old models, the moments of 3"):
        moments.add_models(found, border(np.ones((2, 8)), np.ones((2, 8)), np.ones(8), 1, "float64"))
    with pytest.raises(errors.ConfigError, match="at least one index"):
        moments.remove_models(found, np.zeros(0, int))
    with pytest.raises(errors.ConfigError, match="mode_gram has shape"):
        moments.shift_mode_gram(np.eye(3), np.ones(8), 2, np.ones((2, 8)), shape=(2, 4), axis=0, dtype="float64")
