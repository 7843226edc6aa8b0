"""Parametrisations of frames against explicit twins; derivatives against differences, at repeated values and rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from jaxsub import errors
from jaxsub.linalg import frames, reference_geometry as reference
from tests.selected import first

MAPS = ("qr", "polar", "newton_schulz", "cayley", "householder")
SHAPES = [(1, 1), (1, 6), (3, 7), (4, 4), (3, 4)]


pytestmark = pytest.mark.usefixtures("x64")


def parameter(shape, seed=0):
    """Singular values from 1 to 2: away from the places where maps are undefined."""
    m = np.random.default_rng(seed).standard_normal(shape)
    u, _, vt = np.linalg.svd(m, full_matrices=False)
    return u @ np.diag(np.linspace(2, 1, len(m))) @ vt


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", first(zip(SHAPES, strict=True), 3))
def test_frames_equal_the_twin(name, shape):
    m = parameter(shape)
    got = getattr(frames, name)(m)
    want = getattr(reference, "polar" if name == "newton_schulz" else name)(m)
    np.testing.assert_allclose(got, want, atol=1e-13)
    assert frames.orthonormality_error(got) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_derivatives_equal_differences(name, shape):
    weights = np.random.default_rng(1).standard_normal(shape)
    check_grads(
        lambda m: jnp.sum(weights * getattr(frames, name)(m)),
        (jnp.asarray(parameter(shape)),), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6,
    )  # fmt: skip


STARTS = {
    "repeated values": np.eye(3, 6) * 2,
    "repeated rows": np.ones((3, 6)),
    "zero row": np.diag([1.0, 0.0, 2.0]) @ parameter((3, 6)),
    "zero": np.zeros((3, 6)),
    "huge": 1e12 * parameter((3, 6)),
    "tiny": 1e-12 * parameter((3, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_derivatives_are_finite(name, start, dtype):
    m = jnp.asarray(STARTS[start], dtype)
    function = getattr(frames, name)
    got, jacobian = function(m), jax.jacrev(function)(m)
    assert np.isfinite(got).all() and np.isfinite(jacobian).all()
    is_deficient = start in ("repeated rows", "zero row", "zero")
    if not (name == "newton_schulz" and is_deficient) and not (name in ("cayley", "householder") and start == "huge"):
        assert frames.orthonormality_error(got) < 40 * jnp.finfo(dtype).eps


@pytest.mark.slow
def test_the_plain_derivatives_are_not_finite():
    """What the rules are for: autodiff through the SVD and through QR."""

    def plain_polar(m):
        u, _, vt = jnp.linalg.svd(m, full_matrices=False)
        return u @ vt

    def plain_qr(m):
        return jnp.linalg.qr(m.T)[0].T

    repeated, deficient = jnp.asarray(STARTS["repeated values"]), jnp.asarray(STARTS["zero row"])
    right = np.asarray(jax.jacrev(frames.polar)(repeated))
    assert not np.allclose(jax.jacrev(plain_polar)(repeated), right, atol=1e-3)
    assert not np.isfinite(jax.jacrev(plain_qr)(deficient)).all()
    # At 2 [I 0]: the skew part of the left block and all of the right one, halved.
    direction = np.random.default_rng(2).standard_normal((3, 6))
    want = direction / 2
    want[:, :3] = (direction[:, :3] - direction[:, :3].T) / 4
    np.testing.assert_allclose(np.einsum("ijkl,kl->ij", right, direction), want, atol=1e-14)


@pytest.mark.slow
def test_cayley_and_householder_are_smooth_at_the_zero_parameter():
    zero = jnp.zeros((3, 6))
    for name in ("cayley", "householder"):
        np.testing.assert_allclose(getattr(frames, name)(zero), np.eye(3, 6))
        check_grads(getattr(frames, name), (zero,), order=1, atol=1e-6, rtol=1e-6)


def test_what_each_map_keeps():
    m = parameter((3, 8), 3)
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((3, 3)))[0]
    np.testing.assert_allclose(frames.polar(turn @ m), turn @ np.asarray(frames.polar(m)), atol=1e-13)
    np.testing.assert_allclose(frames.qr(np.tril(np.ones((3, 3))) @ m), frames.qr(m), atol=1e-13)
    assert np.linalg.det(frames.cayley(parameter((4, 4)))) == pytest.approx(1)


def test_too_few_newton_schulz_steps_are_seen():
    m = parameter((4, 30)) * np.array([1, 1, 1, 1e-3])[:, None]
    assert frames.orthonormality_error(frames.newton_schulz(m)) < 1e-12
    assert frames.orthonormality_error(frames.newton_schulz(m, steps=10)) > 0.5


@pytest.mark.parametrize("name", MAPS)
def test_narrow_dtypes_compute_in_float32(name):
    m = jnp.asarray(parameter((3, 7)), jnp.bfloat16)
    got = getattr(frames, name)(m)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, getattr(frames, name)(m.astype(jnp.float32)), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(-3, 3))
def test_smooth_maps_are_frames_everywhere(seed, size):
    m = 10.0**size * np.random.default_rng(seed).standard_normal((3, 7))
    scale = 1 + np.square(m).sum()
    for name in ("cayley", "householder"):
        assert frames.orthonormality_error(getattr(frames, name)(m)) < 1e-14 * scale


@pytest.mark.parametrize("name", MAPS)
def test_refusals(name):
    for shape in ((0, 3), (4, 3), (3,)):
        with pytest.raises(errors.ConfigError, match="parameter has shape"):
            getattr(frames, name)(np.zeros(shape))
