"""Products of rows with themselves, y @ y.T, in blocks that leave most of one half out: XLA has no such product on CPU.

Of pieces y (d, n) of a longer side blocks are summed, from `zeros` on, and put together once by `assemble`.
"""

import jax.numpy as jnp

from jaxsub.linalg import products

HALVES = 128  # rows from which one product of a half with all leaves a quarter out
SQUARE = 256  # rows from which the product of two halves is one of its own; halves of these too compile for too long


def zeros(size, dtype):
    """List of zero blocks of a (size, size) matrix."""
    return [jnp.zeros((r.stop - r.start, c.stop - c.start), dtype) for r, c in _blocks(size)]


def multiply(y):
    """List of blocks of y @ y.T for rows y (d, n), in the dtype of y."""
    return [products.matmul(y[rows], y[columns].T) for rows, columns in _blocks(len(y))]


def add(sums, blocks):
    """`sums` plus other blocks, in the dtype of the sums."""
    return [own + block.astype(own.dtype) for own, block in zip(sums, blocks, strict=True)]


def assemble(blocks, size):
    """(size, size) matrix from its blocks, symmetric but for rounding within those on the diagonal."""
    whole = jnp.zeros((size, size), blocks[0].dtype)
    for block, (rows, columns) in zip(blocks, _blocks(size), strict=True):
        whole = whole.at[columns, rows].set(block.T).at[rows, columns].set(block)
    return whole


def _blocks(size):
    """[(rows, columns)], slices that together hold each entry, or its mirror image, at least once."""
    middle = size // 2
    if size < SQUARE:
        return _half(0, size)
    return [(slice(middle, size), slice(0, middle)), *_half(0, middle), *_half(middle, size)]


def _half(start, end):
    middle = (start + end) // 2
    if end - start < HALVES:
        return [(slice(start, end),) * 2]
    return [(slice(middle, end), slice(start, end)), (slice(start, middle),) * 2]
