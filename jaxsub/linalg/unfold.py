"""Mode-n unfolding, mode products and merged axes of a dense tensor, with as few copies as the layout allows.

Seen from one axis, a C-ordered tensor is always three-dimensional, and that view is free:

    (d_0, ..., d_axis, ..., d_last)  ->  (before, d_axis, after)

Products and Gram matrices along an axis work on slices of this view. `unfold` itself copies for every axis but the
first; it is for tests and for small tensors.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import dealt, pieces, products

WIDE = 256  # trailing width from which slices (d, after) multiply well as they lie; under it, rows are gathered
SMALL = 16  # entries that are multiplied as one row: 3 x 3 kernels take a third of the time
PIECE = 2**21  # entries that are gathered for one product, and of slices that go through several together


def view(shape, axis):
    """(before, d, after): products of the sizes before `axis`, of it, and after it; `axis` may be negative."""
    if not -len(shape) <= axis < len(shape):
        raise errors.ConfigError(f"axis {axis} of a tensor with {len(shape)} axes; axes are 0 to {len(shape) - 1}")
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def unfold(x, axis):
    """Mode unfolding X_(axis): its rows are the slices along `axis`, its columns the other axes in C order.

    Args:
        x: tensor (d_0, ..., d_last).
        axis: axis that becomes the rows.

    Returns:
        (d_axis, rest) in the dtype of x. Kolda and Bader 2009, section 2.4, with the columns in C order (as in
        tensorly), not in Fortran order: singular values and left vectors are the same.

    Raises:
        ConfigError: if x has no such axis.
    """
    before, size, after = view(x.shape, axis)
    return jnp.moveaxis(x.reshape(before, size, after), 1, 0).reshape(size, before * after)


def fold(matrix, axis, shape):
    """The tensor of shape `shape` whose unfolding along `axis` is `matrix` (d_axis, rest); undoes `unfold`.

    Raises:
        ConfigError: if the sizes do not fit.
    """
    before, size, after = view(shape, axis)
    if matrix.shape != (size, before * after):
        raise errors.ConfigError(f"an unfolding of shape {matrix.shape} does not fold into {tuple(shape)} along {axis}")
    return jnp.moveaxis(matrix.reshape(size, before, after), 0, 1).reshape(shape)


def merge_axes(x, groups):
    """x with each group of axes made one axis; (N, o, i, kh, kw) becomes (N, o, i, kh * kw), for example.

    Args:
        x: tensor.
        groups: one tuple of axes for each axis of the result; together each axis of x once. Groups of adjacent axes
            in their order cost nothing, others a transposed copy.

    Returns:
        Tensor with len(groups) axes. `unmerge_axes` undoes it.

    Raises:
        ConfigError: if the groups leave out or repeat an axis.
    """
    axes = _flat(groups, x.ndim)
    sizes = [math.prod(x.shape[a] for a in group) for group in groups]
    return (x if axes == list(range(x.ndim)) else jnp.transpose(x, axes)).reshape(sizes)


def unmerge_axes(x, groups, shape):
    """The tensor of shape `shape` that `merge_axes(..., groups)` turned into x."""
    axes = _flat(groups, len(shape))
    if x.shape != tuple(math.prod(shape[a] for a in group) for group in groups):
        raise errors.ConfigError(f"a tensor of shape {x.shape} does not split into {tuple(shape)} by {groups}")
    whole = x.reshape([shape[a] for a in axes])
    if axes == list(range(len(shape))):
        return whole
    return jnp.transpose(whole, sorted(range(len(axes)), key=axes.__getitem__))


def spatial_groups(ndim):
    """Groups that merge the spatial axes of a stack of convolution kernels (N, o, i, k, ...) into one axis."""
    return (*((a,) for a in range(min(ndim, 3))), *((tuple(range(3, ndim)),) if ndim > 3 else ()))


def _flat(groups, ndim):
    axes = [a for group in groups for a in group]
    if sorted(axes) != list(range(ndim)):
        raise errors.ConfigError(f"groups {groups} do not hold each of {ndim} axes once")
    return axes


def mode_product(x, factor, axis, *, dtype=None):
    """Mode product X x_axis F: every slice of x along `axis`, multiplied by F from the left.

    Args:
        x: tensor (d_0, ..., d_last); its first axis may be dealt to devices, which send nothing.
        factor: (k, d_axis) of the same dtype.
        axis: axis to multiply.
        dtype: that x becomes first; None: its own.

    Returns:
        x with size k instead of d_axis, in C order; no unfolded copy of x is made.

    Raises:
        ConfigError: if the sizes do not fit, or the axis is the one that is dealt.

    Source: Kolda and Bader 2009, section 2.5.
    """
    return _products(x, {axis: factor}, dtype)


def _local(x, factor, *, axis):
    before, size, after = view(x.shape, axis)
    rank = factor.shape[0]
    if not x.size:
        return jnp.zeros((*x.shape[:axis], rank, *x.shape[axis + 1 :]), x.dtype)
    if size * after <= SMALL:  # some groups of a model as one, by a matrix with the factor along its diagonal
        group = divisor(before // x.shape[0] if axis else 1, SMALL // (size * after))
        many = jnp.kron(jnp.eye(group, dtype=factor.dtype), jnp.kron(factor, jnp.eye(after, dtype=factor.dtype)))
        y = products.row_major(products.matmul(x.reshape(-1, many.shape[1]), many.T))
    elif before == 1:
        y = products.row_major(products.matmul(factor, x.reshape(size, after)))
    elif after == 1:
        y = products.row_major(products.matmul(x.reshape(before, size), factor.T))
    elif after >= WIDE:
        y = jax.lax.map(lambda z: products.row_major(products.matmul(factor, z)), x.reshape(before, size, after))
    elif rows := _rows(before, size, after):
        y = jax.lax.map(
            lambda z: _row_product(z, factor), x.reshape(before // rows, rows, size, after)
        )  # a short trailing axis is moved in cache, a block at a time
    else:
        y = products.row_major(products.einsum("kd,bda->bka", factor, x.reshape(before, size, after)))
    return y.reshape(*x.shape[:axis], rank, *x.shape[axis + 1 :])


def _rows(before, size, after):
    """Slices gathered for one product of a short trailing axis; 0 where no divisor of their number is large."""
    rows = divisor(before, max(1, PIECE // (size * after)))
    return rows if 8 * rows * size * after >= min(PIECE, before * size * after) else 0


def _row_product(z, factor):
    rows, size, after = z.shape
    flat = products.row_major(jnp.transpose(z, (0, 2, 1)).reshape(rows * after, size))
    y = products.row_major(products.matmul(flat, factor.T)).reshape(rows, after, factor.shape[0])
    return jnp.transpose(y, (0, 2, 1))


def divisor(number, most):
    """Largest divisor of `number` that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def mode_products(x, factors, *, skip=None, transpose=False, dtype=None):
    """Mode products of x with several factors, the one that shrinks (or grows least) first.

    Where the first axis is left as it is, slices of it go one after another: nothing between them is held whole.

    Args:
        x: tensor.
        factors: for each axis a (k, d) matrix or None, which leaves the axis as it is.
        skip: an axis to leave as it is all the same.
        transpose: multiply by the transposed factors, (d, k): from a core back to the full size.
        dtype: that x becomes first, in slices too; None: its own.

    Returns:
        Tensor of the new sizes in that dtype; x itself if there is no factor.

    Raises:
        ConfigError: if the number of factors or a size does not fit.
    """
    if len(factors) != x.ndim:
        raise errors.ConfigError(f"{len(factors)} factors for a tensor with {x.ndim} axes")
    used = {a: (f.T if transpose else f) for a, f in enumerate(factors) if f is not None and a != skip}
    order = sorted(used, key=lambda a: (used[a].shape[0] / max(used[a].shape[1], 1), a))
    return _products(x, {axis: used[axis] for axis in order}, dtype)


def _products(x, factors, dtype):
    """Products of x in `dtype` with factors {axis: (k, d)}, in their order."""
    mesh, dtype = dealt.mesh_of(x), jnp.dtype(x.dtype if dtype is None else dtype)
    for axis, factor in factors.items():
        _, size, _ = view(x.shape, axis)
        if factor.ndim != 2 or factor.shape[1] != size:
            raise errors.ConfigError(f"a factor of shape {factor.shape} does not multiply axis {axis} of size {size}")
        dealt.require_free(axis, x.ndim, mesh)
    if not factors:
        return x.astype(dtype)
    axes = tuple(axis % x.ndim for axis in factors)
    return _mode_products(x, list(factors.values()), axes=axes, dtype=dtype, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("axes", "dtype", "mesh"))
def _mode_products(x, factors, *, axes, dtype, mesh):
    def local(x, *factors):
        # Something between x and the result: other dtypes, products, or a copy of all of it that einsum makes.
        is_held = x.size and (len(factors) > 1 or x.dtype != dtype or not _rows(*view(x.shape, axes[0])))
        return in_pieces(lambda z: chain(z.astype(dtype), factors, axes), x, is_held and 0 not in axes)

    return dealt.each(local, mesh)(x, *factors)


def chain(x, factors, axes):
    """Products of x with factors on their axes, in this order, where nothing is dealt; to be traced."""
    for factor, axis in zip(factors, axes, strict=True):
        x = _local(x, factor, axis=axis)
    return x


def in_pieces(function, x, is_free=True):
    """`function` of x (N, ...), which takes its slices apart, over pieces of at most PIECE entries; to be traced."""
    count, most = len(x), max(1, PIECE * len(x) // max(x.size, 1))
    if not is_free or most >= count:
        return function(x)
    number = -(-count // -(-count // most))  # as even as can be
    one = jax.eval_shape(function, x[:number])

    def piece(j, found):
        start = jnp.minimum(j * number, count - number)  # the last piece begins earlier: one shape for all
        rows = function(pieces.part(x, start, number))
        return jax.lax.dynamic_update_slice_in_dim(found, rows, start, 0)

    return jax.lax.fori_loop(0, -(-count // number), piece, jnp.zeros((count, *one.shape[1:]), one.dtype))
