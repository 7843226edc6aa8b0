"""Truncated principal components of a stream of models too wide, or too many, for a Gram matrix.

    state rows  z = [s V; batch - its mean; sqrt(N b / (N + b)) (batch mean - mean)]  ->  leading l of U.T z

Covariances add up exactly by these rows (Chan, Golub and LeVeque 1983), so all that is ever lost is what truncation
to l rows drops: a positive matrix, whose trace and norm are kept. Keep l = 2 k rows for k components: with l = k each
batch throws away directions that only later batches would have shown to matter. Nothing can be taken out of a
truncated state; see `moments` for exact adding and removing.

Call with x64 enabled: sums and small eigenproblems are float64. Features are sharded over the mesh axis "features";
zero columns at the end are exact padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxsub import errors, precision
from jaxsub.linalg import operands, pieces, products

CHUNK = 4096  # columns a product, as in `gram`
FEATURES = "features"
# Energy that rounding of one update's products may move, in units of eps times all its energy. The largest seen was
# 0.27 (D from 300 to 100,000, decaying, flat and low-rank spectra). The eigenproblem adds its size times eps64.
ROUNDING = 2


class Stream(NamedTuple):
    """What is kept of the models seen so far, replicated and float64 unless said otherwise."""

    num_models: jax.Array  # ()
    mean: jax.Array  # (D,) mean of all models, features sharded
    rows: jax.Array  # (l, D) scaled components s_i v_i in the dtype of the products, features sharded
    energy: jax.Array  # () squared Frobenius norm of all models minus their mean
    discarded: jax.Array  # () sum of the energies that truncations dropped
    largest_discarded: jax.Array  # () sum over truncations of the largest energy each dropped
    rounding: jax.Array  # () energy that rounding may have moved


class Components(NamedTuple):
    """Components of a stream and how wrong they can be, float64; energies are squared singular values."""

    singular_values: jax.Array  # (k,) non-increasing, never above the true ones but for rounding
    basis: jax.Array  # (k, D) orthonormal rows, largest entry positive; zero rows where nothing is resolved
    mean: jax.Array  # (D,)
    floor: jax.Array  # () singular values under it are noise of the first Gram product they went through
    energy_error: jax.Array  # () upper bound of sigma_i**2 - singular_values[i]**2, any i
    residual: jax.Array  # () upper bound of |X - mean - projection|_F**2, at most energy_error-wise above the best
    angle: jax.Array  # () upper bound of the sine of the largest angle to the true span; 1 where there is no gap


def start(num_features, /, *, rows, dtype):
    """Stream before any model.

    Args:
        num_features: D, a multiple of the number of devices.
        rows: l >= 1, rows to keep, twice the components that will be asked for.
        dtype: "float32" or "float64", the dtype of the products.

    Raises:
        ConfigError: if rows or num_features is below 1.
    """
    if rows < 1 or num_features < 1:
        raise errors.ConfigError(f"rows is {rows} and num_features {num_features}, both need at least 1")
    zeros = functools.partial(jnp.zeros, dtype=jnp.float64)
    # No scalar is shared: `update` donates them all.
    return Stream(
        zeros(()), zeros(num_features), jnp.zeros((rows, num_features), dtype), *(zeros(()) for _ in range(4))
    )


def update(stream, batch, /, *, mesh):
    """Stream after a further batch of models. Donates `stream`.

    Args:
        stream: Stream.
        batch: (b, D) models as rows in storage dtype, b >= 1, features sharded. Each b compiles once.
        mesh: mesh with an axis "features".

    Returns:
        Stream. Two reads of batch and rows, one all-reduce of (l + b + 1)**2 numbers.

    Raises:
        ConfigError: if the features differ or the batch is empty.

    Fails on: non-finite entries. Directions under about 8 sqrt(eps) of the largest singular value are noise of the
    Gram product (`precision.gram_floor`): use float64 products for them.
    Source: Levy and Lindenbaum 2000 and Ross et al. 2008, section 2 (mean correction), with the eigenproblem of the
    Gram matrix instead of a QR of the batch, and l > k rows kept.
    """
    if batch.ndim != 2 or batch.shape[1] != stream.rows.shape[1] or not batch.shape[0]:
        raise errors.ConfigError(f"batch has shape {batch.shape}, expected (b, {stream.rows.shape[1]}) with b >= 1")
    return _update(stream, batch, mesh=mesh)


_SPECS = Stream._make([P(), P(FEATURES), P(None, FEATURES), P(), P(), P(), P()])


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _update(stream, batch, *, mesh):
    specs = (_SPECS, P(None, FEATURES))
    return jax.shard_map(_update_local, mesh=mesh, in_specs=specs, out_specs=_SPECS, check_vma=False)(stream, batch)


def _update_local(stream, batch):
    count, mean, rows = stream.num_models, stream.mean, stream.rows
    num_rows, dtype = rows.shape[0], rows.dtype
    num_new, width = batch.shape
    share = num_new / (count + num_new)
    weight = jnp.sqrt(count * share)

    def block(start, size, mean, rows):
        z = pieces.part(batch, start, size, axis=1).astype(jnp.float64)
        old = jax.lax.dynamic_slice_in_dim(mean, start, size)
        own = jnp.mean(z, axis=0)
        # float64 until the means are off: a common base is many times larger than what is left.
        parts = [jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1), (z - own).astype(dtype)]
        parts.append((weight * (own - old)).astype(dtype)[None])
        return products.row_major(jnp.concatenate(parts)), old + share * (own - old)

    def add(start, size, gram):
        y, _ = block(start, size, mean, rows)
        return gram + products.matmul(y, y.T).astype(jnp.float64)

    total = num_rows + num_new + 1
    gram = jax.lax.psum(pieces.fold(add, width, CHUNK, jnp.zeros((total, total), jnp.float64)), FEATURES)
    values, u = jnp.linalg.eigh(gram)
    leading = u[:, ::-1][:, :num_rows].T.astype(dtype)
    dropped = jnp.maximum(values[: num_new + 1], 0)

    def mix(start, size, carry):
        mean, rows = carry
        y, moved = block(start, size, mean, rows)
        mean = jax.lax.dynamic_update_slice_in_dim(mean, moved, start, axis=0)
        return mean, jax.lax.dynamic_update_slice_in_dim(rows, products.matmul(leading, y), start, axis=1)

    mean, rows = pieces.fold(mix, width, CHUNK, (mean, rows))
    trace = jnp.trace(gram)
    return Stream(
        count + num_new,
        mean,
        rows,
        stream.energy + jnp.sum(jnp.diagonal(gram)[num_rows:]),
        stream.discarded + jnp.sum(dropped),
        stream.largest_discarded + dropped[-1],
        stream.rounding + (ROUNDING * float(jnp.finfo(dtype).eps) + total * precision.EPS64) * trace,
    )


def finish(stream, /, *, rank, mesh):
    """Components of a stream. The stream stays usable.

    With E the sum of all dropped parts, X.T X = rows.T rows + E exactly and E >= 0. So true energies exceed those
    found by at most |E|, and projecting on the basis leaves at most energy - sum of the energies found.

    Args:
        stream: Stream.
        rank: k, 1 ... l, static.
        mesh: mesh with an axis "features".

    Returns:
        Components. `angle` is Davis and Kahan's |E| / gap, pessimistic where much small energy was dropped.

    Raises:
        ConfigError: if rank is not in 1 ... l.

    Fails on: components whose singular values agree to sqrt(energy_error); only their common span is determined.
    Source: Weyl's inequality and Davis and Kahan 1970, section 2, for X.T X and rows.T rows.
    """
    operands.require_rank(rank, stream.rows.shape[0], "the stream's rows")
    return _finish(stream, rank=rank, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("rank", "mesh"))
def _finish(stream, *, rank, mesh):
    specs = Components(P(), P(None, FEATURES), P(FEATURES), P(), P(), P(), P())
    local = functools.partial(_finish_local, rank=rank)
    return jax.shard_map(local, mesh=mesh, in_specs=(_SPECS,), out_specs=specs, check_vma=False)(stream)


def _finish_local(stream, rank):
    rows = stream.rows
    num_rows, width = rows.shape
    eps = float(jnp.finfo(rows.dtype).eps)

    def add(start, size, gram):
        y = products.row_major(jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1))
        return gram + products.matmul(y, y.T).astype(jnp.float64)

    gram = jax.lax.psum(pieces.fold(add, width, CHUNK, jnp.zeros((num_rows, num_rows), jnp.float64)), FEATURES)
    values, u = jnp.linalg.eigh(gram)
    energies, leading = jnp.maximum(values[::-1], 0), u[:, ::-1][:, :rank].T
    # Rows are nearly orthogonal, so their Gram matrix is graded: float32 products resolve eps32 of the largest, more
    # than sqrt(eps32). The eigenproblem itself ends at sqrt(eps64).
    largest = num_rows * max(eps**2, 8 * precision.EPS64) * energies[0]
    # Equal models differ by the rounding of their mean: eps64 of its norm each.
    offset = jax.lax.psum(jnp.sum(jnp.square(stream.mean)), FEATURES) * stream.num_models * precision.EPS64**2
    is_resolved = energies[:rank] > largest + offset
    mixed = products.matmul(leading.astype(rows.dtype), rows)
    norms = jnp.sqrt(jax.lax.psum(jnp.sum(jnp.square(mixed.astype(jnp.float64)), axis=1), FEATURES))
    highest = jax.lax.pmax(jnp.max(mixed, axis=1), FEATURES)
    lowest = jax.lax.pmin(jnp.min(mixed, axis=1), FEATURES)
    scale = jnp.where(is_resolved, jnp.where(highest >= -lowest, 1, -1) / jnp.where(is_resolved, norms, 1), 0)
    basis = mixed * scale[:, None].astype(rows.dtype)
    # A Newton-Schulz step squares what grading left of non-orthogonality, eps64 * (s_1 / s_k)**2: a hundredth near the
    # least value that float64 products resolve, which takes three.
    for _ in range(3 if rows.dtype == jnp.float64 else 1):
        overlap = jax.lax.psum(products.matmul(basis, basis.T), FEATURES)
        basis = 1.5 * basis - 0.5 * products.matmul(overlap, basis)
    next_energy = energies[rank] if rank < num_rows else jnp.zeros(())
    rounding = stream.rounding + offset
    error = stream.largest_discarded + rounding
    gap = energies[rank - 1] - next_energy - error
    return Components(
        jnp.sqrt(energies[:rank]),
        basis,
        stream.mean,
        precision.gram_floor(jnp.sqrt(energies[0]), num_rows, str(rows.dtype)),
        error,
        jnp.maximum(stream.energy - jnp.sum(energies[:rank]), 0) + rounding,
        jnp.where(gap > error, error / jnp.where(gap > error, gap, 1), 1.0),
    )
