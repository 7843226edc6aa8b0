"""Mode statistics: how much of a stack's energy each weight axis holds in how few directions.

Exact mode Grams where they are cheap; elsewhere a sketch in two independent halves, so that directions found in
one half are scored on the other: the energies are those of a subspace one really has, never flattered.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxsub.linalg import pieces, products, sketch as sketches, unfold

MIXTURES, COLUMNS = 8, 32  # of one half of a sketch: 256 test columns an axis
SIGNS = 4096  # test entries drawn at once, a mixture and column
ROWS = 1024  # rows of an unfolding multiplied at once


@functools.partial(jax.jit, static_argnames=("shape", "axis", "dtype"))
def mode_gram(x, *, shape, axis, dtype):
    """Centred mode Gram of a block, K = sum_n Y_n(axis) Y_n(axis).T with Y = x minus its mean over models.

    Args:
        x: (N, D') replicated rows of storage dtype, whose first prod(shape) columns are a C-ordered tensor.
        shape: weight shape of the block.
        axis: weight axis; the block must hold this axis whole.
        dtype: dtype of the products.

    Returns:
        (d, d) float64, d = shape[axis]. Additive over blocks that split another axis.
    """
    before, size, after = unfold.view(shape, axis)
    num_models, count = x.shape[0], before * size * after

    # One model at a time, sliced from x itself: of x[:, :count], or of a mean over converted models, XLA makes a copy
    # of the whole block.
    def model(n):
        return jax.lax.dynamic_slice(x, (n, 0), (1, count))[0].astype(dtype)

    mean = jax.lax.fori_loop(0, num_models, lambda n, total: total + model(n), jnp.zeros(count, jnp.float64))
    mean = (mean / num_models).astype(dtype)

    def one(n, total):
        y = (model(n) - mean).reshape(before, size, after)
        y = products.row_major(jnp.transpose(y, (1, 0, 2)).reshape(size, before * after))
        return total + products.matmul(y, y.T).astype(jnp.float64)

    return jax.lax.fori_loop(0, num_models, one, jnp.zeros((size, size), jnp.float64))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def unfolding_gram(x, *, shape, dtype):
    """(N * rest)^2 Gram matrix of the other side of the leading axis: its eigenvalues are the mode's energies.

    Additive over blocks of rows, and small where the rows are; (N, rest) in C order. Arguments as in `mode_gram`.
    """
    num_models, rest = x.shape[0], math.prod(shape[1:])

    def step(row, rows, total):
        z = jax.lax.dynamic_slice(x, (0, row * rest), (num_models, rows * rest)).astype(dtype)
        y = (z - jnp.mean(z, axis=0)).reshape(num_models, rows, rest)
        y = products.row_major(jnp.transpose(y, (0, 2, 1)).reshape(-1, rows))
        return total + products.matmul(y, y.T).astype(jnp.float64)

    return pieces.fold(step, shape[0], ROWS, jnp.zeros((num_models * rest, num_models * rest), jnp.float64))


@functools.partial(jax.jit, static_argnames=("shape", "last"))
def model_grams(x, *, shape, last):
    """(N, m, m) float64 Grams of each model's own rows (or, if `last`, columns) of a block; not centred.

    Over columns they are additive over blocks of rows. One model at a time: no float64 copy of the block.
    """

    def one(row):
        w = row[: shape[0] * shape[1]].astype(jnp.float64).reshape(shape)
        w = products.row_major(w.T) if last else w
        return products.matmul(w, w.T)

    return jax.lax.map(one, x)


def mixtures(key, num_models, count):
    """(2 * count, N) Gaussian weights of the two halves' mixtures, float32; a half's rows are `count` in a row.

    Sums over models, sum_n g_sn Y_n, have the mode Gram of the stack as their mean mode Gram. The rows sum to zero:
    the models need no further centring.
    """
    weights = jax.random.normal(key, (2 * count, num_models), dtype=jnp.float32)
    return weights - jnp.mean(weights, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("shape", "axes", "columns"))
def sketch(z, key, row, *, shape, axes, columns):
    """Random test products of a block's mixtures for each axis, in two independent halves.

    Each mixture Z_s is multiplied by `columns` random sign vectors over the other axes. E[T T.T] / (count * columns)
    is the mode Gram.

    Args:
        z: (2 * count, D') mixtures of the block's centred rows; the first prod(shape) columns are the leading-axis
            rows `row ...` of the layer.
        key: typed PRNG key of the layer; the same for all its blocks.
        row: () int32, first row of the block in the layer's leading axis.
        shape: shape of the block, rows first.
        axes: weight axes to sketch.
        columns: test vectors a mixture.

    Returns:
        tuple over axes of (2, d, count * columns) in the dtype of z. For axis 0, d counts the block's rows: concatenate
        over blocks; for other axes add over blocks.
    """
    total = z.shape[0]
    z = z[:, : math.prod(shape)]
    results = []
    for axis in axes:
        before, size, after = unfold.view(shape, axis)
        # Axis 0 has one test matrix for all blocks: its blocks are rows of one sketch.
        own = jax.random.fold_in(key, 1 + axis)
        own = own if axis == 0 else jax.random.fold_in(own, row)
        y = z.reshape(total, before, size, after)
        # (s, d, p) or, for the last axis, (s, p, d) as it lies: its transpose alone would cost three times the product.
        y = y[..., 0] if after == 1 else jnp.transpose(y, (0, 2, 1, 3)).reshape(total, size, before * after)
        t = _tests(y, own, columns, rest=1 if after == 1 else 2).reshape(2, total // 2, size, columns)
        results.append(jnp.transpose(t, (0, 2, 1, 3)).reshape(2, size, total // 2 * columns))
    return tuple(results)


def _tests(y, key, columns, *, rest):
    """(s, d, columns) products of y with random signs over its axis `rest`, the signs drawn a piece at a time."""
    total, width, size = y.shape[0], y.shape[rest], y.shape[3 - rest]

    def step(start, piece, sums):
        signs = sketches.random_signs(jax.random.fold_in(key, start // SIGNS), (total, piece, columns), y.dtype)
        part = jax.lax.dynamic_slice_in_dim(y, start, piece, axis=rest)
        if rest == 2:
            return sums + products.einsum("sdp,spc->sdc", part, signs)
        return sums + jnp.swapaxes(products.row_major(products.einsum("spc,spd->scd", signs, part)), 1, 2)

    return pieces.fold(step, width, SIGNS, jnp.zeros((total, size, columns), y.dtype))
