"""The models of a layer as matrices, one at a time: whole ones, or the small cores of low-rank updates.

    dense      W_n (o, i)                          results are the layer itself
    low-rank   W_n = Q_b C_n Q_a.T, C_n (p, q)     results go back through Q_b and Q_a, as factors

A method that commutes with rotations of either side, f(Q W P.T) = Q f(W) P.T, gives the same on both.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import rows as core
from jaxsub.linalg import products


class Matrices:
    """N matrices (p, q) of one layer, minus the base where there is one."""

    def __init__(self, rows):
        self.rows, self.shape = rows, rows.shape

    @property
    def num_models(self):
        """N."""
        return self.rows.num_models

    def __iter__(self):
        """Yields the matrices, read one at a time."""
        return (self.rows.matrix(n) for n in range(self.num_models))

    def __getitem__(self, n):
        return self.rows.matrix(n)

    def left_gram(self):
        """(p, p) float64 sum of W_n W_n.T."""
        with jax.enable_x64(True):
            return np.asarray(sum(_left_gram(w) for w in self))

    def right_gram(self):
        """(q, q) float64 sum of W_n.T W_n."""
        with jax.enable_x64(True):
            return np.asarray(sum(_left_gram(w.T) for w in self))

    def rows_of(self, u):
        """Rows u.T W_n (k, i) in the layer's own columns, in memory, for a basis u (p, k) of the left side."""
        with jax.enable_x64(True):
            x = None
            for n, w in enumerate(self):
                row = np.asarray(self.wide(products.matmul(u.T.astype(w.dtype), w)))
                x = np.empty((self.num_models, *row.shape), row.dtype) if x is None else x
                x[n] = row
        return core.ArrayRows(x, self.rows.name, self.rows.model_ids, is_update=True)

    def wide(self, x):
        """x (k, q) in the layer's own columns (k, i)."""
        return x

    def result(self, x):
        """The row of a matrix (p, q)."""
        return self.rows.result(x)

    def product(self, u, x):
        """The row of u @ x, u (p, k) and x (k, i) in the layer's own columns."""
        with jax.enable_x64(True):
            return self.rows.result(products.matmul(jnp.asarray(u).astype(x.dtype), x))


class Cores(Matrices):
    """The same of low-rank updates."""

    def __init__(self, rows):
        super().__init__(rows)
        a, b = rows.factors()
        self.left = _basis(b.transpose(1, 0, 2).reshape(b.shape[1], -1))
        self.right = _basis(a.reshape(-1, a.shape[2]).T)
        self.shape = self.left.shape[1], self.right.shape[1]

    def __iter__(self):
        return (self[n] for n in range(self.num_models))

    def __getitem__(self, n):
        a, b = (part[n].astype(np.float64) for part in self.rows.factors())
        with jax.enable_x64(True):
            return jnp.asarray((self.left.T @ b) @ (a @ self.right))

    def wide(self, x):
        """See `Matrices`."""
        return products.matmul(x, jnp.asarray(self.right.T).astype(x.dtype))

    def result(self, x):
        """See `Matrices`."""
        x = np.asarray(x, np.float64)
        return self.rows.of_factors(x @ self.right.T, self.left)

    def product(self, u, x):
        """See `Matrices`."""
        return self.rows.of_factors(np.asarray(x), self.left @ np.asarray(u))


def of(rows):
    """The Matrices of rows whose shape is a matrix."""
    return Cores(rows) if rows.factors() is not None else Matrices(rows)


@jax.jit
def _left_gram(w):
    w = w.astype(jnp.float64)
    return products.matmul(w, w.T)


def _basis(x):
    """Orthonormal columns that span the columns of x (d, k), as many as are independent; float64. One, if all are 0."""
    x = x[:, np.abs(x).max(axis=0) > 0].astype(np.float64)
    if x.shape[0] <= x.shape[1] or not x.shape[1]:
        return np.eye(x.shape[0], max(x.shape[0] if x.shape[1] else 1, 1))
    q, r = np.linalg.qr(x)
    u, s, _ = np.linalg.svd(r)
    return q @ u[:, s > max(x.shape) * np.finfo(np.float64).eps * s.max(initial=0.0)]
