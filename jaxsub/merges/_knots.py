"""The rotation of KnOTS: all updates of a layer in one orthonormal basis of their left sides.

[W_1 ... W_N] = U S [V_1 ... V_N].T (o, N i);   W_n = U (S V_n.T),   rows S V_n.T = U.T W_n are what is merged
"""

import numpy as np

from jaxsub.rows import matrices


def merge(rows, inner):
    """The row U @ inner(rotated rows); `inner` is a function of ArrayRows (N, k, i).

    U is of the directions of all updates that are more than rounding: the eigenvectors of sum_n W_n W_n.T, found in
    float64.
    """
    found = matrices.of(rows)
    values, vectors = np.linalg.eigh(found.left_gram())
    floor = max(found.shape) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    dtype = rows.dtype if rows.factors() is None else np.float64  # that of the rows it turns, and half the memory
    u = np.ascontiguousarray(vectors[:, values > floor][:, ::-1], dtype)
    del vectors
    if not u.size:
        return found.result(np.zeros(found.shape))
    turned = found.rows_of(u)
    turned.weights = rows.weights
    return found.product(u, inner(turned).array(turned.shape))


def held(shape, count, itemsize):
    """Bytes that are held at most: the eigenproblem of the left side, and all rotated rows."""
    o, i = shape
    return max(8 * 6 * o * o, (2 * count + 4) * o * i * itemsize + 8 * o * o)
