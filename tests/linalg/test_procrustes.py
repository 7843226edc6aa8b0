"""Procrustes rotations: planted ones come back, nothing else is closer, and two bases of one span align."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import linalg

from jaxsub import errors
from jaxsub.linalg import angles, procrustes, reference_geometry as reference

pytestmark = pytest.mark.usefixtures("x64")


def rotation(k, seed, determinant):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((k, k)))[0]
    q[0] *= np.sign(np.linalg.det(q)) * determinant
    return q


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("allow_reflection", [True, False])
def test_planted_rotations_come_back(k, determinant, allow_reflection):
    a = np.random.default_rng(k).standard_normal((12, k))
    planted = rotation(k, 7, determinant)
    found = procrustes.rotate_points(a, 2.5 * a @ planted, allow_reflection=allow_reflection)
    want = reference.rotate_points(a, 2.5 * a @ planted, allow_reflection=allow_reflection)
    np.testing.assert_allclose(found.rotation, want, atol=1e-13)
    if allow_reflection or determinant == 1:
        np.testing.assert_allclose(found.rotation, planted, atol=1e-13)
        assert found.scale == pytest.approx(2.5)
    else:
        assert np.linalg.det(found.rotation) == pytest.approx(1)
        assert np.abs(found.rotation - planted).max() > 0.1


def test_distance_equals_scipy_and_does_not_cancel():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 4)), rng.standard_normal((30, 4))
    found = procrustes.rotate_points(a, b)
    np.testing.assert_allclose(found.rotation, linalg.orthogonal_procrustes(a, b)[0], atol=1e-13)
    assert found.distance == pytest.approx(np.linalg.norm(a @ np.asarray(found.rotation) - b))
    near = a @ rotation(4, 1, 1) + 1e-9 * b
    distance = procrustes.rotate_points(a, near).distance
    # The rotation takes up some of the perturbation: 6 of 120 dimensions.
    assert 0.9e-9 < distance / np.linalg.norm(b) < 1e-9
    s = np.linalg.svd(a.T @ near, compute_uv=False).sum()
    weak = np.sqrt(max(np.sum(a**2) + np.sum(near**2) - 2 * s, 0))
    assert abs(weak - distance) > distance / 2


def test_bases_of_one_span_align():
    b = np.linalg.qr(np.random.default_rng(3).standard_normal((50, 4)))[0].T
    aligned, found = procrustes.align_basis(rotation(4, 5, -1) @ b, b)
    np.testing.assert_allclose(aligned, b, atol=1e-14)
    assert found.distance < 1e-14 and found.scale == pytest.approx(1)
    other = np.linalg.qr(np.random.default_rng(4).standard_normal((50, 4)))[0].T
    _, found = procrustes.align_basis(other, b)
    half = np.asarray(angles.principal_angles(other, b)) / 2
    assert found.distance == pytest.approx(2 * np.sqrt(np.sum(np.sin(half) ** 2)))
    _, proper = procrustes.align_basis(rotation(4, 5, -1) @ b, b, allow_reflection=False)
    assert np.linalg.det(proper.rotation) == pytest.approx(1) and proper.distance > 1


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2), ("float32", 1e-6), ("float64", 1e-13)])
def test_dtypes(dtype, tolerance):
    a = np.random.default_rng(1).standard_normal((40, 3))
    planted = rotation(3, 2, 1)
    found = procrustes.rotate_points(jnp.asarray(a, dtype), jnp.asarray(a @ planted, dtype))
    np.testing.assert_allclose(found.rotation, planted, atol=tolerance)


@pytest.mark.slow
def test_derivatives():
    rng = np.random.default_rng(5)
    a, b, w = rng.standard_normal((9, 3)), rng.standard_normal((9, 3)), rng.standard_normal((3, 3))
    for allow in (True, False):
        check_grads(
            lambda a, allow=allow: jnp.sum(w * procrustes.rotate_points(a, b, allow_reflection=allow).rotation),
            (jnp.asarray(a),), order=1, atol=1e-6, rtol=1e-6,
        )  # fmt: skip
    # Repeated singular values, coinciding points, a missing dimension, nothing at all.
    eye, flat = np.eye(3), np.diag([1.0, 1.0, 0.0])
    for a in (eye, flat, np.zeros((3, 3))):
        for b in (eye, np.diag([1.0, 1, -1])):
            for allow in (True, False):
                found = jax.jacobian(lambda a, b=b, allow=allow: procrustes.rotate_points(a, b, allow_reflection=allow))
                assert all(np.isfinite(x).all() for x in found(jnp.asarray(a)))
                assert all(np.isfinite(x).all() for x in procrustes.rotate_points(a, b, allow_reflection=allow))


def test_refusals():
    with pytest.raises(errors.ConfigError, match="both need the same shape"):
        procrustes.rotate_points(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(errors.ConfigError, match="same shape"):
        procrustes.rotate_points(np.ones((0, 2)), np.ones((0, 2)))
    with pytest.raises(errors.ConfigError, match="both need the same shape"):
        procrustes.align_basis(np.eye(5)[:2], np.eye(5)[:3])
