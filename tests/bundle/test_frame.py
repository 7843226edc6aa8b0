"""The frame of a refit: orthonormal rows that hold a basis and all of the new models."""

import jax
import numpy as np
import pytest

from jaxsub.bundle import refit


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
        frame = refit._rows_of(basis.astype(dtype), new.astype(dtype))
    assert len(frame) == 4 + 8
    wide = frame.astype(np.float64)
    np.testing.assert_allclose(wide @ wide.T, np.eye(len(frame)), atol=40 * eps)
    np.testing.assert_allclose((basis @ wide.T) @ wide, basis, atol=40 * eps)
    lost = new - (new @ wide.T) @ wide
    assert np.sqrt(np.square(lost).sum(1)).max() < refit.ROUNDINGS * eps * np.sqrt(np.square(new).sum(1)).max()


@pytest.mark.parametrize("count", [0, 3])
def test_models_that_the_basis_holds_add_nothing(count):
    rng = np.random.default_rng(1)
    basis = orthonormal(rng, 5, 700).astype(np.float32)
    with jax.enable_x64(True):
        frame = refit._rows_of(basis, (rng.standard_normal((count, 5)) @ basis).astype(np.float32))
    assert frame.shape == (5, 700)


def test_a_basis_that_is_not_orthonormal_is_made_so():
    """As one of 8-bit numbers is; where rows are nearly parallel or zero LAPACK does it."""
    rng = np.random.default_rng(2)
    rows = orthonormal(rng, 4, 900)
    for given in (rows * [[1], [0.9], [1.1], [1]], rows + 0.999 * rows[::-1], rows * [[1], [0], [1], [1]]):
        with jax.enable_x64(True):
            found = refit._make_orthonormal(given.astype(np.float32)).astype(np.float64)
        np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
        np.testing.assert_allclose((given @ found.T) @ found, given, atol=1e-5)


def test_more_models_than_weights_fill_the_space():
    rng = np.random.default_rng(3)
    basis, new = orthonormal(rng, 2, 20).astype(np.float32), rng.standard_normal((50, 20)).astype(np.float32)
    with jax.enable_x64(True):
        frame = refit._rows_of(basis, new)
    assert frame.shape == (20, 20)
    np.testing.assert_allclose(frame @ frame.T, np.eye(20), atol=1e-5)
