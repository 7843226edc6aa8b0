"""The subspace that the updates of a layer share, from both sides, and their coefficients in it.

    U_1 (p, k_1): leading eigenvectors of sum_n W_n W_n.T;   U_2 (q, k_2) of sum_n W_n.T W_n;   C_n = U_1.T W_n U_2

Uncentred HOSVD (E6 without E2): a mean that is taken off first makes every linear merge the plain mean (E33).
Eigenvectors are found in float64, and kept in the dtype of the rows.
"""

import dataclasses

import jax
import numpy as np

from jaxsub import errors, hostmemory, rows as core, solvers
from jaxsub.linalg import products
from jaxsub.merges import _matrices
from jaxsub.rows import matrices


@dataclasses.dataclass(frozen=True)
class Shared:
    """The subspace of one layer: `left` (p, k_1), `right` (q, k_2), `cores` the rows C_n (N, k_1, k_2)."""

    found: matrices.Matrices
    left: np.ndarray
    right: np.ndarray
    cores: core.ArrayRows

    def result(self, c):
        """The row of coefficients c (k_1, k_2)."""
        return self.found.product(self.left @ np.asarray(c, self.left.dtype), self.right.T)

    def merged(self, values):
        """The row of merged coefficients, Values that are made in order: the first model's make room for them."""
        return self.result(values.array(self.cores.shape, out=self.cores.x[0]))


def of(rows, rank, energy):
    """The Shared of rows that are matrices: `rank` directions a side, or as many as hold `energy` where it is 0."""
    if rank < 0 or not 0 < energy <= 1:
        raise errors.ConfigError(f"rank={rank}, energy={energy}: a rank of 1 or more, or 0 < energy <= 1")
    found = matrices.of(rows)
    dtype = rows.dtype if rows.factors() is None else np.float64
    left, right = (_leading(gram, rank, energy, dtype) for gram in (found.left_gram, found.right_gram))
    c = np.empty((rows.num_models, left.shape[1], right.shape[1]), dtype)
    with jax.enable_x64(True), np.errstate(over="ignore"):  # told by the one who writes the result
        far = jax.device_put(right)
        for n, w in enumerate(found):
            for at in solvers.panels(left.shape[1], w.shape[1]):
                c[n, at] = _core(w, left[:, at], far)
    ids = rows.model_ids
    return Shared(found, left, right, core.ArrayRows(c, rows.name, ids, is_update=True, weights=rows.weights))


def _leading(make, rank, energy, dtype):
    values, vectors = solvers.descending(make, rank or None)
    if not rank:
        sums = np.cumsum(np.maximum(values, 0.0))
        rank = int(np.searchsorted(sums, energy * sums[-1] * (1 - 1e-12))) + 1 if sums[-1] > 0 else 1
    found = hostmemory.aligned(vectors[:, :rank], dtype)
    del vectors
    hostmemory.trim()
    return found


@jax.jit
def _core(w, left, right):
    return products.matmul(products.matmul(left.T, w.astype(left.dtype)), right)


def held(shape, count, itemsize):
    """Bytes that are held at most: an eigenproblem, or bases, coefficients, a model and half of the result."""
    (o, i), large = shape, max(shape)
    found = ((count + 2) * o * i + o * o + i * i) * itemsize
    return max(16 * large**2 + (o * i + large**2) * itemsize, found) + _matrices.library(i)
