"""Matrix functions whose derivatives stay finite at repeated eigenvalues and singular values.

The derivatives of single eigenvectors divide by differences of eigenvalues and blow up where those meet. What is
needed here, f(M) of a symmetric M, the polar factor and singular values alone, is smooth there: each has its own rule.

    d f(M) = U (F o U.T dM U) U.T,    F_ij = (f_i - f_j) / (l_i - l_j) -> f'(l)

First derivatives only: the rules differentiate `eigh` and `svd` when they are themselves differentiated.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsub.linalg import products

SERIES = 0.1  # under this Taylor series, right to 1e-20: eight terms of 1 / (2n)!, eleven of t / sin t at a fifth of it


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def symmetric_function(f, m):
    """U f(diag(l)) U.T of a symmetric m = U diag(l) U.T, differentiable at repeated l.

    Args:
        f: elementwise function of the eigenvalues, defined at module level, varying over distances of order 1.
        m: (k, k) symmetric; only its symmetric part counts.

    Returns:
        (k, k) symmetric, dtype of m. Absolute error of order eps * max(|f|, |f'| * |m|).

    Source: Daleckii and Krein 1965; Higham 2008, Theorem 3.11. Divided differences of eigenvalues closer than
    eps**(1/3) are replaced by the derivative at their middle: both errors are then eps**(2/3).
    """
    values, u = jnp.linalg.eigh(m)
    return products.matmul(u * f(values), u.T)


@symmetric_function.defjvp
def _symmetric_function_jvp(f, primals, tangents):
    (m,), (dm,) = primals, tangents
    values, u = jnp.linalg.eigh(m)
    f_values = f(values)
    gap = values[:, None] - values[None, :]
    middle = (values[:, None] + values[None, :]) / 2
    slope = jax.jvp(f, (middle,), (jnp.ones_like(middle),))[1]
    close = jnp.abs(gap) <= jnp.finfo(m.dtype).eps ** (1 / 3)
    divided = jnp.where(close, slope, (f_values[:, None] - f_values[None, :]) / jnp.where(close, 1, gap))
    inner = products.matmul(products.matmul(u.T, (dm + dm.T) / 2), u)
    outer = products.matmul(products.matmul(u, divided * inner), u.T)
    return products.matmul(u * f_values, u.T), outer


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def closest_frame(m, proper):
    """Polar factor of m, the frame R that is closest to it: R = argmin |m - R| over R R.T = I.

    Args:
        m: (k, D), k <= D.
        proper: for square m, only rotations of determinant +1 (the direction of the smallest singular value turns).

    Returns:
        (k, D) with orthonormal rows, dtype of m.

    Fails where it is not unique: at singular values that are zero (or, with `proper`, at two smallest that are equal
    while the determinant is negative). It then returns one closest frame; derivatives along undetermined directions
    are returned as zero.
    Source: Fan and Hoffman 1955; with `proper`, Kabsch 1978. Derivative: Sylvester equation of the polar
    decomposition, P W + W P = dM R.T - R dM.T.
    """
    u, _, vt, sign = _signed_svd(m, proper)
    return products.matmul(u * sign, vt)


def _signed_svd(m, proper):
    u, s, vt = jnp.linalg.svd(m, full_matrices=False)
    sign = jnp.ones_like(s)
    if proper:
        sign = sign.at[-1].set(jnp.where(jnp.linalg.det(products.matmul(u, vt)) < 0, -1, 1))
    return u, s, vt, sign


@closest_frame.defjvp
def _closest_frame_jvp(proper, primals, tangents):
    (m,), (dm,) = primals, tangents
    u, s, vt, sign = _signed_svd(m, proper)
    p = s * sign
    floor = max(m.shape) * jnp.finfo(m.dtype).eps * s[0]
    left = products.matmul(u.T, dm)
    inside = products.matmul(left, vt.T)
    turn = inside * sign
    turn = (turn - turn.T) * _inverse(p[:, None] + p[None, :], floor)
    outside = (left - products.matmul(inside, vt)) * _inverse(p, floor)[:, None]
    return products.matmul(u * sign, vt), products.matmul(u, products.matmul(turn * sign, vt) + outside)


def _inverse(x, floor):
    """1 / x, and zero where |x| <= floor."""
    is_zero = jnp.abs(x) <= floor
    return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, x))


@jax.custom_jvp
def row_singular_values(x):
    """(k,) singular values of x (k, D), k <= D, non-increasing, right to eps * |x| however small.

    The derivative is u_i.T dx v_i, finite at repeated values; zero at values that are zero, where there is none.
    """
    return jnp.linalg.svd(jnp.linalg.qr(x.T, mode="r"), compute_uv=False)


@row_singular_values.defjvp
def _row_singular_values_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    _, s, wt = jnp.linalg.svd(jnp.linalg.qr(x.T, mode="r"))
    # Rows of wt are left singular vectors of x; wt x has the scaled right ones as rows.
    along = jnp.sum(products.matmul(wt, dx) * products.matmul(wt, x), axis=1)
    return s, along * _inverse(s, x.shape[0] * jnp.finfo(x.dtype).eps * s[0])


def _series(x, ratio, terms):
    """1 + r(1) x (1 + r(2) x (1 + ...)) with r(n) = ratio(n)."""
    total = jnp.ones_like(x)
    for n in range(terms, 0, -1):
        total = 1 + ratio(n) * x * total
    return total


def cosine_root(square):
    """cos(sqrt(x)), analytic at zero."""
    is_small = square < SERIES
    root = jnp.sqrt(jnp.where(is_small, 1, square))
    return jnp.where(is_small, _series(square, lambda n: -1 / ((2 * n - 1) * (2 * n)), 8), jnp.cos(root))


def sine_over_root(square):
    """sin(sqrt(x)) / sqrt(x), analytic at zero."""
    is_small = square < SERIES
    root = jnp.sqrt(jnp.where(is_small, 1, square))
    return jnp.where(is_small, _series(square, lambda n: -1 / (2 * n * (2 * n + 1)), 8), jnp.sin(root) / root)


def versine_over(square):
    """(1 - cos(sqrt(x))) / x, analytic at zero."""
    return jnp.square(sine_over_root(square / 4)) / 2


def angle_over_sine(cosine):
    """t / sin(t) for cosine = cos(t) in [0, 1] up to rounding, analytic at 1: 2F1(1, 1; 3/2; (1 - cosine) / 2)."""
    half = (1 - cosine) / 2
    is_small = half < SERIES / 5
    safe = jnp.where(is_small, 0.5, half)
    root, rest = jnp.sqrt(safe), jnp.sqrt(1 - safe)
    return jnp.where(is_small, _series(half, lambda n: n / (n + 0.5), 11), jnp.arctan2(root, rest) / (root * rest))
