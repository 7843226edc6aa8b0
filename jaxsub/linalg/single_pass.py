"""Truncated SVD of a matrix that comes once, in blocks of rows, of columns, or of both, in any order.

    left = x t_1    right = t_2.T x    core = t_3.T x t_4    probe = t_5.T x

All four are sums over blocks, so blocks may be added by different processes and their sketches summed. After the last
one, with q, p orthonormal bases of the two ranges, x ~ q [(t_3.T q)^+ core (p.T t_4)^+] p.T. The probe, unused until
then, tells the error. Call with x64 on.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsub.linalg import certificates, operands, orth, products, sketch

PROBES = 10  # as in `certificates.probe_estimate`


class Sketches(NamedTuple):
    """Sums over the blocks seen so far; zero at the start."""

    left: jax.Array  # (N, l)
    right: jax.Array  # (l, D)
    core: jax.Array  # (c, c)
    probe: jax.Array  # (t, D)
    energy: jax.Array  # () float64 squared Frobenius norm


class SinglePassSvd(NamedTuple):
    """A truncated Svd and the estimate of its error."""

    u: jax.Array  # (N, k)
    s: jax.Array  # (k,)
    vt: jax.Array  # (k, D)
    energy: jax.Array  # () float64 squared Frobenius norm of x
    estimate: jax.Array  # () float64 relative error |x - u s vt|_F / |x|_F, unbiased in its square
    upper: jax.Array  # () float64, exceeded by the true error with at most 1 %


def start(num_rows, width, *, rank, oversample=None, dtype="float32"):
    """Empty Sketches for x (N, D) of which `rank` components are wanted.

    Args:
        num_rows, width: N and D.
        rank: k.
        oversample: l = k + oversample; None is 3 k + 1 (l = 4 k + 1, c = 2 l + 1: the source's advice for any decay).
        dtype: "float32" or "float64", of the sketches.

    Raises:
        ConfigError: x64 off, or an impossible rank.
    """
    certificates.require_x64("single_pass")
    operands.require_rank(rank, min(num_rows, width), "x")
    size = min(rank + (3 * rank + 1 if oversample is None else oversample), num_rows, width)
    core = 2 * size + 1
    shapes = ((num_rows, size), (size, width), (core, core), (PROBES, width))
    return Sketches(*(jnp.zeros(shape, dtype) for shape in shapes), jnp.zeros((), jnp.float64))


@functools.partial(jax.jit, static_argnames="test", donate_argnums=0)
def add(sketches, block, key, row, column, *, test="gaussian"):
    """Sketches with one more block of x; consumes (donates) the Sketches it is given.

    Args:
        sketches: Sketches so far.
        block: (n, d) entries x[row : row + n, column : column + d], any float dtype.
        key: typed PRNG key, the same for all blocks.
        row, column: () int32 where the block lies; traced, so one compilation serves all blocks of a shape.
        test: name in `sketch.TESTS` or a function of that signature, static; the same for all blocks.

    Fails on: blocks that overlap, or are added twice: nothing tells.
    """
    draw, dtype = sketch.named(test), sketches.left.dtype
    size, core = sketches.left.shape[1], sketches.core.shape[0]
    keys = [jax.random.fold_in(key, j) for j in range(5)]
    (n, d), x = block.shape, block.astype(dtype)
    t1, t4 = (draw(keys[j], d, c, start=column).astype(dtype) for j, c in ((0, size), (3, core)))
    t2, t3 = (draw(keys[j], n, c, start=row).astype(dtype) for j, c in ((1, size), (2, core)))
    t5 = sketch.gaussian(keys[4], n, PROBES, start=row).astype(dtype)  # Gaussian: the certificate's law is theirs
    right = products.row_major(products.matmul(jnp.concatenate([t2, t3, t5], axis=1).T, x))
    left = products.row_major(products.matmul(x, t1))
    at_rows = jax.lax.dynamic_slice_in_dim(sketches.left, row, n) + left
    at = [jax.lax.dynamic_slice_in_dim(a, column, d, axis=1) for a in (sketches.right, sketches.probe)]
    update = jax.lax.dynamic_update_slice_in_dim
    return Sketches(
        update(sketches.left, at_rows, row, 0),
        update(sketches.right, at[0] + right[:size], column, 1),
        sketches.core + products.matmul(right[size : size + core], t4),
        update(sketches.probe, at[1] + right[size + core :], column, 1),
        sketches.energy + certificates.energy(block),
    )


@functools.partial(jax.jit, static_argnames=("rank", "test"))
def finish(sketches, key, *, rank, test="gaussian"):
    """Truncated SVD from the sketches of all blocks.

    Args:
        sketches: Sketches after the last block.
        key, test: as given to every `add`.
        rank: k, as given to `start`.

    Returns:
        SinglePassSvd in the sketches' dtype. For exact rank k or less the factors are exact to rounding.

    Fails on: slow decay; the expected squared error is up to a few times the best at l = 4 k + 1, where two passes come
    to within k / l of it. `estimate` is of this result, not of the best one.
    Source: Tropp, Yurtsever, Udell, Cevher 2019, "Streaming low-rank matrix approximation", reconstruction from
    range, co-range and core; error from a further sketch as there, confidence as `certificates.probe_factor`.
    """
    draw, dtype = sketch.named(test), sketches.left.dtype
    num_rows, width, core = sketches.left.shape[0], sketches.right.shape[1], sketches.core.shape[0]
    q, p = orth.cholesky_qr2(sketches.left)[0], orth.cholesky_lq2(sketches.right)[0]
    t3 = draw(jax.random.fold_in(key, 2), num_rows, core).astype(dtype)
    t4 = draw(jax.random.fold_in(key, 3), width, core).astype(dtype)
    inner = _least_squares(products.matmul(t3.T, q), sketches.core)
    inner = _least_squares(products.matmul(t4.T, p.T), inner.T).T
    a, s, bt = jnp.linalg.svd(inner, full_matrices=False)
    is_signal = ~(s[:rank] <= 4 * s.shape[0] * float(jnp.finfo(dtype).eps) * s[0])  # NaN stays NaN
    s = jnp.where(is_signal, s[:rank], 0)
    u = jnp.where(is_signal, products.matmul(q, a[:, :rank]), 0)
    vt = jnp.where(is_signal[:, None], products.matmul(bt[:rank], p), 0)
    u, vt = orth.fix_signs(vt, u)
    t5 = sketch.gaussian(jax.random.fold_in(key, 4), num_rows, PROBES).astype(dtype)
    rest = sketches.probe - products.matmul(products.matmul(t5.T, u) * s, vt)
    square = jnp.sum(jnp.square(rest.astype(jnp.float64))) / PROBES
    estimate = jnp.sqrt(square / jnp.where(sketches.energy > 0, sketches.energy, 1.0))
    rounding = certificates.SPREAD * math.sqrt(max(num_rows, s.shape[0])) * float(jnp.finfo(dtype).eps)
    upper = (estimate + rounding) * certificates.probe_factor(PROBES, 0.01)
    upper = jnp.where(sketches.energy > 0, upper, 0.0)
    return SinglePassSvd(u, s, vt, sketches.energy, estimate, upper)


def single_pass_svd(blocks, key, *, shape, rank, oversample=None, test="gaussian"):
    """Truncated SVD of a stream of blocks, each seen once: `start`, `add` for every block, `finish`.

    Args:
        blocks: iterable of (row, column, block (n, d)); blocks of equal shape share one compilation.
        key: typed PRNG key.
        shape: (N, D) of the whole.
        rank, oversample, test: as in `start` and `add`.

    Returns:
        SinglePassSvd; float64 if the first block is, else float32. Zeros if there is no block.
    """
    sketches = None
    for row, column, block in blocks:
        if sketches is None:
            dtype = orth.compute_dtype(block)
            sketches = start(*shape, rank=rank, oversample=oversample, dtype=dtype)
        sketches = add(sketches, block, key, jnp.int32(row), jnp.int32(column), test=test)
    if sketches is None:
        sketches = start(*shape, rank=rank, oversample=oversample)
    return finish(sketches, key, rank=rank, test=test)


def _least_squares(a, b):
    """a^+ b for a (c, l) whose columns are of comparable size or zero; zero columns give zero rows."""
    q, r = orth.cholesky_qr2(a)
    present = jnp.diagonal(r) > 0
    eye = jnp.eye(r.shape[0], dtype=r.dtype)
    r = jnp.where(present[:, None] & present, r, 0) + jnp.where(present, 0, 1) * eye
    x = jax.scipy.linalg.solve_triangular(r, products.matmul(q.T, b))
    return jnp.where(present[:, None], x, 0)
