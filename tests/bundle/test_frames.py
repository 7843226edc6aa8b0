"""The frame of a refit: orthonormal rows that hold a basis and all of the new models."""

import jax
import numpy as np
import pytest

from jaxsub.bundle import frames
from jaxsub.linalg import mode_gram


def orthonormal(rng, count, width):
    return np.linalg.qr(rng.standard_normal((width, count)))[0].T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [300, 5000])
def test_directions_are_held_down_to_rounding_and_no_further(width, dtype):
    """Of float32 models too those of 1e-4: a Gram matrix in float32 would take all under 3e-3 for noise."""
    rng, eps = np.random.default_rng(width), np.finfo(dtype).eps
    all_rows = orthonormal(rng, 4 + 12, width)
    basis, fresh = all_rows[:4], all_rows[4:]
    sizes = np.array([1, 0.5, 1e-1, 1e-2, 1e-3, 3e-4, 1e-4, 1e-4, eps / 100, 0, 0, 0])  # eps / 100 is not resolved
    new = orthonormal(rng, 12, 12) @ (sizes[:, None] * fresh) + rng.standard_normal((12, 4)) @ basis
    with jax.enable_x64(True):
        frame = frames._rows_of(basis.astype(dtype), new.astype(dtype))
    assert len(frame) == 4 + 8
    wide = frame.astype(np.float64)
    np.testing.assert_allclose(wide @ wide.T, np.eye(len(frame)), atol=40 * eps)
    np.testing.assert_allclose((basis @ wide.T) @ wide, basis, atol=40 * eps)
    lost = new - (new @ wide.T) @ wide
    assert np.sqrt(np.square(lost).sum(1)).max() < frames.ROUNDINGS * eps * np.sqrt(np.square(new).sum(1)).max()


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", [(40, 30), (30, 200)])
def test_directions_of_an_axis_are_held_down_to_rounding_and_no_further(shape, axis):
    """As of rows: in float32 the Gram matrix would take all under 3e-3 for noise."""
    rng, eps, size = np.random.default_rng(axis), np.finfo(np.float32).eps, shape[axis - 1]
    all_rows, rest = orthonormal(rng, 3 + 9, size), shape[2 - axis]
    sizes = np.array([1, 1, 1, 1, 0.1, 1e-2, 1e-3, 3e-4, 1e-4, eps / 100, 0, 0])
    y = np.einsum("nrk,k,kd->nrd", rng.standard_normal((6, rest, 12)) / rest**0.5, sizes, all_rows)
    y = np.ascontiguousarray(np.moveaxis(y, 2, axis)).astype(np.float32)
    with jax.enable_x64(True):
        frame = frames._axis_of(all_rows[:3].astype(np.float32), y, axis)
    assert len(frame) == 3 + 6
    wide, rows = frame.astype(np.float64), np.moveaxis(y.astype(np.float64), axis, 2)
    np.testing.assert_allclose(wide @ wide.T, np.eye(len(frame)), atol=40 * eps)
    np.testing.assert_allclose((all_rows[:3] @ wide.T) @ wide, all_rows[:3], atol=40 * eps)
    lost, norms = np.linalg.norm(rows - (rows @ wide.T) @ wide, axis=(1, 2)), np.linalg.norm(rows, axis=(1, 2))
    assert lost.max() < frames.ROUNDINGS * eps * norms.max()
    with jax.enable_x64(True):
        weak = np.linalg.eigvalsh(np.asarray(mode_gram.mode_gram(y, axis=axis, dtype="float32")))
    assert (weak > 64 * eps * weak[-1]).sum() < 3 + 6  # all that it resolves


def test_an_axis_that_new_models_fill_is_held_whole():
    rng = np.random.default_rng(3)
    rows, y = orthonormal(rng, 2, 20).astype(np.float32), rng.standard_normal((5, 20, 30)).astype(np.float32)
    with jax.enable_x64(True):
        frame = frames._axis_of(rows, y, 1)
    np.testing.assert_allclose(frame @ frame.T, np.eye(20), atol=1e-5)


@pytest.mark.parametrize("count", [0, 3])
def test_models_that_the_basis_holds_add_nothing(count):
    rng = np.random.default_rng(1)
    basis = orthonormal(rng, 5, 700).astype(np.float32)
    with jax.enable_x64(True):
        frame = frames._rows_of(basis, (rng.standard_normal((count, 5)) @ basis).astype(np.float32))
    assert frame.shape == (5, 700)


def test_a_basis_that_is_not_orthonormal_is_made_so():
    """As one of 8-bit numbers is; where rows are nearly parallel or zero LAPACK does it."""
    rng = np.random.default_rng(2)
    rows = orthonormal(rng, 4, 900)
    for given in (rows * [[1], [0.9], [1.1], [1]], rows + 0.999 * rows[::-1], rows * [[1], [0], [1], [1]]):
        with jax.enable_x64(True):
            found = frames._make_orthonormal(given.astype(np.float32)).astype(np.float64)
        np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
        np.testing.assert_allclose((given @ found.T) @ found, given, atol=1e-5)


def test_more_models_than_weights_fill_the_space():
    rng = np.random.default_rng(3)
    basis, new = orthonormal(rng, 2, 20).astype(np.float32), rng.standard_normal((50, 20)).astype(np.float32)
    with jax.enable_x64(True):
        frame = frames._rows_of(basis, new)
    assert frame.shape == (20, 20)
    np.testing.assert_allclose(frame @ frame.T, np.eye(20), atol=1e-5)
