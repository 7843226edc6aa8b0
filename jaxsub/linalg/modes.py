"""Mode statistics: how much of a stack's energy each weight axis holds in how few directions.

Exact mode Grams where they are cheap; elsewhere a sketch in two independent halves, so that directions found in
one half are scored on the other: the energies are those of a subspace one really has, never flattered.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxsub.linalg import pieces, products, sketch as sketches, symmetric, unfold
from jaxsub.linalg.gram import FEATURES

MIXTURES, COLUMNS = 8, 32  # of one half of a sketch: 256 test columns an axis
SIGNS = 4096  # test entries drawn at once, a mixture and column
ROWS = 1024  # rows of an unfolding multiplied at once


@functools.partial(jax.jit, static_argnames=("shape", "axis", "dtype", "mesh"))
def mode_gram(x, *, shape, axis, dtype, mesh=None):
    """Centred mode Gram of a block, K = sum_n Y_n(axis) Y_n(axis).T with Y = x minus its mean over models.

    Args:
        x: (N, D') rows of storage dtype, features sharded, whose first prod(shape) columns are a C-ordered tensor.
        shape: weight shape of the block.
        axis: weight axis; the block must hold this axis whole.
        dtype: dtype of the products.
        mesh: mesh with an axis "features"; None where x lies on one device.

    Returns:
        (d, d) float64, d = shape[axis], replicated. Additive over blocks that split another axis. Each device sends
        and gets N D' / devices numbers: models are dealt out, so that one device multiplies a whole model.
    """
    before, size, after = unfold.view(shape, axis)

    def local(x):
        num_models, width = x.shape

        # One model at a time, sliced from x itself: of x[:, :count], or of a mean over converted models, XLA makes a
        # copy of the whole block.
        def add(n, total):
            return total + pieces.part(x, n, 1)[0].astype(dtype)

        mean = (jax.lax.fori_loop(0, num_models, add, jnp.zeros(width, jnp.float64)) / num_models).astype(dtype)

        def one(row, n, total):
            y = row[: before * size * after].reshape(before, size, after)
            y = products.row_major(jnp.transpose(y, (1, 0, 2)).reshape(size, before * after))
            return symmetric.add(total, symmetric.multiply(y))

        zeros = symmetric.zeros(size, jnp.float64)
        return symmetric.assemble(_dealt(one, x, zeros, mesh, lambda part: part.astype(dtype) - mean), size)

    return _mapped(local, mesh)(x)


def _mapped(local, mesh):
    """`local` over the columns that each device holds, its results being sums over devices."""
    if mesh is None or mesh.size == 1:
        return local

    def summed(x):
        return jax.lax.psum(local(x), FEATURES)

    return jax.shard_map(summed, mesh=mesh, in_specs=P(None, FEATURES), out_specs=P(), check_vma=False)


def _dealt(work, x, carry, mesh, prepare=lambda part: part):
    """work(row, n, carry) for the rows of x, each whole on one device: its columns are sent there by the others.

    Args:
        work: takes a row (D',), its number and the carry; rows beyond the last come as zeros with some number.
        x: (R, D' / devices) this device's columns.
        carry: pytree, one a device; of devices without a row left it stays.
        mesh: mesh with an axis "features", or None.
        prepare: what is done to this device's part of rows before they are sent.
    """
    devices, rows = 1 if mesh is None else mesh.size, len(x)
    if devices == 1:
        return jax.lax.fori_loop(0, rows, lambda n, c: work(prepare(pieces.part(x, n, 1))[0], n, c), carry)
    me, together = jax.lax.axis_index(FEATURES), min(devices, rows)

    def step(j, carry):
        start = jnp.minimum(j * together, rows - together)  # the last few overlap: what is done already counts as zero
        part = prepare(pieces.part(x, start, together))
        new = start + jnp.arange(together) >= j * together
        part = jnp.pad(jnp.where(new[:, None], part, 0), ((0, devices - together), (0, 0)))
        row = jax.lax.all_to_all(part, FEATURES, split_axis=0, concat_axis=1, tiled=True)[0]
        return work(row, jnp.minimum(start + me, rows - 1), carry)

    return jax.lax.fori_loop(0, -(-rows // together), step, carry)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "mesh"))
def unfolding_gram(x, *, shape, dtype, mesh=None):
    """(N * rest)^2 Gram matrix of the other side of the leading axis: its eigenvalues are the mode's energies.

    Additive over blocks of rows, and small where the rows are; (N, rest) in C order. Arguments as in `mode_gram`; on
    several devices each holds whole leading-axis rows, and nothing but the result is sent.
    """
    rest, devices = math.prod(shape[1:]), 1 if mesh is None else mesh.size
    if devices > 1 and x.shape[1] % (rest * devices):
        raise ValueError(f"{x.shape[1]} columns are no whole rows of {rest} on {devices} devices")

    def local(x):
        def step(row, rows, total):
            z = pieces.part(x, row * rest, rows * rest, axis=1).astype(dtype)
            y = (z - jnp.mean(z, axis=0)).reshape(len(x), rows, rest)
            y = products.row_major(jnp.transpose(y, (0, 2, 1)).reshape(-1, rows))
            return total + products.matmul(y, y.T).astype(jnp.float64)

        length = shape[0] if devices == 1 else x.shape[1] // rest
        return pieces.fold(step, length, ROWS, jnp.zeros((len(x) * rest, len(x) * rest), jnp.float64))

    return _mapped(local, mesh)(x)


@functools.partial(jax.jit, static_argnames=("shape", "last", "mesh"))
def model_grams(x, *, shape, last, mesh=None):
    """(N, m, m) float64 Grams of each model's own rows (or, if `last`, columns) of a block; not centred.

    Over columns they are additive over blocks of rows. One model at a time: no float64 copy of the block. Sharding as
    in `mode_gram`.
    """

    def one(row, n, grams):
        w = row[: shape[0] * shape[1]].astype(jnp.float64).reshape(shape)
        w = products.row_major(w.T) if last else w
        return grams.at[n].add(products.matmul(w, w.T))

    size = shape[1] if last else shape[0]
    return _mapped(lambda x: _dealt(one, x, jnp.zeros((len(x), size, size), jnp.float64), mesh), mesh)(x)


def mixtures(key, num_models, count):
    """(2 * count, N) Gaussian weights of the two halves' mixtures, float32; a half's rows are `count` in a row.

    Sums over models, sum_n g_sn Y_n, have the mode Gram of the stack as their mean mode Gram. The rows sum to zero:
    the models need no further centring.
    """
    weights = jax.random.normal(key, (2 * count, num_models), dtype=jnp.float32)
    return weights - jnp.mean(weights, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("shape", "axes", "columns", "mesh"))
def sketch(z, key, row, *, shape, axes, columns, mesh=None):
    """Random test products of a block's mixtures for each axis, in two independent halves.

    Each mixture Z_s is multiplied by `columns` random sign vectors over the other axes. E[T T.T] / (count * columns)
    is the mode Gram.

    Args:
        z: (2 * count, D') mixtures of the block's centred rows, features sharded; the first prod(shape) columns are
            the leading-axis rows `row ...` of the layer.
        key: typed PRNG key of the layer; the same for all its blocks.
        row: () int32, first row of the block in the layer's leading axis.
        shape: shape of the block, rows first.
        axes: weight axes to sketch.
        columns: test vectors a mixture.
        mesh: mesh with an axis "features"; None where z lies on one device. The signs do not depend on it.

    Returns:
        tuple over axes of (2, d, count * columns) in the dtype of z, replicated. For axis 0, d counts the block's rows:
        concatenate over blocks; for other axes add over blocks. Mixtures are dealt out as models in `mode_gram`.
    """
    total = z.shape[0]

    def one(mixture, s, found):
        mixture, after_it = mixture[: math.prod(shape)], []
        for axis, tests in zip(axes, found, strict=True):
            before, size, after = unfold.view(shape, axis)
            # Axis 0 has one test matrix for all blocks: its blocks are rows of one sketch.
            own = jax.random.fold_in(jax.random.fold_in(key, 1 + axis), s)
            own = own if axis == 0 else jax.random.fold_in(own, row)
            y = mixture.reshape(before, size, after)
            # (d, p) or, for the last axis, (p, d) as it lies: its transpose alone would cost three times the product.
            y = y[..., 0] if after == 1 else jnp.transpose(y, (1, 0, 2)).reshape(size, before * after)
            after_it.append(tests.at[s].add(_tests(y, own, columns, rest=0 if after == 1 else 1)))
        return tuple(after_it)

    zeros = tuple(jnp.zeros((total, shape[axis], columns), z.dtype) for axis in axes)
    tests = _mapped(lambda z: _dealt(one, z, zeros, mesh), mesh)(z)
    results = []
    for t in tests:
        t = jnp.transpose(t.reshape(2, total // 2, -1, columns), (0, 2, 1, 3))
        results.append(t.reshape(2, -1, total // 2 * columns))
    return tuple(results)


def _tests(y, key, columns, *, rest):
    """(d, columns) products of y with random signs over its axis `rest`, the signs drawn a piece at a time."""
    width, size = y.shape[rest], y.shape[1 - rest]

    def step(start, piece, sums):
        signs = sketches.random_signs(jax.random.fold_in(key, start // SIGNS), (piece, columns), y.dtype)
        part = jax.lax.dynamic_slice_in_dim(y, start, piece, axis=rest)
        if rest == 1:
            return sums + products.matmul(part, signs)
        return sums + products.row_major(products.matmul(signs.T, part)).T

    return pieces.fold(step, width, SIGNS, jnp.zeros((size, columns), y.dtype))
