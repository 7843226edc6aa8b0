"""Weights that are not multiplied out, and the products with them.

    array                  W                                        (i, o) or any shape
    Factored               W = base + left @ right                  left (i, q), right (q, o)
    Sparse                 W = base + left @ right + S              S holds `values` at flat places `at`
    Combination            W = start + sum_j c_j V_j                c (k,), V (k, ...), of any shape

`linear(x, w)` is x @ W for each; `dense(w)` is W. Of a Combination it is cheap only where many runs
share x @ V.
"""

import typing

import jax
import jax.numpy as jnp

from jaxsub.parametrisations import _parts


class Factored(typing.NamedTuple):
    """A matrix and a low-rank update of it."""

    base: typing.Any  # (i, o)
    left: typing.Any  # (i, q)
    right: typing.Any  # (q, o)


class Sparse(typing.NamedTuple):
    """A matrix, a low-rank update and a sparse one."""

    base: typing.Any  # (i, o)
    left: typing.Any  # (i, q)
    right: typing.Any  # (q, o)
    values: typing.Any  # (s,)
    at: typing.Any  # (s,) int32 places in W flattened


class Combination(typing.NamedTuple):
    """An array and a combination of directions."""

    start: typing.Any  # (...)
    c: typing.Any  # (k,)
    basis: typing.Any  # (k, ...)


def dense(w):
    """W, multiplied out."""
    if isinstance(w, Factored):
        return w.base + w.left @ w.right
    if isinstance(w, Sparse):
        return _formed(w)
    if isinstance(w, Combination):
        return w.start + _parts.combination(w.c, w.basis)
    return w


def linear(x, w):
    """x @ W of inputs (..., i); of a Factored the product of its factors is never formed."""
    if isinstance(w, Factored):
        return x @ w.base + (x @ w.left) @ w.right
    if isinstance(w, Sparse):
        return _sparse_product(x, w)
    if isinstance(w, Combination):
        return x @ w.start + _parts.combination(w.c, x @ w.basis)
    return x @ w


def is_shared_cheaper(w, num_rows, num_runs):
    """Whether the products of `num_rows` inputs (.., i) with the V_j, made once for `num_runs` runs, are less work.

    Against a W of its own for each run: multiplications of k n i o + R k n o and R (k i o + n i o).
    """
    if w.basis.ndim != 3:
        return False
    k, i, o = w.basis.shape
    return k * num_rows * o * (i + num_runs) < num_runs * i * o * (k + num_rows)


def cast(w, dtype):
    """`w` with its floating-point arrays in `dtype`."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, w)


def _formed(w):
    update = w.left @ w.right
    return w.base + update.reshape(-1).at[w.at].add(w.values, mode="promise_in_bounds").reshape(update.shape)


@jax.custom_vjp
def _sparse_product(x, w):
    return x @ _formed(w)


def _forward(x, w):
    return x @ _formed(w), (x, w)  # W itself is not kept: it is formed again on the way back


def _backward(kept, gradient):
    x, w = kept
    rows, changes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    whole = rows.T @ changes
    of_w = Sparse(
        whole,  # dropped by the compiler where the base is not trained
        whole @ w.right.T,
        w.left.T @ whole,
        whole.reshape(-1)[w.at],
        jnp.zeros(w.at.shape, jax.dtypes.float0),
    )
    return gradient @ _formed(w).T, of_w


_sparse_product.defvjp(_forward, _backward)
