"""The models of a layer as matrices, one at a time: whole ones, or the small cores of low-rank updates.

    dense      W_n (o, i)                          results are the layer itself
    low-rank   W_n = Q_b C_n Q_a.T, C_n (p, q)     results go back through Q_b and Q_a, as factors

A method that commutes with rotations of either side, f(Q W P.T) = Q f(W) P.T, gives the same on both.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import hostmemory, rows as core, solvers
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
        """(p, p) float64 sum of W_n W_n.T, its upper triangle, in Fortran's order: see `solvers.descending`."""
        return self._gram(self.shape[0], lambda w: w.T)

    def right_gram(self):
        """(q, q) float64 sum of W_n.T W_n; as `left_gram`."""
        return self._gram(self.shape[1], lambda w: w)

    def _gram(self, size, turned):
        total = np.zeros((size, size), order="F")
        for w in self:
            solvers.add_square(total, turned(np.asarray(w)))
        return total

    def rows_of(self, u):
        """Rows u.T W_n (k, i) in the layer's own columns, in memory, for a basis u (p, k) of the left side."""
        o, i = self.rows.shape
        k, count = u.shape[1], self.num_models
        # A model is read to where its rows will be, and turned there a few columns at a time: no other holds it.
        room = hostmemory.zeros(((count - 1) * k * i + o * i,), u.dtype)
        with jax.enable_x64(True):
            basis = jax.device_put(u)
            for n in range(count):
                w = room[n * k * i :][: o * i].reshape(o, i)
                self.rows.read_matrix(n, w)
                for at in solvers.panels(i, o):
                    w[:k, at] = _turned(basis, w[:, at])
        x = room[: count * k * i].reshape(count, k, i)
        return core.ArrayRows(x, self.rows.name, self.rows.model_ids, is_update=True)

    def result(self, x):
        """The row of a matrix (p, q)."""
        return self.rows.result(x)

    def product(self, u, x):
        """The row of u @ x, u (p, k) and x (k, q); NumPy arrays."""
        return self.rows.product(u, x)

    def wide_product(self, u, x):
        """The row of u @ x, x (k, i) being in the layer's own columns, as `rows_of` gives them."""
        return self.product(u, x)


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

    def rows_of(self, u):
        """See `Matrices`."""
        x = np.stack([u.T @ np.asarray(w) @ self.right.T for w in self])
        return core.ArrayRows(x, self.rows.name, self.rows.model_ids, is_update=True)

    def result(self, x):
        """See `Matrices`."""
        x = np.asarray(x, np.float64)
        return self.rows.of_factors(x @ self.right.T, self.left)

    def product(self, u, x):
        """See `Matrices`."""
        return self.wide_product(u, x @ self.right.T)

    def wide_product(self, u, x):
        """See `Matrices`."""
        return self.rows.of_factors(x, self.left @ u)


def of(rows):
    """The Matrices of rows whose shape is a matrix."""
    return Cores(rows) if rows.factors() is not None else Matrices(rows)


@jax.jit
def _turned(u, w):
    return products.matmul(u.T, w)


def _basis(x):
    """Orthonormal columns that span the columns of x (d, k), as many as are independent; float64. One, if all are 0."""
    x = x[:, np.abs(x).max(axis=0) > 0].astype(np.float64)
    if x.shape[0] <= x.shape[1] or not x.shape[1]:
        return np.eye(x.shape[0], max(x.shape[0] if x.shape[1] else 1, 1))
    q, r = np.linalg.qr(x)
    u, s, _ = np.linalg.svd(r)
    return q @ u[:, s > max(x.shape) * np.finfo(np.float64).eps * s.max(initial=0.0)]
