"""What the methods for matrices share: numerical rank, and what becomes of layers that are none."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import hostmemory, precision
from jaxsub.linalg import products


def fallback(rows, scaling):
    """scaling * mean of the rows, for vectors and kernels of more than two axes: published code does so."""
    return rows.combination(np.full(rows.num_models, scaling / rows.num_models))


def svd(w):
    """(u (p, k), s (k,), vt (k, q)) of a matrix, k the number of singular values that are more than rounding.

    In float64 where that is cheap: leading vectors hang on gaps between values, which float32 may not tell. Rounding is
    max(p, q) eps of the largest value, with the eps of w.
    """
    eps = float(jnp.finfo(w.dtype).eps)
    u, s, vt = _svd(w.astype(_dtype(w.shape, w.dtype)))
    values = np.asarray(s)
    floor = max(w.shape) * eps * (values[0] if values.size else 0.0)
    # An overflow is told by the one who writes the result; no singular value above NaN would make it 0 in silence.
    count = int(np.sum(values > floor)) if np.isfinite(values).all() else values.size
    return u[:, :count], s[:count], vt[:count]


def leading(w, most):
    """The first `most` of `svd` as (u (p, k), s (k,), v (q, k))."""
    u, s, vt = svd(w)
    found = u[:, :most], s[:most], vt[:most].T
    del u, vt
    hostmemory.trim()
    return found


def held(shape, itemsize, more=0):
    """Bytes of `svd` of a matrix of this shape: ten times the matrix in the dtype of the decomposition, and `more`."""
    own = _dtype(shape, np.dtype(f"f{itemsize}"))
    return (10 + more) * math.prod(shape) * np.dtype(own).itemsize + 2 * math.prod(shape) * itemsize


def _dtype(shape, dtype):
    return precision.compute_dtype(np.dtype(dtype).name, math.prod(shape) * min(shape))


@jax.jit
def _svd(w):
    return jnp.linalg.svd(w, full_matrices=False)


def orthonormal(parts):
    """Nearest matrix with orthonormal columns to the matrices (p, k) of a list side by side; empties the list."""
    x = jnp.concatenate(parts, axis=1)
    parts.clear()
    u, _, vt = svd(x)
    del x
    hostmemory.trim()
    return products.matmul(u, vt)
