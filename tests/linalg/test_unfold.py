"""Unfolding, products and merged axes against their definitions, on every path the kernels take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import errors
from jaxsub.linalg import mode_gram, reference_tucker as reference, unfold
from tests.selected import first

SHAPES = [(5, 7, 9), (6, 300, 4), (3, 260, 300), (2, 130, 3, 3), (16, 8, 6, 3, 3), (1, 5, 1), (61, 67, 5), (7,), (2, 1)]


pytestmark = pytest.mark.usefixtures("x64")


def tensor(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_unfolding_equals_the_twin_and_folds_back(shape):
    x = tensor(shape)
    for axis in [*range(len(shape)), -1]:
        u = unfold.unfold(jnp.asarray(x), axis)
        np.testing.assert_array_equal(u, reference.unfold(x, axis))
        np.testing.assert_array_equal(unfold.fold(u, axis, shape), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", first([3, 1]))
def test_mode_products_equal_the_twin(shape, rank):
    x = tensor(shape)
    for axis, size in enumerate(shape):
        f = tensor((rank, size), seed=1)
        want = reference.mode_product(np.float64(x), np.float64(f), axis)
        got = np.asarray(unfold.mode_product(jnp.asarray(x), jnp.asarray(f), axis))
        assert got.dtype == np.float32 and got.shape == want.shape
        assert np.abs(got - want).max() <= 4e-7 * np.sqrt(size) * np.abs(want).max()  # size-term float32 sums


@pytest.mark.parametrize("shape", [(11, 6, 5), (7, 12, 4, 2), (13, 5, 3, 3), (10, 300, 3)])
def test_pieces_change_nothing(shape, monkeypatch):
    """Of few entries each, so that there are many, the last of another length, and blocks of rows within."""
    monkeypatch.setattr(unfold, "PIECE", 40)
    x = tensor(shape, 5)
    factors = [None, *(tensor((2, d), 6 + d) for d in shape[1:])]
    for axis in range(1, len(shape)):
        one = [f if a == axis else None for a, f in enumerate(factors)]
        want = reference.mode_products(x, one)
        np.testing.assert_allclose(unfold.mode_product(x, factors[axis], axis), want, rtol=2e-5, atol=2e-5)
    whole = reference.mode_products(x, factors)
    half = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_allclose(unfold.mode_products(x, factors), whole, rtol=1e-4, atol=1e-4)
    got = unfold.mode_products(half, factors, dtype="float32")
    want = reference.mode_products(np.asarray(half, np.float32), factors)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape, axis", [((3, 0, 2), 1), ((3, 0), 1), ((0, 5), 0), ((0, 5), 1), ((2, 3, 0), 1), ((5, 0, 300), 1)]
)
def test_products_of_nothing_are_zeros_or_nothing(shape, axis):
    got = unfold.mode_product(jnp.zeros(shape), jnp.zeros((4, shape[axis])), axis)
    assert got.shape == (*shape[:axis], 4, *shape[axis + 1 :]) and not np.asarray(got).any()


def test_a_number_that_is_none_stays_in_its_model():
    x = tensor((10, 3, 2))
    x[4, 1, 0] = np.inf
    got = np.asarray(unfold.mode_product(jnp.asarray(x), jnp.asarray(tensor((2, 3), 1)), 1))
    assert np.isfinite(np.delete(got, 4, axis=0)).all() and not np.isfinite(got[4]).all()


def test_products_along_several_axes_commute():
    x, fs = tensor((6, 5, 4, 3)), [tensor((2, 6)), None, tensor((3, 4)), tensor((5, 3))]
    want = reference.mode_products(np.float64(x), fs)
    np.testing.assert_allclose(unfold.mode_products(jnp.asarray(x), fs), want, atol=1e-5)
    skipped = reference.mode_products(np.float64(x), fs, skip=2)
    np.testing.assert_allclose(unfold.mode_products(jnp.asarray(x), fs, skip=2), skipped, atol=1e-5)
    back = reference.mode_products(want, fs, transpose=True)
    np.testing.assert_allclose(unfold.mode_products(jnp.asarray(want), fs, transpose=True), back, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1025, 260), (3, 4097), (4097, 3), (40, 9, 257)])
def test_mode_grams_equal_explicit_unfoldings(shape, dtype, tolerance):
    x = tensor(shape)
    for axis in range(len(shape)):
        u = reference.unfold(np.float64(x), axis)
        got = np.asarray(mode_gram.mode_gram(jnp.asarray(x), axis=axis, dtype=dtype))
        # float32 sums of at most 8192 terms
        assert got.dtype == np.float64 and np.abs(got - u @ u.T).max() <= tolerance * np.abs(u @ u.T).max()


def test_half_precision_is_not_the_dtype_of_the_sums():
    x = jnp.asarray(np.abs(tensor((3, 40, 500))), jnp.bfloat16)
    exact = np.float64(np.asarray(x, np.float32)).reshape(3, -1)
    got = np.asarray(mode_gram.mode_gram(x, axis=0, dtype="float32"))
    assert np.abs(got / (exact @ exact.T) - 1).max() < 1e-6
    u = x.reshape(3, -1)
    weak = np.asarray(jnp.matmul(u, u.T, preferred_element_type=jnp.bfloat16), np.float64)
    assert np.abs(weak / (exact @ exact.T) - 1).max() > 1e-4


def test_merged_spatial_axes_of_convolution_kernels():
    x = tensor((4, 5, 6, 3, 2))
    groups = unfold.spatial_groups(x.ndim)
    assert groups == ((0,), (1,), (2,), (3, 4))
    merged = unfold.merge_axes(jnp.asarray(x), groups)
    np.testing.assert_array_equal(merged, x.reshape(4, 5, 6, 6))
    np.testing.assert_array_equal(unfold.unmerge_axes(merged, groups, x.shape), x)
    other = ((3,), (0, 2), (4, 1))
    merged = unfold.merge_axes(jnp.asarray(x), other)
    np.testing.assert_array_equal(merged, x.transpose(3, 0, 2, 4, 1).reshape(3, 24, 10))
    np.testing.assert_array_equal(unfold.unmerge_axes(merged, other, x.shape), x)
    assert unfold.spatial_groups(3) == ((0,), (1,), (2,))


def test_merging_adjacent_axes_copies_nothing():
    groups = unfold.spatial_groups(5)
    text = jax.jit(lambda x: unfold.merge_axes(x, groups)).lower(jnp.zeros((2, 3, 4, 3, 3))).compile().as_text()
    assert "transpose" not in text


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: unfold.unfold(x, 3), "axis 3 of a tensor with 3 axes"),
        (lambda x: unfold.fold(x[0], 0, (2, 2)), "does not fold"),
        (lambda x: unfold.mode_product(x, x[0], 0), "does not multiply axis 0 of size 2"),
        (lambda x: unfold.mode_products(x, (None,)), "1 factors for a tensor with 3 axes"),
        (lambda x: unfold.merge_axes(x, ((0,), (1,))), "do not hold each of 3 axes once"),
        (lambda x: unfold.unmerge_axes(x, ((0,), (1, 2)), (2, 3, 4)), "does not split"),
    ],
)
def test_wrong_sizes_are_refused(call, words):
    with pytest.raises(errors.ConfigError, match=words):
        call(jnp.zeros((2, 3, 4)))
