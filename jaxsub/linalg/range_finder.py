"""Bases of the dominant range of x (N, D), counted in passes over x.

    pass 1: y = x t      pass 2: z = y.T x      pass 3: y = x z.T  ...        orthonormalised between passes

With an even number the basis is of the column space, (N, m), and the last product, the image, is basis.T @ x; with an
odd one of the row space, (m, D), and the image is x @ basis.T (Bjarkason 2019: any number from 2 on is of use). Rows
or columns of the basis are orthonormal, or zero where x has no more directions.

Inside shard_map x is (N, local D) and `axis` the mesh axis of D. Long arrays are never gathered; an odd pass adds up
N * l numbers, an orthonormalisation 2 * l**2 of the long side. Products come out row-major, each in the order that is
fast on CPU: written as x.T @ y, every second pass takes 4 to 8 times as long.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import operands, orth, products

UNROLLED = 3  # power iterations


class Range(NamedTuple):
    """What a range finder returns."""

    basis: jax.Array  # (N, m) orthonormal or zero columns for even passes, else (m, D) such rows
    image: jax.Array  # (m, D) basis.T @ x for even passes, else (N, m) x @ basis.T


def times_tests(x, zt, axis=None):
    """(N, m) x @ zt.T for zt (m, D): one pass."""
    return orth.total(products.row_major(products.matmul(x, zt.T)), axis)


def tests_times(y, x):
    """(m, D) y.T @ x for y (N, m): one pass."""
    return products.row_major(products.matmul(y.T, x))


def power(x, tests, *, passes, axis=None):
    """Range from power iterations of x @ x.T on the test matrix.

    Args:
        x: (N, D) float32 or float64; inside shard_map its local columns.
        tests: (D, l) test matrix, dtype of x; l is rank + oversample.
        passes: products with x, at least 2, static.
        axis: mesh axis of D inside shard_map, or None.

    Returns:
        Range with m = l.

    Raises:
        ConfigError: for fewer than two passes.

    Between passes the basis is only regularised (`orth.regularised`): directions under eps of the largest in a
    product are not told from rounding. Fails on: slow decay with two passes.
    Source: Halko, Martinsson, Tropp 2011, Algorithm 4.4, with every half step counted.
    """
    _check(passes)
    is_left = passes % 2 == 0

    y = times_tests(x, tests.T, axis)
    scale = _scale(y)

    def twice(_, y):
        z = orth.regularised(tests_times(orth.regularised(y) * scale, x), axis, is_wide=True)
        return times_tests(x, z, axis) * scale

    y = y * scale
    rounds = (passes - 2 if is_left else passes - 3) // 2
    # Few rounds are unrolled (products in a loop were a fifth slower); many are one compiled body.
    y = jax.lax.fori_loop(0, rounds, twice, y, unroll=rounds if 0 < rounds <= UNROLLED else 1)
    if is_left:
        basis = orth.cholesky_qr2(y)[0]
        return Range(basis, tests_times(basis, x))
    basis = orth.cholesky_lq2(tests_times(orth.regularised(y) * scale, x), axis)[0]
    return Range(basis, times_tests(x, basis, axis))


def _scale(y):
    """() power of two that brings the largest entry of y to [0.5, 1); 1 for zeros.

    Squares of products with small or large weights would leave float32's range. Taken from the first product with x and
    applied on its short side, this costs nothing beside a pass.
    """
    return orth.unit_scale(jnp.max(jnp.abs(y)))


def krylov(x, tests, *, passes, axis=None):
    """Block Krylov space of x @ x.T and x @ tests: wider than the range of `power`, at the same cost of products.

    Args: as for `power`; N and D must be at least l * (passes // 2).

    Returns:
        Range with m = l * (passes // 2).

    Every block is orthogonalised against those before it, twice, and the product that the next one is made of is its
    image: no pass is wider than l. More memory and small work (m**2 (N + D)) than `power`; in return l may be the rank
    itself, and slow decay needs about the square root of the passes.
    Fails on: more equal singular values than test vectors, of which l are found.
    Source: Musco and Musco 2015, Algorithm 2; blocks orthogonalised as in block Lanczos (Golub and Underwood 1977).
    """
    _check(passes)
    is_left, blocks, count = passes % 2 == 0, passes // 2, tests.shape[1]
    rows = x.shape[0] if is_left else x.shape[1]
    long_axis = None if is_left else axis

    first = times_tests(x, tests.T, axis)
    scale = _scale(first)

    def next_product(image):
        """Scaled product that the next block is made of, (N, l), from the image of the last one."""
        if not is_left:
            return image * scale
        return times_tests(x, orth.regularised(image * scale, axis, is_wide=True), axis) * scale

    # A loop, not unrolled: orth.cholesky_qr2 with its fallbacks takes a second to compile, and six passes had seven.
    def step(j, carry):
        basis, image, y = carry
        long = y if is_left else tests_times(orth.regularised(y) * scale, x).T
        block = _next_block(long, basis, j > 0, long_axis)
        new = tests_times(block, x) if is_left else times_tests(x, block.T, axis)
        basis = jax.lax.dynamic_update_slice_in_dim(basis, block, j * count, axis=1)
        image = jax.lax.dynamic_update_slice_in_dim(image, new, j * count, axis=0 if is_left else 1)
        return basis, image, jax.lax.cond(j + 1 < blocks, next_product, lambda _: y, new)

    basis = jnp.zeros((rows, blocks * count), x.dtype)
    image = jnp.zeros((blocks * count, x.shape[1]) if is_left else (x.shape[0], blocks * count), x.dtype)
    basis, image, _ = jax.lax.fori_loop(0, blocks, step, (basis, image, first * scale))
    return Range(basis if is_left else basis.T, image)


def _next_block(y, basis, has_earlier, axis):
    """Orthonormal or zero columns for the part of y (long, l) outside basis (long, m); zero if it is rounding.

    Columns of basis not filled yet are zero; `has_earlier` () says whether any is filled.
    """
    tolerance = 4 * basis.shape[1] * float(jnp.finfo(y.dtype).eps)

    def again(j, y):
        inside = products.matmul(basis, orth.total(products.matmul(basis.T, y), axis))
        y = jnp.where(j > 0, y - inside, y)  # first only orthonormal, so that what is left has a scale
        square = orth.total(jnp.sum(jnp.square(y), axis=0), axis)
        return orth.cholesky_qr2(jnp.where((j == 0) | (square > tolerance**2), y, 0), axis)[0]

    # Twice: once leaves eps / |rest| of the earlier blocks.
    return jax.lax.fori_loop(0, jnp.where(has_earlier, 3, 1), again, y)


RANGE_FINDERS = {"power": power, "krylov": krylov}


def named(range_finder):
    """The function called `range_finder` in RANGE_FINDERS, or `range_finder` itself: see `operands.step`."""
    return operands.step("range_finder", range_finder, RANGE_FINDERS)


def _check(passes):
    if passes < 2:
        raise errors.ConfigError(f"passes={passes}: a range finder needs at least 2 (svd.single_pass_svd takes one)")
