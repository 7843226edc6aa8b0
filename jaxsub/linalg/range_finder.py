"""Bases of the dominant range of x (N, D), counted in passes over x.

    pass 1: y = x t      pass 2: z = y.T x      pass 3: y = x z.T  ...        orthonormalised between passes

The last pass belongs to whoever uses the basis: a range finder for `passes` in all makes passes - 1 products with x.
With an even number the basis is of the column space, (N, m), and the last product is basis.T @ x; with an odd one of
the row space, (m, D), and the last product is x @ basis.T (Bjarkason 2019: any number of passes from 2 on is of use).
Rows or columns of the basis are orthonormal, or zero where x has no more directions.

Inside shard_map x is (N, local D) and `axis` the mesh axis of D. Long arrays are never gathered; an odd pass adds up
N * l numbers, an orthonormalisation 2 * l**2 of the long side. Products come out row-major, each in the order that is
fast on CPU: written as x.T @ y, every second pass takes 4 to 8 times as long.
"""

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import operands, orth, products

UNROLLED = 3  # power iterations


def times_tests(x, zt, axis=None):
    """(N, m) x @ zt.T for zt (m, D): one pass."""
    return orth.total(products.row_major(products.matmul(x, zt.T)), axis)


def tests_times(y, x):
    """(m, D) y.T @ x for y (N, m): one pass."""
    return products.row_major(products.matmul(y.T, x))


def power(x, tests, *, passes, axis=None):
    """Basis from power iterations of x @ x.T on the test matrix.

    Args:
        x: (N, D) float32 or float64; inside shard_map its local columns.
        tests: (D, l) test matrix, dtype of x; l is rank + oversample.
        passes: passes over x including the caller's last one, at least 2, static.
        axis: mesh axis of D inside shard_map, or None.

    Returns:
        (N, l) orthonormal or zero columns if `passes` is even, else (l, D) orthonormal or zero rows.

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
        return orth.cholesky_qr2(y)[0]
    return orth.cholesky_lq2(tests_times(orth.regularised(y) * scale, x), axis)[0]


def _scale(y):
    """() power of two that brings the largest entry of y to [0.5, 1); 1 for zeros.

    Squares of products with small or large weights would leave float32's range. Taken from the first product with x and
    applied on its short side, this costs nothing beside a pass.
    """
    return orth.unit_scale(jnp.max(jnp.abs(y)))


def krylov(x, tests, *, passes, axis=None):
    """Basis of the block Krylov space of x @ x.T and x @ tests: wider than `power`'s, and nearer to the range.

    Args: as for `power`; N and D must be at least l * (passes // 2).

    Returns:
        (N, m) for even `passes`, else (m, D), where m = l * (passes // 2). Orthonormal or zero.

    Every block is orthogonalised against those before it, twice. More memory and small work (m**2 (N + D)) than
    `power`, and one wider last pass; in return slow decay needs about the square root of the passes.
    Source: Musco and Musco 2015, Algorithm 2; blocks orthogonalised as in block Lanczos (Golub and Underwood 1977).
    """
    _check(passes)
    is_left, blocks, count = passes % 2 == 0, passes // 2, tests.shape[1]
    rows = x.shape[0] if is_left else x.shape[1]
    long_axis = None if is_left else axis

    first = times_tests(x, tests.T, axis)
    scale = _scale(first)

    def to_block(y):
        """(long, l) the product that the next block is made of, from y (N, l)."""
        return y if is_left else tests_times(orth.regularised(y) * scale, x).T

    def from_block(block):
        z = orth.regularised(tests_times(block * scale, x), axis, is_wide=True) if is_left else block.T
        return times_tests(x, z, axis) * scale

    # A loop, not unrolled: orth.cholesky_qr2 with its fallbacks takes a second to compile, and six passes had seven.
    def step(j, carry):
        basis, y = carry
        block = _next_block(to_block(y), basis, j > 0, long_axis)
        basis = jax.lax.dynamic_update_slice_in_dim(basis, block, j * count, axis=1)
        return basis, jax.lax.cond(j + 1 < blocks, from_block, lambda _: y, block)

    basis = jnp.zeros((rows, blocks * count), x.dtype)
    basis, _ = jax.lax.fori_loop(0, blocks, step, (basis, first * scale))
    return basis if is_left else basis.T


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
