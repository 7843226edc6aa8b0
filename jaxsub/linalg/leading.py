"""Leading directions of a positive semidefinite matrix, such as a mode Gram: all of them, or a few of many.

A few of many come from subspace iteration, which takes a tenth of the time of LAPACK at 1024 with 64 wanted. It is
right where the spectrum falls off; where it is flat behind the wanted part it would need hundreds of steps. So the
iteration watches its own progress, and where it would not end soon the whole eigenproblem is solved instead.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsub import precision
from jaxsub.linalg import orth, products

ITERATE_FROM = 512  # under this size LAPACK takes 12 ms and less
OVERSAMPLES = 16
STEPS = 10  # at 1024 with 80 columns 2.5 ms each: ten of them are a third of LAPACK's time
TOLERANCE = 1e-4  # energy still to be gained, relative to the energy left out: 5e-5 of an error


class Directions(NamedTuple):
    """Leading eigenpairs; `values` may be more than the vectors, all that were computed exactly."""

    values: jax.Array  # (m,) float64, non-increasing, k <= m <= d
    total: jax.Array  # () float64 sum of all d eigenvalues
    vectors: jax.Array  # (k, d) orthonormal rows, largest entry of each positive
    floor: jax.Array  # () float64 value under which an eigenvalue is noise of the products


def leading(gram, *, rank, dtype, method="auto"):
    """Leading eigenpairs of a symmetric positive semidefinite matrix.

    Args:
        gram: (d, d) float64.
        rank: k, 1 <= k <= d, static; d for the whole spectrum.
        dtype: "float32" or "float64", the dtype of the products that made `gram`, and of the vectors.
        method: "lapack", "iteration" (unless its check fails) or "auto": iteration where d >= 512 and k < d / 4.

    Returns:
        Directions; m = d from LAPACK, m = k from the iteration. A zero matrix gives zero values and some
        orthonormal rows.

    Fails on: nothing by design, but where eigenvalues k and k + 1 are equal the vectors are one choice of many, and
    the iteration stops at a subspace whose energy is right to 1e-4 of the energy outside.

    Source: block power method with Rayleigh-Ritz steps, Golub and Van Loan 2013, section 8.2.4; the stopping rule
    extrapolates the captured energy geometrically (Aitken).
    """
    size = gram.shape[0]
    iterate = method == "iteration" or (method == "auto" and are_few(size, rank))
    return _leading(gram, rank=rank, dtype=dtype, iterate=iterate and rank < size)


def are_few(size, rank):
    """Whether `rank` of `size` directions are found by iteration, if the method is "auto"."""
    return size >= ITERATE_FROM and 4 * rank < size


@functools.partial(jax.jit, static_argnames=("rank", "dtype", "iterate"))
def _leading(gram, *, rank, dtype, iterate):
    total = jnp.trace(gram)
    scale = jnp.where(total > 0, total, 1.0)
    gram = gram / scale
    if not iterate:
        values, vectors = _lapack(gram, rank, dtype)
    else:
        vectors, found = subspace_iteration(gram.astype(dtype), rank=rank)
        values, vectors = jax.lax.cond(
            found,
            lambda g, q: _ritz(g, q, rank),
            lambda g, q: tuple(f[:rank] for f in _lapack(g, rank, dtype)),
            gram,
            vectors,
        )
    values = jnp.maximum(values, 0.0) * scale
    floor = precision.gram_floor(1.0, len(gram), dtype) ** 2 * values[0]
    return Directions(values, total, orth.fix_signs(vectors), floor)


def _lapack(gram, rank, dtype):
    # Large problems are solved in the dtype of their products: float64 takes 1.5 times as long and adds no digit.
    wide = gram if gram.shape[0] < ITERATE_FROM else gram.astype(dtype)
    values, vectors = jnp.linalg.eigh(wide)
    return values[::-1].astype(gram.dtype), vectors[:, ::-1].T[:rank].astype(dtype)


def _ritz(gram, basis, rank):
    low = gram.astype(basis.dtype)
    image = products.matmul(basis, low)
    small = products.matmul(image, basis.T)
    values, turn = jnp.linalg.eigh((small + small.T) / 2)
    vectors = products.matmul(turn[:, ::-1].T[:rank], basis)
    return values[::-1][:rank].astype(gram.dtype), vectors


def subspace_iteration(gram, *, rank, steps=STEPS):
    """Rows that span the leading directions of gram (d, d), trace 1, and whether they are known to.

    Args:
        gram: (d, d) float32 or float64.
        rank: k < d.
        steps: most block products.

    Returns:
        (l, d) orthonormal rows, l = min(d, k + 16); and a () bool: the first k of their Ritz vectors hold all but
        1e-4 (or the rounding error) of the energy that the best k directions hold more than what is left out.
    """
    size = gram.shape[0]
    width = min(size, rank + OVERSAMPLES)
    noise = 4 * jnp.finfo(gram.dtype).eps

    def orthonormal(rows):
        return products.row_major(jnp.linalg.qr(rows.T)[0].T)

    def goes_on(state):
        _, _, _, found, hopeless, step = state
        return ~found & ~hopeless & (step < steps)

    def advance(state):
        rows, before, last_gain, _, _, step = state
        image = products.row_major(products.matmul(rows, gram))
        small = products.matmul(image, rows.T)
        captured = jnp.sum(jnp.linalg.eigvalsh((small + small.T) / 2)[width - rank :])
        gain = jnp.abs(captured - before)
        ratio = jnp.clip(gain / jnp.maximum(last_gain, noise * noise), 1e-3, 0.99)
        allowed = TOLERANCE * jnp.maximum(1 - captured, 0) + noise
        left = gain * ratio / (1 - ratio)
        found = (left <= allowed) & (step > 0)
        needed = jnp.log(allowed / jnp.maximum(left, allowed)) / jnp.log(ratio)
        hopeless = (step >= 3) & (step + needed > steps)
        return orthonormal(image), captured, gain, found, hopeless, step + 1

    start = orthonormal(products.matmul(_signs(width, size, gram.dtype), gram))
    one = jnp.ones((), gram.dtype)
    state = (start, 0 * one, one, jnp.bool_(False), jnp.bool_(False), jnp.int32(0))
    rows, _, _, found, _, _ = jax.lax.while_loop(goes_on, advance, state)
    return rows, found


def _signs(rows, columns, dtype):
    """A fixed matrix of signs that look random (bit mixing of Murmur3's finaliser): no key, the same on any device."""
    h = jnp.arange(1, rows * columns + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.where((h >> 16) & 1, 1, -1).astype(dtype).reshape(rows, columns)
