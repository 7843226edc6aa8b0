"""Gram matrices of N models from a block of their features, in one read of the block.

A block holds the same columns of all models, so its column mean is the true one and can be taken off before
anything is multiplied: models that differ by 1e-6 of a common base lose nothing to cancellation. What is left
after rounding of the mean is the same vector for every model and disappears when the small matrix is centred.

All kernels accumulate in float64 (call them with x64 enabled) and shard features over the mesh axis
"features": each device multiplies its own columns, one all-reduce of the small results a block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsub.linalg import pieces, products, symmetric

CHUNK = 4096  # columns taken at once: N * 4096 * 4 bytes stay in cache
NARROW = 512  # of combinations by programs side by side, whose centring has one thread each
FEW = 4  # times as many rows as combinations: of more, putting shares together costs what programs gain
PRODUCT = 1024  # columns of a Gram product: of 512 to 8192 the fastest at N = 256 and 500, 4096 a tenth slower
SAMPLED = 128  # columns of each chunk that fourth moments are taken from, where there are MANY chunks
MANY = 64
FEATURES = "features"


class DenseSums(NamedTuple):
    """Additive results of one block x (N, D) with column mean s and rows y = x - s, all float64.

    From 64 chunks of 1024 columns a device on, the last three are estimates from every eighth column: they only tell
    shapes of distributions apart, and in full they would add a quarter to the cost of the product.
    """

    gram: jax.Array  # (N, N) y @ y.T
    cross: jax.Array  # (N,) y @ s
    mean_square: jax.Array  # () s . s
    row_sums: jax.Array  # (N,) sums of the entries of x
    row_fourths: jax.Array  # (N,) sums of the fourth powers of the entries of x
    variance_squares: jax.Array  # () sum over columns of (mean over models of y**2) squared
    deviation_fourths: jax.Array  # () sum of y**4 over columns and models


def dense_gram(x, weights, *, mesh, dtype):
    """Sums of a block of dense rows, see `DenseSums`, and mixtures of its centred rows.

    Args:
        x: (N, D) rows in storage dtype, D a multiple of the number of devices, features sharded; zero columns
            at the end are exact padding. Or (N, *shape), its first weight axis sharded.
        weights: (m, N) coefficients of the mixtures, m >= 0.
        mesh: mesh with an axis "features".
        dtype: "float32" or "float64", the dtype of the products.

    Returns:
        DenseSums in float64, replicated, and weights @ y (m, D) in `dtype`, features sharded. Large blocks on one CPU
        device are waited for.

    Fails on: non-finite entries, which spread to everything. The caller refuses them before.
    Source: method of snapshots, Sirovich 1987; centring before the product, Chan, Golub and LeVeque 1983.
    """
    width = math.prod(x.shape[1:]) // mesh.size
    kernel = functools.partial(_dense_gram, mesh=mesh, dtype=dtype)
    parts = _by_programs(kernel, x, weights, width, mesh)
    return parts[0] if len(parts) == 1 else _joined(*zip(*parts, strict=True))


def _by_programs(kernel, x, weights, width, mesh):
    """[kernel(x, weights, first, width=share), ...] over equal shares of a device's columns, side by side."""
    count = 1 if pieces.is_traced(x, weights) else num_pieces(width, mesh)
    share = width // count
    if count == 1:
        return [kernel(x, weights, np.int32(0), width=share)]
    return pieces.side_by_side(lambda x, index: kernel(x, weights, index * np.int32(share), width=share), x, count)


def num_pieces(width, mesh):
    """Number of equal pieces of a device's columns that are worked on side by side, each by a program of its own."""
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu" or width // PRODUCT < MANY:
        return 1
    return next(count for count in range(pieces.number(width // PRODUCT), 0, -1) if width % count == 0)


@jax.jit
def _joined(sums, mixed):
    return jax.tree.map(lambda *own: sum(own), *sums), jnp.concatenate(mixed, axis=1)


@functools.partial(jax.jit, static_argnames=("width", "mesh", "dtype"))
def _dense_gram(x, weights, first, *, width, mesh, dtype):
    """Of `width` columns of each device's, from its column `first` on."""

    def local(x, weights, first):
        sums, mixed = _dense_local(x, weights.astype(dtype), first, width, dtype)
        return jax.lax.psum(sums, FEATURES), mixed

    features = P(None, FEATURES)
    x = x.reshape(len(x), -1)  # in a traced function it is no copy
    specs = (features, P(), P())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), features), check_vma=False)(
        x, weights, first
    )


def _dense_local(x, weights, first, width, dtype):
    num_models = len(x)
    chunk = min(PRODUCT, width)
    whole = width // chunk
    part = SAMPLED if x.shape[1] // chunk >= MANY else chunk
    wide = jnp.float64

    def fourth_moments(z, y):
        variance = jnp.mean(jnp.square(y), axis=0).astype(wide)
        return (
            jnp.sum(jnp.square(jnp.square(z)), axis=1).astype(wide),
            jnp.sum(jnp.square(variance)),
            jnp.sum(jnp.sum(jnp.square(jnp.square(y)), axis=0).astype(wide)),
        )

    def step(start, size, carry):
        sums, fourths, mixed = carry
        z = products.row_major(pieces.part(x, first + start, size, axis=1).astype(dtype))
        mean = jnp.mean(z, axis=0)
        y = products.row_major(z - mean)
        sums = (
            symmetric.add(sums[0], symmetric.multiply(y)),
            sums[1] + products.matmul(y, mean).astype(wide),
            sums[2] + jnp.sum(jnp.square(mean.astype(wide))),
            sums[3] + jnp.sum(z, axis=1).astype(wide),
        )
        at = (first + start) // chunk * 5 % (chunk // SAMPLED) * SAMPLED if part < size else 0
        found = fourth_moments(*(jax.lax.dynamic_slice_in_dim(a, at, min(part, size), axis=1) for a in (z, y)))
        fourths = jax.tree.map(jnp.add, fourths, found)
        if weights.shape[0]:
            mixture = products.row_major(products.matmul(weights, y))
            mixed = jax.lax.dynamic_update_slice_in_dim(mixed, mixture, start, axis=1)
        return sums, fourths, mixed

    zeros = functools.partial(jnp.zeros, dtype=wide)
    sums = (symmetric.zeros(num_models, wide), zeros(num_models), zeros(()), zeros(num_models))
    fourths = (zeros(num_models), zeros(()), zeros(()))
    carry = (sums, fourths, jnp.zeros((weights.shape[0], width), dtype))
    sums, fourths, mixed = pieces.fold(step, width, chunk, carry)
    gram = symmetric.assemble(sums[0], num_models)
    factor = width / (whole * part + min(part, width % chunk))
    return DenseSums((gram + gram.T) / 2, *sums[1:], *(f * factor for f in fourths)), mixed


def combinations(x, weights, *, mesh, dtype):
    """Weighted sums of centred rows, such as principal directions from the eigenvectors of a Gram matrix.

    Args:
        x: (N, D) rows in storage dtype, features sharded.
        weights: (m, N) coefficients, m >= 1; for unit directions eigenvectors over singular values.
        mesh: mesh with an axis "features".
        dtype: "float32" or "float64", the dtype of the products.

    Returns:
        (m, D) weights @ (x - column mean) in `dtype`, features sharded. One read of x.

    Fails on: weights 1 / s of singular values near the floor of the Gram matrix, whose directions lose digits in
    proportion and are no longer orthogonal (`svd.gram_svd` mends them).
    Source: method of snapshots, Sirovich 1987.
    """
    width, is_few = x.shape[1] // mesh.size, FEW * len(weights) <= len(x)
    kernel = functools.partial(_combinations, mesh=mesh, dtype=dtype)
    if not is_few:
        return kernel(x, weights, np.int32(0), width=width)
    parts = _by_programs(kernel, x, weights, width, mesh)
    return parts[0] if len(parts) == 1 else _beside(parts)


@jax.jit
def _beside(parts):
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnames=("width", "mesh", "dtype"))
def _combinations(x, weights, first, *, width, mesh, dtype):
    """Of `width` columns of each device's, from its column `first` on."""

    def local(x, weights, first):
        def step(start, size, out):
            z = pieces.part(x, first + start, size, axis=1).astype(dtype)
            y = products.row_major(z - jnp.mean(z, axis=0))
            part = products.row_major(products.matmul(weights, y))
            return jax.lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

        chunk = CHUNK if width == x.shape[1] else NARROW
        return pieces.fold(step, width, chunk, jnp.zeros((weights.shape[0], width), dtype))

    features = P(None, FEATURES)
    specs = (features, P(), P())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=features, check_vma=False)
    return mapped(x, weights.astype(dtype), first)


class LoraSums(NamedTuple):
    """Results of a stack of low-rank updates W_n = B_n A_n, all float64, scales not yet applied.

    A block is `deal.size` models each way; `pairs.Deal.assemble` makes (N, N) of all of them. Each is on the device
    that computed it, as are the matrices of a device's own models: nothing is sent.
    """

    gram: jax.Array  # (P * T, size, size) <W_i, W_j>
    b_overlap: jax.Array  # (P * T, size, size) |B_i.T B_j|_F ** 2
    a_cosines: jax.Array  # (P * T, size, size) <A_i, A_j>: shows factors that start from the same draw
    a_gram: jax.Array  # (P * own, r, r) A_n @ A_n.T
    b_gram: jax.Array  # (P * own, r, r) B_n.T @ B_n


def lora_gram(a, bt, *, deal, mesh, dtype, stored="float32"):
    """Inner products of low-rank updates, <W_i, W_j> = tr((B_i.T B_j)(A_j A_i.T)); B @ A is never formed.

    Args:
        a: (P * held, r, i) right factors of the models that each device holds, see `pairs.Deal`; dealt along the
            leading axis; mixed ranks padded with zero rows, and models that are none with zeros (exact).
        bt: (P * held, r, o) left factors transposed, dealt likewise.
        deal: pairs.Deal of the N models.
        mesh: mesh of P devices with an axis "features".
        dtype: "float32" or "float64", the dtype of the products.
        stored: "bfloat16" where all entries are of that dtype, whatever the dtype of the arrays: products of two such
            numbers are exact in float32, and some processors form them several times as fast (`products.takes`).

    Returns:
        LoraSums. Cost r**2 (o + i) multiply-adds a pair of models; no device sends anything.

    Fails on: large ranks; past r**2 = o i / (o + i) forming the updates is cheaper.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    factor = stored if dtype == "float32" and is_cpu and products.takes(stored) else dtype
    return _lora_gram(a, bt, deal.table(), size=deal.size, own=deal.own, mesh=mesh, dtype=dtype, factor=factor)


@functools.partial(jax.jit, static_argnames=("size", "own", "mesh", "dtype", "factor"))
def _lora_gram(a, bt, table, *, size, own, mesh, dtype, factor):
    dealt = P(FEATURES)
    local = functools.partial(_lora_local, size=size, own=own, dtype=dtype, factor=factor)
    return jax.shard_map(local, mesh=mesh, in_specs=(dealt,) * 3, out_specs=dealt, check_vma=False)(a, bt, table)


def _lora_local(a, bt, table, *, size, own, dtype, factor):
    (held, rank), wide = a.shape[:2], jnp.float64
    rows_a, rows_b = (x.reshape(held * rank, x.shape[-1]) for x in (a, bt))
    each_row, each_model = jnp.arange(rank), jnp.arange(size)

    def products_of(x, p, q):
        left, right = (pieces.part(x, start * rank, size * rank).astype(factor) for start in (p, q))
        return products.row_major(products.of_rows(left, right, dtype)).reshape(size, rank, size, rank)

    def pair(t, carry):
        p, q = table[0, t, 0], table[0, t, 1]
        pa, pb = products_of(rows_a, p, q), products_of(rows_b, p, q)
        found = (
            jnp.sum((pa * pb).astype(wide), axis=(1, 3)),
            jnp.sum(jnp.square(pb).astype(wide), axis=(1, 3)),
            jnp.sum(pa[:, each_row, :, each_row].astype(wide), axis=0),  # traces; jnp.trace would read all of pa
        )
        blocks = [jax.lax.dynamic_update_index_in_dim(c, f, t, 0) for c, f in zip(carry, found, strict=False)]
        # A model's products with itself; right once q has come to p, which is the last of the pairs.
        alone = [x[each_model, :, each_model].astype(wide) for x in (pa, pb)]
        return (
            *blocks,
            *(jax.lax.dynamic_update_slice_in_dim(c, f, p, 0) for c, f in zip(carry[3:], alone, strict=True)),
        )

    shapes = [(table.shape[1], size, size)] * 3 + [(held, rank, rank)] * 2
    found = jax.lax.fori_loop(0, table.shape[1], pair, tuple(jnp.zeros(s, wide) for s in shapes))
    return LoraSums(*found[:3], *(f[:own] for f in found[3:]))
