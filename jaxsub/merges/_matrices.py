"""What the methods for matrices share: numerical rank, and what becomes of layers that are none."""

import functools

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


@functools.partial(jax.jit, static_argnames="count")
def polar(x, *, count):
    """Nearest matrix with orthonormal columns to x (p, k); of its directions the leading `count` only."""
    u, _, vt = jnp.linalg.svd(x, full_matrices=False)
    return products.matmul(u[:, :count], vt[:count])


def orthonormal(x):
    """`polar` of the directions of x (p, k) that are resolved."""
    s = jnp.linalg.svd(x, compute_uv=False)
    return polar(x, count=resolved(s, x.shape))
