"""What the methods for matrices share: numerical rank, and what becomes of layers that are none."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub.linalg import products


def fallback(rows, scaling):
    """scaling * mean of the rows, for vectors and kernels of more than two axes: published code does so."""
    return rows.combination(np.full(rows.num_models, scaling / rows.num_models))


@jax.jit
def svd(w):
    """(u (p, k), s (k,), vt (k, q)) of a small enough matrix, in its own dtype."""
    return jnp.linalg.svd(w, full_matrices=False)


def resolved(s, shape):
    """How many of the singular values s, non-increasing, are more than rounding: max(p, q) eps of the largest."""
    s = np.asarray(s)
    return int(np.sum(s > max(shape) * np.finfo(s.dtype).eps * s[0])) if s.size and s[0] > 0 else 0


def orthonormal(x):
    """Nearest matrix with orthonormal columns to x (p, k), of its directions that are more than rounding.

    In float64: what two nearly parallel columns differ by is told apart here.
    """
    u, s, vt = svd(x.astype(jnp.float64))
    count = resolved(np.asarray(s).astype(x.dtype), x.shape)
    return products.matmul(u[:, :count], vt[:count]).astype(x.dtype)
