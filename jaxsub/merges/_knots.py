"""The rotation of KnOTS: all updates of a layer in one orthonormal basis of their left sides.

[W_1 ... W_N] = U S [V_1 ... V_N].T (o, N i);   W_n = U (S V_n.T),   rows S V_n.T = U.T W_n are what is merged
"""

import numpy as np

from jaxsub import hostmemory, rows as core, solvers
from jaxsub.merges import _matrices
from jaxsub.rows import matrices

LARGE = 64  # blocks of a layer from which on one more costs nothing


def merge(rows, inner):
    """The row U @ inner(rotated rows); `inner` is a function of ArrayRows (N, k, i) whose result is made in order.

    U is of the directions of all updates that are more than rounding: the eigenvectors of sum_n W_n W_n.T, found in
    float64.
    """
    _compile(rows, inner)  # first: after the eigenproblem it would take 20 MiB more
    found = matrices.of(rows)
    values, vectors = solvers.descending(found.left_gram)
    floor = max(found.shape) * np.finfo(np.float64).eps * max(float(values[0]), 0.0)
    dtype = rows.dtype if rows.factors() is None else np.float64  # that of the rows it turns, and half the memory
    u = hostmemory.aligned(vectors[:, values > floor], dtype)
    del vectors
    hostmemory.trim()
    if not u.size:
        return found.result(np.zeros(found.shape))
    turned = found.rows_of(u)
    turned.weights, turned.width = rows.weights, min(turned.width, core.CHUNK)  # small blocks: all rows are here
    # Columns are merged once, in order, and not looked at again: the first model's make room for the result.
    merged = inner(turned).array(turned.shape, out=turned.x[0])
    del turned
    return found.wide_product(u, merged)


def _compile(rows, inner):
    """Merges a block of zeros: compiling takes 50 MiB, which are free again before a large layer's rows are held."""
    if rows.factors() is None and rows.size >= LARGE * core.CHUNK:
        x = np.zeros((rows.num_models, core.CHUNK), rows.dtype)
        inner(core.ArrayRows(x, rows.name, rows.model_ids, is_update=True, weights=rows.weights)).array((core.CHUNK,))


def held(shape, count, itemsize):
    """Bytes that are held at most: the eigenproblem of the left side, or all rotated rows and the basis."""
    o, i = shape
    turned = (count * o * i + o * o) * itemsize
    return max(16 * o * o + o * i * itemsize, turned) + _matrices.library(i)
