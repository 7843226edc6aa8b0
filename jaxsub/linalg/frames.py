"""Frames: (k, D) matrices with orthonormal rows, as differentiable functions of an unconstrained (k, D) parameter.

| map             | defined and smooth                | reaches                           | zero parameter |
|-----------------|-----------------------------------|-----------------------------------|----------------|
| qr, polar       | at full rank                      | every frame                       | undefined      |
| newton_schulz   | at full rank, to `steps`          | every frame                       | zero rows      |
| cayley          | everywhere                        | frames with x[:, :k] + I regular  | [I 0]          |
| householder     | everywhere                        | almost every frame, up to signs   | [I 0]          |

Repeated singular values are harmless to all five. Where a map is undefined it is discontinuous: no derivative exists,
and what `qr` and `polar` return is finite, with undetermined directions held fixed. Start from `cayley` or
`householder` where a parameter may lose rank.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsub.linalg import matrix_functions, operands, products


def orthonormality_error(x, /):
    """Largest entry of |x x.T - I| for x (k, D): () in the dtype of x, NaN where x is not finite."""
    x = operands.rows(x, "x")
    return jnp.max(jnp.abs(products.matmul(x, x.T) - jnp.eye(x.shape[0], dtype=x.dtype)))


def qr(parameter, /):
    """Gram-Schmidt of the rows: row i is the part of parameter row i outside the rows before it, normalised.

    Args:
        parameter: (k, D), k <= D, any float dtype.

    Returns:
        (k, D) orthonormal rows. Spans of leading rows are kept; a triangular factor with positive diagonal makes it
        unique.

    Raises:
        ConfigError: if the shape is not (k, D) with 1 <= k <= D.

    Fails on: rows that depend on earlier ones (to D eps). Such rows are completed arbitrarily, and derivatives by
    them are zero.
    Source: Householder QR; derivative, Walter and Lehmann 2010, equation 3.
    """
    return _qr(operands.rows(parameter, "parameter"))


def _signed_qr(m):
    q, r = jnp.linalg.qr(m.T)
    sign = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(m.dtype)
    return q * sign, r * sign[:, None]


@jax.custom_jvp
@jax.jit
def _qr(m):
    return _signed_qr(m)[0].T


@_qr.defjvp
@jax.jit
def _qr_jvp(primals, tangents):
    (m,), (dm,) = primals, tangents
    q, r = _signed_qr(m)
    norms = jnp.sqrt(jnp.sum(jnp.square(r), axis=0))
    is_new = jnp.diagonal(r) > m.shape[1] * jnp.finfo(m.dtype).eps * norms
    both = is_new[:, None] & is_new[None, :]
    r = jnp.where(both, r, jnp.eye(len(r), dtype=r.dtype))
    change = jnp.where(is_new, dm.T, 0)
    change = jax.lax.linalg.triangular_solve(r, change, left_side=False, lower=False)
    inside = products.matmul(q.T, change)
    below = jnp.tril(inside, -1)
    dq = products.matmul(q, below - below.T - inside) + change
    return q.T, dq.T


def polar(parameter, /):
    """Closest frame to the parameter in the Frobenius norm, (M M.T)**(-1/2) M.

    Args:
        parameter: (k, D), k <= D, any float dtype.

    Returns:
        (k, D) orthonormal rows. Every row is treated alike; parameter -> R parameter turns the frame by R.

    Raises:
        ConfigError: if the shape is not (k, D) with 1 <= k <= D.

    Fails on: singular values under D eps of the first, as `matrix_functions.closest_frame` says.
    Source: Higham 2008, section 8.1, by SVD, which does not square the condition number.
    """
    return _polar(operands.rows(parameter, "parameter"))


@jax.jit
def _polar(m):
    return matrix_functions.closest_frame(m, False)


def newton_schulz(parameter, /, *, steps=30):
    """Polar frame by products alone, X <- (3 X - X X.T X) / 2 from X = M / (tr (M M.T)**2)**(1/4).

    Args:
        parameter: (k, D), k <= D, any float dtype.
        steps: iterations, static. A singular value s of the scaled X grows by 1.5 a step until it is near 1 and then
            converges quadratically: log(k**(1/4) condition) / log(1.5) + 5 steps reach eps.

    Returns:
        (k, D). Orthonormal only if `steps` was enough: check `orthonormality_error`. The default reaches 1e-6 in
        float32 up to condition 1e4.

    Raises:
        ConfigError: if the shape is not (k, D) with 1 <= k <= D.

    Fails on: rank-deficient parameters: zero singular values stay zero, so the result is not a frame. Derivatives are
    finite there, of size up to 1.5**steps. A zero parameter gives zeros.
    Source: Higham 2008, equation 8.20. Reverse mode keeps `steps` copies of the frame.
    """
    return _newton_schulz(operands.rows(parameter, "parameter"), steps=steps)


@functools.partial(jax.jit, static_argnames="steps")
def _newton_schulz(m, *, steps):
    # Two scalings: the first keeps fourth powers in range. As a constant factor it drops out of the derivative.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(m)))
    m = m / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(jnp.square(products.matmul(m, m.T)))
    scale = jnp.where(square > 0, jnp.where(square > 0, square, 1) ** 0.25, 1)

    def step(_, x):
        return 1.5 * x - 0.5 * products.matmul(products.matmul(x, x.T), x)

    return jax.lax.fori_loop(0, steps, step, m / scale)


def cayley(parameter, /):
    """First k rows of the Cayley transform of a skew D x D matrix that is zero outside its first k rows and columns.

    With parameter = [A B], S = (A - A.T) / 2, y = (I + S + B B.T)**-1: x = [2 y - I, 2 y B]. The symmetric part of
    I + S + B B.T is at least I: always solvable, and nothing larger than k x k is solved.

    Args:
        parameter: (k, D), k <= D, any float dtype; A is (k, k) and only its skew part counts.

    Returns:
        (k, D) orthonormal rows; [I 0] for a zero parameter. Smooth everywhere.

    Raises:
        ConfigError: if the shape is not (k, D) with 1 <= k <= D.

    Fails to reach frames whose first k columns have the eigenvalue -1 (they are limits as the parameter grows), and
    is slow to move where the parameter is large. k = D gives rotations only. Accuracy: eps * (1 + |B|**2).
    Source: Cayley 1846; low-rank form by elimination of the second block, as Wen and Yin 2013, lemma 4.
    """
    return _cayley(operands.rows(parameter, "parameter"))


@jax.jit
def _cayley(m):
    k = m.shape[0]
    a, b = m[:, :k], m[:, k:]
    eye = jnp.eye(k, dtype=m.dtype)
    y = jnp.linalg.inv(eye + (a - a.T) / 2 + products.matmul(b, b.T))
    return jnp.concatenate([2 * y - eye, 2 * products.matmul(y, b)], axis=1)


def householder(parameter, /):
    """First k rows of a product of k reflections, whose vectors are e_i plus the parameter row right of column i.

    Args:
        parameter: (k, D), k <= D, any float dtype; entries on and left of the diagonal do not count.

    Returns:
        (k, D) orthonormal rows; [I 0] for a zero parameter. Smooth everywhere.

    Raises:
        ConfigError: if the shape is not (k, D) with 1 <= k <= D.

    Fails to reach: other signs of rows (one sign a row is fixed), and for k = D frames of the other determinant.
    Source: UT transform, Joffrain et al. 2006: H_1 ... H_k = I - V.T T V with T**-1 = striu(V V.T) + diag(V V.T) / 2,
    one triangular solve instead of k passes.
    """
    return _householder(operands.rows(parameter, "parameter"))


@jax.jit
def _householder(m):
    k = m.shape[0]
    v = jnp.triu(m, 1) + jnp.eye(*m.shape, dtype=m.dtype)
    gram = products.matmul(v, v.T)
    upper = jnp.triu(gram, 1) + jnp.diag(jnp.diagonal(gram) / 2)
    # T.T V by a solve with the transposed triangle; the rows wanted are E.T (I - V.T T.T V), negated: 0 -> [I 0].
    weighted = jax.lax.linalg.triangular_solve(upper, v, left_side=True, lower=False, transpose_a=True)
    return products.matmul(v[:, :k].T, weighted) - jnp.eye(*m.shape, dtype=m.dtype)
