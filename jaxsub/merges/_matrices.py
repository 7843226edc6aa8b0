"""What the methods for matrices share: numerical rank, and what becomes of layers that are none."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import precision
from jaxsub.linalg import products


def fallback(rows, scaling):
    """scaling * mean of the rows, for vectors and kernels of more than two axes: published code does so."""
    return rows.combination(np.full(rows.num_models, scaling / rows.num_models))


def svd(w):
    """(u (p, k), s (k,), vt (k, q)) of a matrix, k the number of singular values that are more than rounding.

    In float64 where that is cheap: leading vectors hang on gaps between values, which float32 may not tell. Rounding is
    max(p, q) eps of the largest value, with the eps of w.
    """
    dtype = precision.compute_dtype(w.dtype.name, math.prod(w.shape) * min(w.shape))
    u, s, vt = _svd(w.astype(dtype))
    values = np.asarray(s)
    floor = max(w.shape) * float(jnp.finfo(w.dtype).eps) * (values[0] if values.size else 0.0)
    count = int(np.sum(values > floor))
    return u[:, :count], s[:count], vt[:count]


@jax.jit
def _svd(w):
    return jnp.linalg.svd(w, full_matrices=False)


def orthonormal(x):
    """Nearest matrix with orthonormal columns to x (p, k), of its directions that are more than rounding."""
    u, _, vt = svd(x)
    return products.matmul(u, vt)
