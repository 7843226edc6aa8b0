"""Mode Gram matrices K = X_(axis) X_(axis).T of a dense tensor, without an unfolded copy of it.

The tensor is read in pieces (d, columns) that stay in cache, whose products with themselves skip most of the half that
symmetry gives (`symmetric`); a few are summed in the dtype of the products, then float64.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsub.linalg import dealt, pieces, products, symmetric, unfold

FEW = 512  # columns a piece of axes up to NARROW, whose product one thread does, and of programs side by side
NARROW = 64
COLUMNS = 1024, 4096  # columns a piece of others, least and most; 8192 loses where memory is slow
ENTRIES = 2**20  # of a piece, which decide in between: of 1024 x 4096 XLA holds six copies
ELEMENTS = 2**18  # and at least this many entries a piece: short axes
SHORT = 8  # axes up to this size: reading is the cost, and XLA adds such products up one by one, so float64 it is
GROUP = 8192  # columns summed in the dtype of the products before float64 takes over


def mode_gram(x, *, axis, dtype):
    """Gram matrix of a tensor along one axis, K = X_(axis) X_(axis).T; not centred.

    Args:
        x: tensor (d_0, ..., d_last) of any float dtype; its first axis may be dealt to devices, which then exchange
            the result, and nothing else.
        axis: axis of the result.
        dtype: "float32" or "float64", the dtype of the products.

    Returns:
        (d, d) float64, symmetric; its trace is the squared norm of x. Additive over blocks of the other axes.

    Raises:
        ConfigError: if x has no such axis, or it is the one that is dealt.

    Fails on: entries whose squares leave the range of `dtype`; and eigenvalues under 64 eps(dtype) of the largest
    are noise, as of every Gram matrix.

    Source: Kolda and Bader 2009, section 4.2; slices instead of an unfolding as in TuckerMPI (Ballard et al. 2020).
    """
    before, size, after = unfold.view(x.shape, axis)
    mesh, axis = dealt.mesh_of(x), axis % x.ndim
    dealt.require_free(axis, x.ndim, mesh)
    number = pieces.programs(x, _pieces(size, before * after)) if mesh is None else 1
    if number == 1:
        return _mode_gram(x, axis=axis, dtype=dtype, mesh=mesh)
    kernel = functools.partial(_share, axis=axis, dtype=dtype, number=number)
    return _joined(pieces.side_by_side(kernel, x, number), size=size)


def num_programs(size, columns):
    """Number of programs side by side of an axis of `size` with so many columns, on one CPU device; each has sums."""
    return pieces.number(_pieces(size, columns))


def _pieces(size, columns):
    """Pieces that programs side by side share; none of short axes, where reading is the cost."""
    return columns // FEW if size > SHORT else 0


@functools.partial(jax.jit, static_argnames=("axis", "dtype", "mesh"))
def _mode_gram(x, *, axis, dtype, mesh=None):
    return dealt.sums(lambda x: symmetric.assemble(_local(x, axis, dtype), x.shape[axis]), mesh)(x)


@functools.partial(jax.jit, static_argnames=("axis", "dtype", "number"))
def _share(x, index, *, axis, dtype, number):
    return _local(x, axis, dtype, (index, number))


@functools.partial(jax.jit, static_argnames="size")
def _joined(parts, *, size):
    return symmetric.assemble(jax.tree.map(lambda *own: sum(own), *parts), size)


def _local(x, axis, dtype, share=None):
    before, size, after = unfold.view(x.shape, axis)
    x = x.reshape(before, size, after)
    most = max(min(max(ENTRIES // size, COLUMNS[0]), COLUMNS[1]), ELEMENTS // size)
    most = FEW if SHORT < size and (share or size <= NARROW) else most
    dtype = "float64" if size <= SHORT else dtype
    if after >= unfold.WIDE or before == 1:
        return _slices(x, min(after, most), dtype, share)
    return _gathered(x, min(before, max(1, most // after)), dtype, share)


def _slices(x, width, dtype, share):
    """Sums over pieces x[j, :, t : t + width], which lie in memory as they are needed."""
    before, size, after = x.shape
    whole = after // width

    def piece(t):
        at = (t // whole, 0, t % whole * width)
        return _rows(pieces.box(x, at, (1, size, width))[0], dtype)

    def rest(j):
        return _rows(pieces.box(x, (j, 0, whole * width), (1, size, after % width))[0], dtype)

    def last(sums):
        return accumulate(before, after % width, rest, sums) if after % width else sums

    return accumulate(before * whole, width, piece, symmetric.zeros(size, jnp.float64), last, share)


def _gathered(x, number, dtype, share):
    """Sums over pieces x[j : j + number], moved in cache so that the axis leads."""
    before, size, after = x.shape
    x = x.reshape(before, size * after)  # an axis of one entry would have XLA copy all of x to move it

    def piece(start, number):
        z = pieces.part(x, start, number)
        if after > 1:
            z = jnp.transpose(z.reshape(number, size, after), (0, 2, 1)).reshape(number * after, size)
        return _rows(products.row_major(z).T, dtype)

    return accumulate_pieces(before, number, after, piece, symmetric.zeros(size, jnp.float64), share)


def accumulate_pieces(length, number, width, piece, sums, share=None):
    """`accumulate` over `length` in pieces (start, number), each (d, number * width), the last one shorter."""
    left = length % number

    def last(sums):
        return accumulate(1, left * width, lambda _: piece(length - left, left), sums) if left else sums

    return accumulate(length // number, number * width, lambda j: piece(j * number, number), sums, last, share)


def _rows(piece, dtype):
    return products.row_major(piece.astype(dtype))


def accumulate(count, width, piece, sums, last=lambda sums: sums, share=None):
    """`sums` plus self products of piece(0), ..., piece(count - 1), each (d, width), and what `last` adds to them.

    Sums are `symmetric` blocks; `share` as in `pieces.fold`.
    """
    group = max(1, GROUP // width)

    def some(first, number, sums):
        found = symmetric.multiply(piece(first))
        found = jax.lax.fori_loop(1, number, lambda j, s: symmetric.add(s, symmetric.multiply(piece(first + j))), found)
        return symmetric.add(sums, found)

    whole, left = divmod(count, group)

    def rest(sums):
        return last(some(whole * group, left, sums) if left else sums)

    return pieces.folds(some, whole, group, rest, sums, share)
