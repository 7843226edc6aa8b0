"""Slow, readable NumPy float64 twins of the geometry, selection and incremental kernels; for tests.

They share no formula with the kernels: D x D projectors, explicit reflectors, SVDs of whole stacks.
"""

import numpy as np


def _wide(*arrays):
    return tuple(np.asarray(a, np.float64) for a in arrays)


def principal_angles(a, b):
    """(min(k1, k2),) angles in radians, non-decreasing; cosines from a b.T, sines from the residual's SVD."""
    a, b = _wide(a, b)
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    cosines = np.linalg.svd(small @ large.T, compute_uv=False)
    sines = np.linalg.svd(small - small @ large.T @ large, compute_uv=False)[::-1]
    return np.where(cosines**2 > 0.5, np.arcsin(np.minimum(sines, 1)), np.arccos(np.minimum(cosines, 1)))


def projector_distance(a, b):
    """Frobenius norm of the difference of the D x D projectors, over sqrt(2)."""
    a, b = _wide(a, b)
    return np.linalg.norm(a.T @ a - b.T @ b) / np.sqrt(2)


def rotate_points(a, b, *, allow_reflection=True):
    """R (k, k) that minimises |a R - b|."""
    a, b = _wide(a, b)
    u, _, vt = np.linalg.svd(a.T @ b)
    if not allow_reflection and np.linalg.det(u @ vt) < 0:
        u[:, -1] *= -1
    return u @ vt


def qr(m):
    """Modified Gram-Schmidt, run twice."""
    q = np.array(m, np.float64)
    for _ in range(2):
        for i in range(len(q)):
            for j in range(i):
                q[i] -= (q[j] @ q[i]) * q[j]
            q[i] /= np.linalg.norm(q[i])
    return q


def polar(m):
    """(M M.T)**(-1/2) M by the eigenvectors of M M.T."""
    (m,) = _wide(m)
    values, u = np.linalg.eigh(m @ m.T)
    return u @ np.diag(values**-0.5) @ u.T @ m


def cayley(m):
    """First k rows of (I - W)(I + W)**-1, W skew D x D with the parameter in its first k rows."""
    (m,) = _wide(m)
    k, d = m.shape
    w = np.zeros((d, d))
    w[:k, :k] = (m[:, :k] - m[:, :k].T) / 2
    w[:k, k:], w[k:, :k] = -m[:, k:], m[:, k:].T
    return ((np.eye(d) - w) @ np.linalg.inv(np.eye(d) + w))[:k]


def householder(m):
    """First k rows of (H_1 ... H_k) transposed, negated; H_i = I - 2 v v.T / v.T v."""
    (m,) = _wide(m)
    k, d = m.shape
    q = np.eye(d)
    for i in range(k):
        v = np.zeros(d)
        v[i], v[i + 1 :] = 1, m[i, i + 1 :]
        q = q @ (np.eye(d) - 2 * np.outer(v, v) / (v @ v))
    return -q[:, :k].T


def exponential(x, h, t=1.0):
    """Edelman, Arias and Smith 1998, equation 2.65, by the thin SVD of the tangent."""
    x, h = _wide(x, h)
    v, s, ut = np.linalg.svd(h, full_matrices=False)
    return v @ np.diag(np.cos(t * s)) @ v.T @ x + v @ np.diag(np.sin(t * s)) @ ut


def logarithm(x, y):
    """Tangent at x by the thin SVD of (y x.T)**-1 y - x; all angles below pi/2."""
    x, y = _wide(x, y)
    u, tangents, vt = np.linalg.svd(np.linalg.solve(y @ x.T, y) - x, full_matrices=False)
    return u @ np.diag(np.arctan(tangents)) @ vt


def transport(x, h, d):
    """Edelman, Arias and Smith 1998, equation 2.68, with its D x D matrix formed."""
    x, h, d = _wide(x, h, d)
    v, s, ut = np.linalg.svd(h, full_matrices=False)
    matrix = -x.T @ v @ np.diag(np.sin(s)) @ ut + ut.T @ np.diag(np.cos(s)) @ ut + np.eye(x.shape[1]) - ut.T @ ut
    return d @ matrix.T


def greedy_rows(x, rank):
    """Rows of x (N, D) chosen one by one, each farthest from the span of those before, and squared distances left."""
    left = np.array(x, np.float64)
    chosen = []
    for _ in range(rank):
        squares = np.square(left).sum(1)
        squares[chosen] = -1
        chosen.append(int(np.argmax(squares)))
        direction = left[chosen[-1]] / np.linalg.norm(left[chosen[-1]])
        left -= np.outer(left @ direction, direction)
    return chosen, np.square(left).sum(1)


def moments(x):
    """Gram matrix, cross products with the mean, squared norm of the mean, of rows x about their mean."""
    (x,) = _wide(x)
    mean = x.mean(0)
    y = x - mean
    return y @ y.T, y @ mean, mean @ mean


def principal_components(x, rank):
    """Singular values (all), leading rows of the basis, and mean, of all models at once."""
    (x,) = _wide(x)
    mean = x.mean(0)
    s, vt = np.linalg.svd(x - mean, full_matrices=False)[1:]
    return s, vt[:rank], mean
