"""Slow, readable NumPy float64 twins of orth, sketch, range_finder, svd, single_pass and certificates; for tests.

Twins of randomized kernels take the kernel's own test matrix: what they check is everything after the draw.
"""

import numpy as np


def fix_signs(vt):
    """Rows with the entry of largest magnitude positive; a tie leaves the row as it is."""
    vt = np.array(vt, np.float64)
    for row in vt:
        if row.size and -row.min() > row.max():
            row *= -1
    return vt


def qr(x, tolerance=0.0):
    """Thin QR by modified Gram-Schmidt, twice; a column that depends on those before it gives zeros."""
    x = np.asarray(x, np.float64)
    q, r = np.zeros_like(x), np.zeros((x.shape[1], x.shape[1]))
    for j in range(x.shape[1]):
        y = x[:, j].copy()
        for _ in range(2):
            for i in range(j):
                c = q[:, i] @ y
                r[i, j] += c
                y -= c * q[:, i]
        if np.linalg.norm(y) > tolerance * np.linalg.norm(x[:, j]):
            r[j, j] = np.linalg.norm(y)
            q[:, j] = y / r[j, j]
    return q, r


def svd(x, rank=None):
    """(u, s, vt) of x, truncated to `rank`, signs fixed."""
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    fixed = fix_signs(vt)
    u = u * np.where((fixed * vt).sum(1) < 0, -1, 1)
    return u[:, :rank], s[:rank], fixed[:rank]


def power(x, tests, passes):
    """Projector on the power-iterated range, column space for even `passes`, row space for odd."""
    y = np.asarray(x, np.float64) @ tests
    for step in range(2, passes):
        y = np.linalg.qr(y)[0]
        y = x.T @ y if step % 2 == 0 else x @ y
    q = np.linalg.qr(y)[0]
    return q @ q.T


def krylov(x, tests, passes):
    """Projector on the block Krylov space: [x t, x x.T x t, ...] for even `passes`, x.T times it for odd."""
    x = np.asarray(x, np.float64)
    block = x @ tests if passes % 2 == 0 else x.T @ (x @ tests)
    space = []
    for _ in range(passes // 2):
        for before in space:
            block = block - before @ (before.T @ block)
        for before in space:
            block = block - before @ (before.T @ block)
        space.append(np.linalg.qr(block)[0])
        block = x @ (x.T @ space[-1]) if passes % 2 == 0 else x.T @ (x @ space[-1])
    q = np.concatenate(space, axis=1)
    return q @ q.T


def randomized_svd(x, tests, rank, passes):
    """(u, s, vt) of x projected on its power-iterated range."""
    projector = power(x, tests, passes)
    return svd(projector @ x if passes % 2 == 0 else x @ projector, rank)


def single_pass(x, tests, rank):
    """u s vt from the range, co-range and core sketches; `tests` are t_1 (D, l), t_2 (N, l), t_3 (N, c), t_4 (D, c)."""
    t1, t2, t3, t4 = tests
    q, p = np.linalg.qr(x @ t1)[0], np.linalg.qr(x.T @ t2)[0]
    core = np.linalg.pinv(t3.T @ q) @ (t3.T @ x @ t4) @ np.linalg.pinv(p.T @ t4)
    u, s, vt = svd(core, rank)
    return q @ (u * s) @ vt @ p.T


def relative_error(x, u, s, vt):
    """|x - u s vt|_F / |x|_F, 0 for x = 0."""
    x, u, s, vt = (np.asarray(a, np.float64) for a in (x, u, s, vt))
    norm = np.linalg.norm(x)
    return np.linalg.norm(x - (u * s) @ vt) / norm if norm else 0.0


def row_space_angle(vt, basis):
    """Sine of the largest principal angle between the row spaces of vt and of `basis`, both orthonormal rows."""
    vt, basis = np.asarray(vt, np.float64), np.asarray(basis, np.float64)
    return np.linalg.norm(vt - vt @ basis.T @ basis, 2)
