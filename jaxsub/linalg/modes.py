"""Mode statistics: how much of a stack's energy each weight axis holds in how few directions.

Exact mode Grams where they are cheap; elsewhere a sketch in two independent halves, so that directions found in
one half are scored on the other: the energies are those of a subspace one really has, never flattered.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsub.linalg import products


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
    before, size, after = _split(shape, axis)
    num_models = x.shape[0]
    mean = jnp.mean(x[:, : before * size * after].astype(dtype), axis=0)

    def one(n, total):
        y = (x[n, : before * size * after].astype(dtype) - mean).reshape(before, size, after)
        y = products.row_major(jnp.transpose(y, (1, 0, 2)).reshape(size, before * after))
        return total + products.matmul(y, y.T).astype(jnp.float64)

    return jax.lax.fori_loop(0, num_models, one, jnp.zeros((size, size), jnp.float64))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def model_grams(x, *, shape, dtype):
    """(N, m, m) float64 Grams of each model's own matrix over its shorter axis, m = min(shape); not centred."""
    w = x[:, : shape[0] * shape[1]].astype(dtype).reshape(-1, *shape)
    spec = "nab,ncb->nac" if shape[0] <= shape[1] else "nba,nbc->nac"
    return products.einsum(spec, w, w).astype(jnp.float64)


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
        tuple over axes of (2, d, count * columns) float64. For axis 0, d counts the block's rows: concatenate
        over blocks; for other axes add over blocks.
    """
    total = z.shape[0]
    z = z[:, : _product(shape)]
    results = []
    for axis in axes:
        before, size, after = _split(shape, axis)
        # Axis 0 has one test matrix for all blocks: its blocks are rows of one sketch.
        own = jax.random.fold_in(key, 1 + axis)
        own = own if axis == 0 else jax.random.fold_in(own, row)
        signs = jax.random.rademacher(own, (total, before * after, columns), dtype=z.dtype)
        y = jnp.transpose(z.reshape(total, before, size, after), (0, 2, 1, 3)).reshape(total, size, before * after)
        t = products.einsum("sdp,spc->sdc", y, signs).reshape(2, total // 2, size, columns)
        results.append(jnp.transpose(t, (0, 2, 1, 3)).reshape(2, size, total // 2 * columns).astype(jnp.float64))
    return tuple(results)


def _product(shape):
    size = 1
    for d in shape:
        size *= d
    return size


def _split(shape, axis):
    """(entries before, at, after) `axis` of a C-ordered tensor."""
    return _product(shape[:axis]), shape[axis], _product(shape[axis + 1 :])
