"""Coefficients of low-rank updates: cores (n, k_o, k_i) of a rank that the updates' own rank r bounds, kept as halves.

    S_n = U W_n V.T = L_n R_n,    L (n, k_o, q), R (n, q, k_i),    q (k_o + k_i) numbers a model instead of k_o k_i

With q = r nothing is lost; a smaller q keeps the q leading singular vectors of every core. Unit factors and q < r are
the truncated SVD of every update by itself, so that what has nothing in common is no worse off for being in a bundle.
"""

import numpy as np

from jaxsub import solvers
from jaxsub.bundle import storage

HALVES = (".left", ".right")  # endings of their names


def count(rank_out, rank_in, inner):
    """Numbers a model takes: its core, or its two halves of rank `inner`, whatever is less."""
    return np.minimum(rank_out * rank_in, inner * (rank_out + rank_in))


def halves(values, inner):
    """(L (n, k_o, q), R (n, q, k_i)) of cores truncated to rank q = `inner`; () where whole cores take no more."""
    _, rank_out, rank_in = values.shape
    if inner * (rank_out + rank_in) >= rank_out * rank_in:
        return ()
    u, s, vt = solvers.svd(values)
    root = np.sqrt(s[:, :inner])
    pair = u[:, :, :inner] * root[:, None, :], root[:, :, None] * vt[:, :inner]
    return tuple(np.ascontiguousarray(half.astype(values.dtype)) for half in pair)


def joined(pair):
    """Cores (n, k_o, k_i) of two halves."""
    return np.matmul(*pair)


def energies(a, b, scales):
    """(r,) float64: sum over models of the squared 1st, 2nd, ... singular values of scales_n b_n a_n."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    total = np.zeros(a.shape[1])
    for one_a, one_b, scale in zip(a, b, np.asarray(scales, np.float64), strict=True):
        short = scale * np.linalg.qr(one_b, mode="r") @ np.linalg.qr(one_a.T, mode="r").T
        found = solvers.singular_values(short)
        total[: len(found)] += np.square(found)
    return total


def stored(values, dtype, inner=0):
    """(coefficients, their halves or ()) as they come back from a file that stores them as `dtype`.

    Args:
        values: (n, k...) coefficients.
        dtype: see `storage`.
        inner: rank of the cores of low-rank updates; 0 for coefficients that are no matrices.
    """
    pair = halves(values, inner) if inner else ()
    if not pair:
        return storage.rounded(values, dtype, component=-1), ()
    pair = tuple(storage.rounded(half, dtype, component=-1) for half in pair)
    return joined(pair), pair
