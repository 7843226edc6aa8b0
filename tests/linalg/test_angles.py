"""Principal angles and distances against explicit projectors, where cosines alone see nothing, and against chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from jaxsub import errors
from jaxsub.linalg import angles, frames, reference_geometry as reference
from tests.linalg.matrices import frame

pytestmark = pytest.mark.usefixtures("x64")


def rotated(a, thetas, seed=1):
    """A basis, in random order, whose principal angles to a are exactly `thetas`."""
    k = len(a)
    whole = np.linalg.qr(np.concatenate([a, frame(k, a.shape[1], seed)]).T)[0].T
    whole[:k] = a
    turned = np.cos(thetas)[:, None] * a + np.sin(thetas)[:, None] * whole[k:]
    return frame(k, k, seed + 1) @ turned


@pytest.mark.parametrize("shapes", [(1, 1, 1), (1, 1, 7), (3, 3, 7), (2, 5, 7), (5, 2, 7), (7, 7, 7), (4, 4, 5000)])
def test_angles_and_distances_equal_the_twin(shapes):
    k1, k2, d = shapes
    a, b = frame(k1, d), frame(k2, d, 1)
    got = np.asarray(angles.principal_angles(a, b))
    assert (np.diff(got) >= -1e-12).all() and got.shape == (min(k1, k2),)
    # Both sides lose the square root of rounding nowhere: eps times a few sums of d terms.
    np.testing.assert_allclose(got, reference.principal_angles(a, b), atol=1e-13)
    np.testing.assert_allclose(angles.principal_angles(b, a), got, atol=1e-13)
    if d < 100:
        np.testing.assert_allclose(angles.projector_distance(a, b), reference.projector_distance(a, b), atol=1e-13)
    cosines = np.cos(got)
    np.testing.assert_allclose(angles.mean_squared_cosine(a, b), np.mean(cosines**2), atol=1e-13)


def test_angles_are_right_from_tiny_to_right():
    a = frame(6, 3000)
    thetas = np.array([1e-12, 1e-9, 1e-4, 0.7, np.pi / 2 - 1e-9, np.pi / 2])
    b = rotated(a, thetas)
    got = np.asarray(angles.principal_angles(a, b))
    np.testing.assert_allclose(got, thetas, rtol=0, atol=2e-15)
    np.testing.assert_allclose(got[1], 1e-9, rtol=1e-6)
    # The weak variant: arccosines only.
    weak = np.sort(np.arccos(np.minimum(np.linalg.svd(a @ b.T, compute_uv=False), 1)))
    assert abs(weak[1] - 1e-9) > 0.9e-9
    tiny = rotated(a[:2], np.array([1e-9, 2e-9]))
    distance = angles.projector_distance(a[:2], tiny)
    np.testing.assert_allclose(distance, np.sqrt(5) * 1e-9, rtol=1e-5)
    weak = np.sqrt(max(2 - np.square(a[:2] @ tiny.T).sum(), 0))
    assert abs(weak - distance) > 0.5 * distance


def test_identical_and_orthogonal_subspaces():
    a = frame(4, 9)
    other = frame(4, 4, 2) @ a
    np.testing.assert_allclose(angles.principal_angles(a, other), 0, atol=2e-15)
    assert angles.projector_distance(a, other) < 5e-15
    assert angles.mean_squared_cosine(a, other) == pytest.approx(1, abs=1e-14)
    eye = np.eye(9)
    np.testing.assert_allclose(angles.principal_angles(eye[:3], eye[3:7]), np.pi / 2, atol=1e-15)
    assert angles.mean_squared_cosine(eye[:3], eye[3:7]) == 0
    assert angles.projector_distance(eye[:3], eye[3:6]) == pytest.approx(np.sqrt(3))
    assert angles.projector_distance(eye[:3], eye[3:7]) == pytest.approx(np.sqrt(3.5))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_angles_do_not_see_the_basis(seed):
    a, b = frame(3, 12, seed), frame(4, 12, seed + 1)
    got = angles.principal_angles(frame(3, 3, seed + 2) @ a, frame(4, 4, seed + 3) @ b)
    np.testing.assert_allclose(got, angles.principal_angles(a, b), atol=1e-13)
    whole = frame(12, 12, seed + 4)
    np.testing.assert_allclose(angles.principal_angles(a @ whole, b @ whole), got, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2), ("float32", 2e-6), ("float64", 1e-13)])
def test_dtypes(dtype, tolerance):
    a, b = jnp.asarray(frame(3, 400), dtype), jnp.asarray(frame(3, 400, 1), dtype)
    got = angles.principal_angles(a, b)
    assert got.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    np.testing.assert_allclose(got, reference.principal_angles(frame(3, 400), frame(3, 400, 1)), atol=tolerance)
    # Stored bases are orthonormal to the storage dtype only: identical subspaces show it until orthonormalised again.
    again = angles.principal_angles(frames.qr(a), frame(3, 3) @ np.asarray(frames.qr(a)))
    np.testing.assert_allclose(again, 0, atol=5e-7 if dtype != "float64" else 1e-14)


@pytest.mark.slow
def test_derivatives_are_right_and_stay_finite():
    a, b = frame(3, 6), frame(3, 6, 1)

    def total(m):
        return jnp.sum(jnp.sin(angles.principal_angles(frames.qr(m), b)))

    check_grads(total, (jnp.asarray(a),), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
    check_grads(lambda m: angles.projector_distance(frames.qr(m), b), (jnp.asarray(a),), order=1, atol=1e-6, rtol=1e-6)
    repeated = rotated(b, np.full(3, 0.4))
    orthogonal = np.eye(6)[:3] @ np.linalg.qr(np.concatenate([b, frame(3, 6, 4)]).T)[0].T[::-1]
    for start in (b, repeated, orthogonal):
        assert np.isfinite(jax.grad(lambda m: jnp.sum(angles.principal_angles(m, b)))(jnp.asarray(start))).all()
        assert np.isfinite(jax.grad(lambda m: angles.projector_distance(m, b))(jnp.asarray(start))).all()


@pytest.mark.slow
def test_chance_levels():
    # methods.md names 87.0, 83.9 and 82.7; full-size draws give 82.92 +- 0.04 for the last.
    for d, degrees in ((4096, 87.0), (1024, 83.9), (768, 83.0)):
        got = angles.chance_angles(16, 16, d, num_pairs=400, key=jax.random.key(d))
        assert np.degrees(got.mean) == pytest.approx(degrees, abs=0.1)
        assert np.degrees(got.error) < 0.03
        assert np.mean(got.angles) == pytest.approx(float(got.mean))


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [(4, 4, 6), (3, 3, 3), (2, 3, 12), (5, 3, 6)])
def test_chance_draws_have_the_distribution_of_full_size_draws(dimensions):
    k1, k2, d = dimensions
    found = [reference.principal_angles(frame(k1, d, 2 * i), frame(k2, d, 2 * i + 1)) for i in range(600)]
    got = angles.chance_angles(k1, k2, d, num_pairs=4000, key=jax.random.key(0))
    spread = np.std(found, axis=0) / np.sqrt(600) + 1e-12
    assert (np.abs(np.mean(found, axis=0) - got.angles) < 5 * spread).all()
    squares = np.mean(np.square(np.cos(found)), axis=1)
    level = angles.chance_squared_cosine(k1, k2, d)
    assert level.mean == max(k1, k2) / d
    assert abs(np.mean(squares) - level.mean) < 5 * level.deviation / np.sqrt(600) + 1e-12
    assert np.std(squares) == pytest.approx(level.deviation, rel=0.2, abs=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (6, 5), (5,), (2, 3, 5)])
def test_what_is_no_subspace_is_refused(shape):
    with pytest.raises(errors.ConfigError, match="expected \\(k, D\\) with 1 <= k <= D"):
        angles.principal_angles(np.zeros(shape), frame(2, 5))


def test_other_refusals():
    with pytest.raises(errors.ConfigError, match="a has shape \\(2, 5\\) and b \\(2, 6\\)"):
        angles.projector_distance(frame(2, 5), frame(2, 6))
    with pytest.raises(errors.ConfigError, match="dtype int"):
        angles.mean_squared_cosine(np.eye(3, dtype=int), frame(2, 3))
    with pytest.raises(errors.ConfigError, match="k1 is 4"):
        angles.chance_squared_cosine(4, 1, 3)
    with pytest.raises(errors.ConfigError, match="num_pairs is 1"):
        angles.chance_angles(1, 1, 3, num_pairs=1, key=jax.random.key(0))
