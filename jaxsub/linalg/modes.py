"""Mode statistics: how much of a stack's energy each weight axis holds in how few directions.

Exact mode Grams where they are cheap; elsewhere a sketch in two independent halves, so that directions found in
one half are scored on the other: the energies are those of a subspace one really has, never flattered.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxsub.linalg import products
from jaxsub.linalg.gram import FEATURES


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


def sketch(x, key, row, *, mesh, shape, axes, mixtures, columns, dtype):
    """Random test products of a block for each axis, in two independent halves.

    Each half draws `mixtures` Gaussian combinations of the centred models, Z_s = sum_n g_sn Y_n, and multiplies
    each by `columns` Gaussian vectors over the other axes. E[T T.T] / (mixtures * columns) is the mode Gram.

    Args:
        x: (N, D') rows, features sharded; the first prod(shape) columns are leading-axis rows `row ...` of the layer.
        key: typed PRNG key of the layer; the same for all blocks.
        row: () int32, first row of the block in the layer's leading axis.
        shape: shape of the block, rows first.
        axes: weight axes to sketch.

    Returns:
        tuple over axes of (2, d, mixtures * columns) float64. For axis 0, d counts the block's rows: concatenate
        over blocks; for other axes add over blocks.
    """
    x = jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, P(None, FEATURES)))
    return _sketch(x, key, row, mesh=mesh, shape=shape, axes=axes, mixtures=mixtures, columns=columns, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("mesh", "shape", "axes", "mixtures", "columns", "dtype"))
def _sketch(x, key, row, *, mesh, shape, axes, mixtures, columns, dtype):
    num_models = x.shape[0]
    used = _product(shape)
    weights = jax.random.normal(key, (2 * mixtures, num_models), dtype=dtype)
    weights = weights - jnp.mean(weights, axis=1, keepdims=True)  # the same as centring the models

    def mix(x):
        chunk = min(16384, x.shape[1])
        parts = [
            products.matmul(weights, products.row_major(x[:, j : j + chunk].astype(dtype)))
            for j in range(0, x.shape[1], chunk)
        ]
        return jnp.concatenate(parts, axis=1)

    z = jax.shard_map(mix, mesh=mesh, in_specs=P(None, FEATURES), out_specs=P(None, FEATURES), check_vma=False)(x)
    # The mixtures are 2 * mixtures rows however many models there are: small enough to be held whole everywhere.
    z = jax.lax.with_sharding_constraint(z, jax.sharding.NamedSharding(mesh, P()))[:, :used]
    results = []
    for axis in axes:
        before, size, after = _split(shape, axis)
        y = z.reshape(2 * mixtures, before, size, after)
        if axis == 0:
            test_key = jax.random.fold_in(key, 1)  # one test matrix for all blocks: rows of one sketch
        else:
            test_key = jax.random.fold_in(jax.random.fold_in(key, 2 + axis), row)
        test = jax.random.normal(test_key, (2 * mixtures, before * after, columns), dtype=dtype)
        y = jnp.transpose(y, (0, 2, 1, 3)).reshape(2 * mixtures, size, before * after)
        t = products.einsum("sdp,spc->sdc", y, test).reshape(2, mixtures, size, columns)
        results.append(jnp.transpose(t, (0, 2, 1, 3)).reshape(2, size, mixtures * columns).astype(jnp.float64))
    return tuple(results)


def _product(shape):
    size = 1
    for d in shape:
        size *= d
    return size


def _split(shape, axis):
    """(entries before, at, after) `axis` of a C-ordered tensor."""
    return _product(shape[:axis]), shape[axis], _product(shape[axis + 1 :])
