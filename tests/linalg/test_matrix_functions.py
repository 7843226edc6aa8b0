"""Matrix functions against closed forms; derivatives against differences, and at repeated values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsub.linalg import matrix_functions

pytestmark = pytest.mark.usefixtures("x64")


def symmetric(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return jnp.asarray(q @ np.diag(values) @ q.T)


def _cube(x):
    return x**3


WEIGHTS = np.random.default_rng(9).standard_normal((4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("values", [(1.0, 0.7, 0.2, -0.5), (0.5, 0.5, 0.5, 0.5), (1, 1, 0.3, 0.3 + 1e-9), (0, 0, 0, 0)])
def test_symmetric_function_and_its_derivative(values):
    m = symmetric(np.array(values, float))
    got = matrix_functions.symmetric_function(_cube, m)
    np.testing.assert_allclose(got, m @ m @ m, atol=1e-14)

    def ours(m):
        return jnp.sum(WEIGHTS * matrix_functions.symmetric_function(_cube, m))

    def plain(m):
        m = (m + m.T) / 2
        return jnp.sum(WEIGHTS * (m @ m @ m))

    # Divided differences within eps**(1/3) are replaced: eps**(2/3) = 4e-11 is the price.
    np.testing.assert_allclose(jax.grad(ours)(m), jax.grad(plain)(m), atol=2e-10)

    def weak(m):
        w, u = jnp.linalg.eigh(m)
        return jnp.sum(WEIGHTS * ((u * w**3) @ u.T))

    if values[0] == values[-1]:
        weak = jax.grad(weak)(m)
        assert not np.isfinite(weak).all() or np.abs(weak - jax.grad(plain)(m)).max() > 1e-3


@pytest.mark.slow
def test_row_singular_values_keep_small_ones():
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.standard_normal((4, 4)))[0], np.linalg.qr(rng.standard_normal((20001, 4)))[0].T
    s = np.array([1.0, 1e-5, 1e-10, 1e-13])
    x = u @ np.diag(s) @ v
    got = matrix_functions.row_singular_values(jnp.asarray(x))
    np.testing.assert_allclose(got, s, rtol=0, atol=2e-15)
    weak = np.sqrt(np.maximum(np.linalg.eigvalsh(x @ x.T)[::-1], 0))  # through the Gram matrix
    assert np.abs(weak - s).max() > 0.9e-10
    square = x[:, :6].astype(float)
    check_grads(lambda x: jnp.sum(matrix_functions.row_singular_values(x) ** 2), (jnp.asarray(square),), order=1)


@pytest.mark.parametrize("x", [np.eye(3, 5), np.zeros((3, 5)), np.diag([1.0, 1.0, 0.0])])
def test_row_singular_values_have_finite_derivatives(x):
    grad = jax.grad(lambda x: jnp.sum(matrix_functions.row_singular_values(x)))(jnp.asarray(x))
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(grad, x, atol=1e-14)  # of the nuclear norm: the polar factor of what is there


@pytest.mark.slow
@pytest.mark.parametrize("proper", [False, True])
def test_closest_frame_is_closest_and_differentiable(proper):
    m = np.random.default_rng(2).standard_normal((3, 3))
    m = m if np.linalg.det(m) < 0 else -m
    got = np.asarray(matrix_functions.closest_frame(jnp.asarray(m), proper))
    np.testing.assert_allclose(got @ got.T, np.eye(3), atol=1e-14)
    assert np.linalg.det(got) == pytest.approx(1 if proper else -1)
    rng = np.random.default_rng(3)
    for _ in range(200):
        other = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        other = other if not proper or np.linalg.det(other) > 0 else -other
        assert np.linalg.norm(m - other) >= np.linalg.norm(m - got)
    check_grads(
        lambda m: jnp.sum(WEIGHTS[:3, :3] * matrix_functions.closest_frame(m, proper)),
        (jnp.asarray(m),), order=1, atol=1e-6, rtol=1e-6,
    )  # fmt: skip
