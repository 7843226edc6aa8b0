"""The subspace that the updates of a layer share, from both sides, and their coefficients in it.

    U_1 (p, k_1): leading eigenvectors of sum_n W_n W_n.T;   U_2 (q, k_2) of sum_n W_n.T W_n;   C_n = U_1.T W_n U_2

Uncentred HOSVD (E6 without E2): a mean that is taken off first makes every linear merge the plain mean (E33).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, rows as core
from jaxsub.linalg import products
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
        with jax.enable_x64(True):
            c = jnp.asarray(c).astype(jnp.float64)
            return self.found.result(products.matmul(products.matmul(jnp.asarray(self.left), c), self.right.T))


def of(rows, rank, energy):
    """The Shared of rows that are matrices: `rank` directions a side, or as many as hold `energy` where it is 0."""
    if rank < 0 or not 0 < energy <= 1:
        raise errors.ConfigError(f"rank={rank}, energy={energy}: a rank of 1 or more, or 0 < energy <= 1")
    found = matrices.of(rows)
    left, right = (_leading(gram, rank, energy) for gram in (found.left_gram(), found.right_gram()))
    c = None
    with jax.enable_x64(True), np.errstate(over="ignore"):  # told by the one who writes the result
        for n, w in enumerate(found):
            if c is None:
                c = np.empty((rows.num_models, left.shape[1], right.shape[1]), w.dtype)
            c[n] = _core(w, left, right)
    ids = rows.model_ids
    return Shared(found, left, right, core.ArrayRows(c, rows.name, ids, is_update=True, weights=rows.weights))


def _leading(gram, rank, energy):
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values[::-1], 0.0)
    if not rank:
        sums = np.cumsum(values)
        rank = int(np.searchsorted(sums, energy * sums[-1] * (1 - 1e-12))) + 1 if sums[-1] > 0 else 1
    return np.ascontiguousarray(vectors[:, ::-1][:, :rank])


@jax.jit
def _core(w, left, right):
    return products.matmul(products.matmul(left.T, w.astype(left.dtype)), right)


def held(shape, count, itemsize):
    """Bytes that are held at most: the larger eigenproblem, bases, and coefficients."""
    o, i = shape
    return 8 * (6 * max(o, i) ** 2 + 2 * o * i) + count * o * i * itemsize
