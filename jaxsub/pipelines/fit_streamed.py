"""A dense layer's principal components block by block: two reads of the files, and memory for the result alone.

    read 1   Gram matrix of the centred rows -> eigenvectors V, singular values s -> rank
    read 2   per block: column means, basis = (V / s).T @ (x - mean), what V s @ basis misses of each model

The way of layers whose stack does not fit; the same numbers as `decompositions.gram` to rounding.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsub import bundle, heldout, placement, precision, reading, spectrum, subspace
from jaxsub.bundle import certificates
from jaxsub.decompositions import _fit, gram as plugin
from jaxsub.linalg import gram as kernels, orth, pieces, products
from jaxsub.pipelines import layers, memory, plan as plans
from jaxsub.statistics import Statistics

KERNELS = memory.RUNTIME_BYTES + 96 * 2**20  # of an analysis, and those of the second read


def can(group, config):
    """Whether a group may be fitted so: by the Gram matrix of float32 or narrower weights, stored as computed."""
    return (
        group.parametrisation == "dense"
        and config.decomposition in ("", "gram")
        and config.max_error < 0
        and not (config.basis_dtype or config.coefficient_dtype)
        and "float64" not in group.dtypes
    )


def allowed(config):
    """Host bytes that a layer may take before it is streamed.

    Without a bound half of the machine's memory, not what is free at the time: the same files give the same bits.
    """
    return config.max_host_bytes or plans.total_bytes() / 2 or math.inf


def block_bytes(config):
    """Bytes of a block: a twelfth of what the host is allowed beyond the kernels' own, a quarter of the devices'."""
    mesh = placement.make_mesh(is_local=True)
    devices = mesh.size * (config.max_device_bytes or plans.device_limit(mesh) or math.inf)
    host = allowed(config) - KERNELS
    return int(max(2**20, min(layers.Options().block_bytes, host / 12, devices / 4)))


def peak(group, rank, config):
    """Host bytes: two blocks, a block of the basis and what it leaves, and mean and basis of `rank` components."""
    return 4 * block_bytes(config) + 4 * math.prod(group.shape) * (rank + 1)


def fit(group, models, ids, config, rank):
    """The fitted bundle.Layer; arguments as in `fit_layer.fit`, `ids` and Models of the group's members.

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
        ResourceError: mean and basis, whose size is known after the first read, do not fit.
    """
    mesh = placement.make_mesh(is_local=True)
    plan = placement.plan_dense(group, mesh.size, layers.Options(block_bytes=block_bytes(config)))
    plan = dataclasses.replace(
        plan, exact_axes=(), sketched_axes=(), other_side=False, strengths=False, num_processes=1
    )
    stats = Statistics.empty(group.name, plan.shape, "dense", ids, plan.storage, plan.dtype)
    none = np.zeros((0, plan.num_models), np.float32)
    _fit.require_rows(rank, config.energy, _fit.row_cap(stats), stats.num_models)
    past_cache = plans.outgrows_cache(group.num_bytes)
    with jax.enable_x64(True):
        for block in reading.Blocks(group, models, plan, mesh, past_cache=past_cache):
            sums, _ = kernels.dense_gram(block.x, none, mesh=mesh, dtype=plan.dtype)
            stats.add(jax.device_get(sums), block.exponent)
        found = _components(stats, plan, config, rank)
        _require_memory(group, found.rank, config)
        mean, basis, left = _second_read(group, models, plan, mesh, stats.exponent, found, past_cache)
    values = found.vectors * found.s
    values, basis = _orthonormal(values, basis)
    space = subspace.LinearSubspace(
        jnp.asarray(mean), jnp.asarray(basis), found.spectrum, tuple(group.shape), found.procedure, found.certificate
    )
    values = values.astype(np.float32)
    space = certificates.measured(space, left, np.square(stats.norms()))
    if stats.exponent:
        space, values = subspace.scaled(space, stats.exponent), precision.scaled(values, stats.exponent)
    dtypes = tuple(e.dtype for e in group.entries)
    return bundle.Layer(group.name, space, ids, values, dtypes, _figures(stats, left, found.rank))


@dataclasses.dataclass(frozen=True)
class _Components:
    """What the Gram matrix says: eigenvectors (N, k) and roots (k,) that are above the floor, zeros for the others."""

    vectors: np.ndarray
    s: np.ndarray
    spectrum: subspace.Spectrum
    procedure: subspace.Procedure
    certificate: subspace.Certificate

    @property
    def rank(self):
        return len(self.s)


def _centred(stats):
    return spectrum.unless_equal(stats.centred(), stats.mean_square, stats.dtype)


def _components(stats, plan, config, rank):
    centred, cap, named = _centred(stats), _fit.row_cap(stats), (plugin.__name__.rpartition(".")[2], plugin.REFERENCE)
    values, vectors = heldout.decompose(centred)
    if not centred.any():
        return _Components(vectors[:, :0], values[:0], *_fit.of_equal(cap, *named))
    s = np.sqrt(values)
    floor = float(precision.gram_floor(s[0], stats.num_models, plan.dtype))
    found = subspace.Spectrum(s[:cap], float(np.trace(centred)), floor)
    rank, procedure, certificate = _fit.rows_of(found, cap, *named, rank=rank, energy=config.energy)
    resolved = s[:rank] > floor
    kept = np.where(resolved, vectors[:, :rank], 0.0), np.where(resolved, s[:rank], 0.0)
    return _Components(*kept, found, procedure, certificate)


def _second_read(group, models, plan, mesh, exponent, found, past_cache):
    """(mean (D,), basis (k, D) float32, (N,) squared errors), in units of 2**exponent."""
    size = math.prod(plan.shape)
    mean, basis = np.empty(size, np.float32), np.empty((found.rank, size), np.float32)
    left = np.zeros(plan.num_models)
    inverse = np.divide(1.0, found.s, out=np.zeros_like(found.s), where=found.s > 0)
    weights = (found.vectors * inverse).T
    at = 0
    for block in reading.Blocks(group, models, plan, mesh, past_cache=past_cache):
        step = np.float64(2.0) ** (block.exponent - exponent)
        rows = kernels.combinations(block.x, weights * step, mesh=mesh, dtype="float32")
        means, missed = _rest(block.x, rows, found.vectors * found.s, step, mesh=mesh)
        count = math.prod(block.shape)
        mean[at : at + count] = np.asarray(means)[:count]
        basis[:, at : at + count] = np.asarray(rows)[:, :count]
        left += np.asarray(missed)
        at += count
    return mean, basis, left


@functools.partial(jax.jit, static_argnames="mesh")
def _rest(x, basis, coefficients, step, *, mesh):
    """Column means (w,) of a block `step` x, x (N, w), and (N,) squares of what coefficients @ basis miss."""
    wide, narrow = coefficients.astype(jnp.float32), jnp.float32

    def local(x, basis):
        def one(start, size, carry):
            means, left = carry
            z = pieces.part(x, start, size, axis=1).astype(narrow) * step.astype(narrow)
            mean = jnp.mean(z.astype(jnp.float64), axis=0).astype(narrow)
            part = jax.lax.dynamic_slice_in_dim(basis, start, size, axis=1)
            rest = z - mean - products.row_major(products.matmul(wide, part))
            left = left + jnp.sum(jnp.square(rest).astype(jnp.float64), axis=1)
            return jax.lax.dynamic_update_slice_in_dim(means, mean, start, axis=0), left

        start = jnp.zeros(x.shape[1], narrow), jnp.zeros(len(x))
        means, left = pieces.fold(one, x.shape[1], kernels.CHUNK, start)
        return means, jax.lax.psum(left, kernels.FEATURES)

    rows = P(None, kernels.FEATURES)
    out = P(kernels.FEATURES), P()
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=out, check_vma=False)(x, basis)


def _orthonormal(values, basis):
    """The same models from rows of the basis that are orthonormal to rounding, the largest entry of each positive.

    Rows of values near the floor lean on each other by the Gram matrix' rounding; B = L B' with L L.T = B B.T takes
    that out (one round of CholeskyQR), and c B = (c L) B'. Rows of zeros stay.
    """
    if not len(basis):
        return values, basis
    parts = [basis[:, j : j + orth.PIECE] for j in range(0, basis.shape[1], orth.PIECE)]
    lower = orth.one_round(basis, sum(np.asarray(part, np.float64) @ part.T for part in parts))
    largest = np.zeros(len(basis))
    for part in parts:
        most = part[np.arange(len(part)), np.abs(part).argmax(axis=1)]
        largest = np.where(np.abs(most) > np.abs(largest), most, largest)
    signs = np.where(largest < 0, -1.0, 1.0)
    basis *= signs[:, None].astype(np.float32)
    return values @ lower * signs, basis


def _figures(stats, left, rank):
    """What the manifest says of the layer; as `fit_layer` finds it from the whole stack."""
    centred = _centred(stats)
    total = float(np.trace(centred))
    return {**subspace.error_figures(left, np.square(stats.norms()), total), **heldout.of_one_model(centred, rank)}


def _require_memory(group, rank, config):
    of, cure = f" for mean and basis of {rank} components", "take fewer components with --rank or --energy"
    plans.require_host_memory(group.name, KERNELS + peak(group, rank, config), allowed(config), cure, of)
