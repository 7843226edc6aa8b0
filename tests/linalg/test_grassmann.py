"""Geodesics against D x D formulas and identities, up to the cut locus and at coinciding subspaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from jaxsub import errors
from jaxsub.linalg import angles, frames, grassmann, reference_geometry as reference
from tests.linalg.matrices import frame

pytestmark = pytest.mark.usefixtures("x64")


def tangent(x, largest, seed=1):
    h = np.asarray(grassmann.project_tangent(x, np.random.default_rng(seed).standard_normal(x.shape)))
    return h * largest / max(np.linalg.norm(h, 2), 1e-300)


SHAPES = [(1, 2), (1, 9), (3, 9), (8, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [1e-9, 0.3, 1.5])
def test_kernels_equal_their_twins(shape, largest):
    x = frame(*shape)
    h, d = tangent(x, largest), tangent(x, 1.0, 2)
    y = np.asarray(grassmann.exponential(x, h))
    np.testing.assert_allclose(y, reference.exponential(x, h), atol=1e-14)
    np.testing.assert_allclose(grassmann.transport(x, h, d), reference.transport(x, h, d), atol=1e-13)
    # The twin inverts the cosines: eps / cos(1.5) = 14 eps a product.
    np.testing.assert_allclose(grassmann.logarithm(x, y), reference.logarithm(x, y), atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), largest=st.floats(0, 1.5))
def test_identities(seed, largest):
    x, turn = frame(3, 9, seed), frame(3, 3, seed + 9)
    h, d, e = tangent(x, largest, seed + 1), tangent(x, 1.0, seed + 2), tangent(x, 1.0, seed + 3)
    y = np.asarray(grassmann.exponential(x, h))
    np.testing.assert_allclose(y @ y.T, np.eye(3), atol=1e-14)
    back = np.asarray(grassmann.logarithm(x, turn @ y))
    np.testing.assert_allclose(back, h, atol=1e-13)  # only the span of the target counts
    np.testing.assert_allclose(back @ x.T, 0, atol=1e-15)
    distance = np.linalg.norm(h)
    assert grassmann.distance(x, y) == pytest.approx(distance, abs=1e-13)
    assert grassmann.distance(y, turn @ x) == pytest.approx(distance, abs=1e-13)
    assert grassmann.squared_distance(x, y) == pytest.approx(distance**2, abs=1e-13)
    carried_d, carried_e = (np.asarray(grassmann.transport(x, h, t)) for t in (d, e))
    np.testing.assert_allclose(carried_d @ y.T, 0, atol=1e-14)  # tangent at the end
    assert np.sum(carried_d * carried_e) == pytest.approx(np.sum(d * e), abs=1e-13)  # an isometry
    forward = np.asarray(grassmann.transport(x, h, h))
    np.testing.assert_allclose(forward, -grassmann.logarithm(y, x), atol=1e-12)  # the geodesic's own direction
    there_and_back = grassmann.transport(y, -forward, carried_d)
    np.testing.assert_allclose(there_and_back, d, atol=1e-13)


def test_half_way_is_half_way():
    x, y = frame(4, 300), frame(4, 300, 5)
    middle = grassmann.exponential(x, np.asarray(grassmann.logarithm(x, y)) / 2)
    half = grassmann.distance(x, y) / 2
    assert grassmann.distance(x, middle) == pytest.approx(half) and grassmann.distance(middle, y) == pytest.approx(half)


def test_small_distances_are_resolved():
    x = frame(3, 500)
    h = tangent(x, 1e-10)
    y = frame(3, 3, 4) @ np.asarray(grassmann.exponential(x, h))
    # A difference of 1e-10 between entries of order 0.05, each right to eps.
    np.testing.assert_allclose(grassmann.logarithm(x, y), h, atol=1e-15)
    assert grassmann.distance(x, y) == pytest.approx(np.linalg.norm(h), rel=1e-4)
    weak = np.linalg.norm(np.arccos(np.minimum(np.linalg.svd(x @ y.T, compute_uv=False), 1)))
    assert abs(weak - np.linalg.norm(h)) > 0.5 * np.linalg.norm(h)


def test_limits_at_right_angles():
    eye = np.eye(6)
    h = np.asarray(grassmann.logarithm(eye[:2], eye[2:4]))
    np.testing.assert_allclose(np.linalg.svd(h, compute_uv=False), np.pi / 2, atol=1e-14)  # of the right length
    x = frame(2, 6)
    beyond = tangent(x, np.pi / 2 + 0.3)
    found = np.asarray(grassmann.logarithm(x, grassmann.exponential(x, beyond)))
    assert np.linalg.norm(found) < np.linalg.norm(beyond)  # the other way round is shorter
    near = tangent(x, np.pi / 2 - 1e-6)
    found = grassmann.logarithm(x, grassmann.exponential(x, near))
    np.testing.assert_allclose(found, near, atol=1e-9)  # eps / cos t = 2e-10


def test_the_whole_space_is_one_point():
    x = frame(4, 4)
    np.testing.assert_allclose(grassmann.logarithm(x, frame(4, 4, 1)), 0, atol=1e-14)
    assert grassmann.distance(x, frame(4, 4, 1)) < 1e-14


@pytest.mark.slow
def test_derivatives_are_right_and_finite():
    x, y, w = frame(3, 7), frame(3, 7, 1), np.random.default_rng(2).standard_normal((3, 7))
    h = jnp.asarray(tangent(x, 1.0))
    check = dict(order=1, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)
    check_grads(lambda h: jnp.sum(w * grassmann.exponential(x, h)), (h,), **check)
    check_grads(lambda h: jnp.sum(w * grassmann.transport(x, h, w)), (h,), **check)
    check_grads(lambda m: jnp.sum(w * grassmann.logarithm(x, frames.qr(m))), (jnp.asarray(y),), **check)
    check_grads(lambda m: grassmann.squared_distance(x, frames.qr(m)), (jnp.asarray(y),), **check)
    # Repeated angles and none: the same checks at h = 0, at equal angles, and where two subspaces coincide.
    equal = np.zeros((3, 7))
    whole = np.linalg.qr(np.concatenate([x, y]).T)[0].T
    equal = jnp.asarray(0.5 * whole[3:6] @ (np.eye(7) - x.T @ x))
    for h in (jnp.zeros((3, 7)), equal):
        check_grads(lambda h: jnp.sum(w * grassmann.exponential(x, h)), (h,), **check)
        check_grads(lambda h: jnp.sum(w * grassmann.transport(x, h, w)), (h,), **check)
        arrived = grassmann.exponential(x, h)
        check_grads(lambda m: grassmann.squared_distance(x, frames.qr(m)), (arrived,), **check)


def cloud(radius, count=7, shape=(3, 12)):
    x = frame(*shape)
    return x, np.stack([reference.exponential(x, tangent(x, radius, 10 + i)) for i in range(count)])


@pytest.mark.parametrize("radius", [1e-6, 0.1, 0.6])
def test_karcher_mean_is_stationary_and_does_not_depend_on_start_or_bases(radius):
    x, bases = cloud(radius)
    found = grassmann.mean(bases)
    assert bool(found.is_converged) and found.steps < 100
    gradient = np.mean([reference.logarithm(found.basis, b) for b in bases], axis=0)
    assert np.linalg.norm(gradient) < 1e-13
    assert frames.orthonormality_error(found.basis) < 1e-14
    turned = np.stack([frame(3, 3, i) @ b for i, b in enumerate(bases)])
    again = grassmann.mean(turned, start=bases[3])
    np.testing.assert_allclose(angles.principal_angles(again.basis, found.basis), 0, atol=1e-13)
    distances = np.array([float(grassmann.distance(found.basis, b)) for b in bases])
    assert found.variance == pytest.approx(np.mean(distances**2), rel=1e-8)
    assert found.radius == pytest.approx(distances.max(), rel=1e-8)
    assert np.mean(distances**2) < np.mean([float(grassmann.distance(x, b)) ** 2 for b in bases])


@pytest.mark.slow
def test_mean_of_one_of_two_and_of_equal():
    x, bases = cloud(0.5, count=2)
    one = grassmann.mean(bases[:1])
    assert bool(one.is_converged) and one.steps == 0 and one.variance < 1e-28
    two = grassmann.mean(bases)
    half = grassmann.exponential(bases[0], np.asarray(grassmann.logarithm(bases[0], bases[1])) / 2)
    np.testing.assert_allclose(angles.principal_angles(two.basis, half), 0, atol=1e-13)
    equal = grassmann.mean(np.stack([bases[0]] * 3))
    assert bool(equal.is_converged) and equal.radius < 1e-13


def test_a_mean_that_did_not_converge_says_so():
    _, bases = cloud(0.6)
    found = grassmann.mean(bases, max_steps=1)
    assert not bool(found.is_converged) and found.gradient_norm > 1e-6 and found.steps == 1


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2), ("float32", 3e-6)])
def test_dtypes(dtype, tolerance):
    x, bases = cloud(0.5)
    exact = grassmann.mean(bases)
    stored = jnp.stack([frames.qr(jnp.asarray(b, dtype)) for b in bases])
    found = grassmann.mean(stored)
    assert bool(found.is_converged) and found.basis.dtype == jnp.float32
    np.testing.assert_allclose(grassmann.distance(found.basis, exact.basis), 0, atol=tolerance)


def test_nothing_of_the_size_of_a_projector_is_formed():
    shape = jax.ShapeDtypeStruct((4, 10_000), jnp.float32)
    for call in (
        lambda x, y: grassmann.exponential(x, y),
        lambda x, y: grassmann.logarithm(x, y),
        lambda x, y: grassmann.transport(x, y, y),
        lambda x, y: grassmann.distance(x, y),
        lambda x, y: grassmann.mean(jnp.stack([x, y])),
    ):
        text = str(jax.make_jaxpr(call)(shape, shape))
        assert "10000,10000]" not in text and "12288,12288]" not in text


@pytest.mark.slow
def test_float32_without_x64():
    with jax.enable_x64(False):
        x, y = jnp.asarray(frame(3, 50)), jnp.asarray(frame(3, 50, 1))
        h = grassmann.logarithm(x, y)
        assert h.dtype == jnp.float32
        np.testing.assert_allclose(h, reference.logarithm(x, y), atol=1e-5)
        np.testing.assert_allclose(grassmann.exponential(x, h), reference.exponential(x, h), atol=1e-6)
        np.testing.assert_allclose(angles.principal_angles(x, y), reference.principal_angles(x, y), atol=1e-6)
        level = angles.chance_angles(3, 3, 50, key=jax.random.key(0))
        assert level.mean.dtype == jnp.float32 and abs(level.mean - np.mean(reference.principal_angles(x, y))) < 0.2


@pytest.mark.slow
def test_kernels_batch_over_layers():
    x, y = (jnp.asarray(np.stack([frame(2, 7, s + 3 * i) for i in range(3)])) for s in (0, 50))
    for function in (grassmann.logarithm, grassmann.distance, angles.principal_angles):
        together = jax.vmap(function)(x, y)
        np.testing.assert_allclose(together, np.stack([function(a, b) for a, b in zip(x, y, strict=True)]), atol=1e-13)


def test_refusals():
    x = frame(2, 5)
    with pytest.raises(errors.ConfigError, match="base has shape .* and target"):
        grassmann.logarithm(x, frame(3, 5))
    with pytest.raises(errors.ConfigError, match="bases has shape \\(0, 2, 5\\)"):
        grassmann.mean(np.zeros((0, 2, 5)))
    with pytest.raises(errors.ConfigError, match="base has shape \\(0, 5\\)"):
        grassmann.exponential(np.zeros((0, 5)), np.zeros((0, 5)))
