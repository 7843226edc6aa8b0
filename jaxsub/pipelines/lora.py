"""Statistics of a layer of low-rank updates, from their factors alone: B @ A is never formed."""

import concurrent.futures
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import descriptors, distributed, errors, hostmemory, placement, precision, reading, solvers
from jaxsub.linalg import gram as gram_kernels, unfold
from jaxsub.linalg.gram import FEATURES
from jaxsub.linalg.modes import COLUMNS, MIXTURES
from jaxsub.pipelines import axes
from jaxsub.statistics import ModeEnergies, Statistics


def statistics(group, models, mesh, options, meter, key):
    """Statistics of one layer group of LoraPairs; arguments as in `layers.statistics`, and the layer's PRNG key."""
    started = time.perf_counter()
    pairs = group.entries
    storage = precision.widest(t.dtype for e in pairs for t in (e.a, e.b))
    ranks = np.array([e.rank for e in pairs])
    rank = int(ranks.max())
    width_a, width_b = math.prod(pairs[0].a.shape[1:]), pairs[0].b.shape[0]
    work = len(pairs) ** 2 * rank**2 * (width_a + width_b)
    dtype = precision.compute_dtype(storage, work, options.precision)
    read_dtype = descriptors.numpy_dtype("float64" if storage == "float64" else "float32")
    shapes = [(len(pairs), rank, padded(width, mesh)) for width in (width_a, width_b)]
    a, bt = (_read(side, s, pairs, models, mesh, read_dtype) for side, s in zip("ab", shapes, strict=True))
    scales = np.array([e.scale for e in pairs])
    common = math.frexp(float(np.abs(scales).max()))[1]
    common = common if abs(common) > precision.SAFE_EXPONENT else 0
    scales = np.ldexp(scales, -common)
    powers = [_safe_exponent(x) for x in distributed.gather([_largest(a), _largest(bt)]).max(axis=0).tolist()]
    for x, power in zip((a, bt), powers, strict=True):
        if power:
            np.ldexp(x, -power, out=x)
    meter.read_seconds += time.perf_counter() - started
    meter.bytes_read += sum(e.a.num_bytes + e.b.num_bytes for e in pairs) // jax.process_count()

    started = time.perf_counter()
    factors = [placement.put(x, shape, mesh) for x, shape in zip((a, bt), shapes, strict=True)]
    sums = jax.device_get(gram_kernels.lora_gram(*factors, mesh=mesh, dtype=dtype))
    outer = scales[:, None] * scales[None, :]
    stats = Statistics.empty(group.name, pairs[0].shape, "lora", tuple(i for i, _ in models), storage, dtype)
    stats.exponent = sum(powers) + common
    stats.roundings = np.array([max(precision.rounding(t.dtype) for t in (e.a, e.b)) for e in pairs])
    stats.gram = sums.gram * outer
    entry_sums = distributed.gather([x.sum(axis=2, dtype=np.float64) for x in (a, bt)]).sum(axis=0)
    stats.row_sums = scales * np.einsum("nr,nr->n", *entry_sums)
    stats.variance_squares = stats.deviation_fourths = math.nan  # not to be had from the factors alone
    stats.row_fourths = np.full(len(pairs), math.nan)
    stats.ranks, stats.a_width = ranks.astype(np.float64), width_a
    stats.b_overlap = sums.b_overlap * outer**2
    stats.b_norms = np.sqrt(np.trace(sums.b_gram, axis1=1, axis2=2)) * np.abs(scales)
    norms = np.sqrt(np.maximum(np.diag(sums.a_cosines), 1e-300))
    stats.a_cosines = sums.a_cosines / norms[:, None] / norms[None, :]
    roots_a, roots_b = _roots(sums.a_gram), _roots(sums.b_gram)
    cores = solvers.singular_values(roots_b @ roots_a)
    stats.model_singular_values = cores * np.abs(scales)[:, None]
    transposed = int(pairs[0].transposed)
    weights, sizes = [roots * scales[:, None, None] for roots in (roots_b, roots_a)], pairs[0].a.shape[1:]
    inputs = _modes(factors[0], weights[0], sizes, 1 - transposed, options, key, mesh)
    outputs = _modes(factors[1], weights[1], (width_b,), transposed, options, key, mesh)
    stats.modes = tuple(sorted([*inputs, *outputs], key=lambda m: m.axis))
    meter.compute_seconds += time.perf_counter() - started
    return stats


def _read(side, shape, pairs, models, mesh, dtype):
    """One side of the factors, (N, r, columns here): A, or B transposed; zeros beyond ranks and widths.

    Raises:
        NonFiniteError, InputError: on all processes where one of them finds a fault.
    """
    first, end = placement.columns_here(shape[2], mesh)
    x, failure = hostmemory.zeros((*shape[:2], end - first), dtype), None

    def one(n):
        tensor = getattr(pairs[n], side)
        part = reading.read_columns(models[n][1], tensor, n, first, end, leading=side == "b")
        x[n, : pairs[n].rank, : part.shape[1]] = part

    try:
        with concurrent.futures.ThreadPoolExecutor(reading.READERS) as pool:
            for done in [pool.submit(one, n) for n in range(len(pairs))]:
                done.result()
    except errors.InputError as error:
        failure = error
    reading.agree(0.0, 0.0, failure, mesh)
    return x


def _modes(x, roots, sizes, first, options, key, mesh):
    """Energies of C_in = sum s^2 A.T (B.T B) A or C_out = sum s^2 B (A A.T) B.T; uncentred, as centring factors
    would depend on the gauge. From the rows (B.T B)^(1/2) A, never from a matrix of updates.

    Args:
        x: (N, r, width) factors of this side; the first prod(sizes) columns are a C-ordered tensor of weight axes.
        roots: (N, r, r) of the other side, scales included.
        sizes: of the weight axes of this side, more than one for convolutions.
        first: number of the first of them.
    """
    rows, total = _weighted_rows(roots, x, mesh)
    total, found = float(total), []
    for position, size in enumerate(sizes):
        if len(sizes) > 1 and size == 1:
            continue
        axis, num_rows = first + position, len(rows) * math.prod(sizes) // size
        if mode_is_exact(num_rows, size, options):
            values = _energies(rows, sizes, position, mesh)[::-1][: min(num_rows, size)]
            found.append(ModeEnergies(axis, size, np.maximum(values, 0.0), total, 0, False))
            continue
        tests = _tests(rows, jax.random.fold_in(key, axis), sizes, position, mesh)
        found.append(axes.sketched_mode(axis, np.asarray(tests, np.float64)[:, :size], total, centred=False))
    return found


def mode_is_exact(num_rows, width, options):
    """Whether the energies of (num_rows, width) rows are taken from their Gram matrix, not from a sketch."""
    shorter = min(num_rows, width)
    return num_rows * width * shorter <= options.mode_work and shorter <= options.mode_width


def _energies(rows, sizes, position, mesh):
    """Eigenvalues as `_row_energies` gives them; from the rows themselves where it gives none that are finite."""
    values = np.asarray(_row_energies(rows, sizes, position, mesh))
    if solvers.is_finite(values):
        return values
    if mesh.is_multi_process:
        raise errors.SolverError(f"energies of weight axis {position} that are not finite")
    solvers.note(f"energies of weight axis {position} were not finite; found again by NumPy")
    part = np.asarray(rows, np.float64)[:, : math.prod(sizes)]
    before, size, after = unfold.view(sizes, position)
    part = np.moveaxis(part.reshape(len(part), before, size, after), 2, 3).reshape(-1, size)
    return np.square(solvers.singular_values(part))[::-1]


@functools.partial(jax.jit, static_argnames="mesh")
def _weighted_rows(roots, x, mesh):
    """Rows (N * r, width) of the products, columns sharded as those of `x`, and the sum of their squares in float64."""

    def local(roots, x):
        rows = jnp.einsum("nrs,nsw->nrw", roots.astype(x.dtype), x, precision="highest")
        total = jax.lax.psum(jnp.sum(jnp.square(rows.astype(jnp.float64))), FEATURES)
        return rows.reshape(-1, x.shape[2]), total

    given, found = (P(), P(None, None, FEATURES)), (P(None, FEATURES), P())
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=found, check_vma=False)(roots, x)


@functools.partial(jax.jit, static_argnames=("sizes", "position", "mesh"))
def _row_energies(rows, sizes, position, mesh):
    """Eigenvalues, ascending, of the smaller Gram matrix of the rows (num * rest, sizes[position]) of an axis.

    Columns stay where they are if they are the axis and the longer side. Else rows are dealt out whole, and where the
    axis is longer, its entries in a second round: a device sends and gets its share of `rows` once or twice.
    """
    size, rest = sizes[position], math.prod(sizes) // sizes[position]
    is_wide = len(rows) * rest <= size

    def local(x):
        part = x
        if rest > 1 or not is_wide:
            part = _along(_dealt_rows(x, mesh), sizes, position)
            part = _dealt_rows(part.T, mesh).T if is_wide else part
        part = part.astype(jnp.float64)
        return jax.lax.psum(part @ part.T if is_wide else part.T @ part, FEATURES)

    gram = jax.shard_map(local, mesh=mesh, in_specs=P(None, FEATURES), out_specs=P(), check_vma=False)(rows)
    return jnp.linalg.eigvalsh(gram)


@functools.partial(jax.jit, static_argnames=("sizes", "position", "mesh"))
def _tests(rows, key, sizes, position, mesh):
    """(2, size or more, columns) products of an axis' rows with Gaussian test vectors, in two halves; on every device.

    The test vectors are those of one device, each device taking what belongs to its columns or rows.
    """
    rest = math.prod(sizes) // sizes[position]
    test = jax.random.normal(key, (2, len(rows) * rest, MIXTURES * COLUMNS), dtype=rows.dtype)

    def local(x, test):
        if rest == 1:
            return jnp.einsum("rw,hrc->hwc", x, test, precision="highest")
        part = _along(_dealt_rows(x, mesh), sizes, position)
        test = jnp.pad(test, ((0, 0), (0, mesh.size * len(part) - test.shape[1]), (0, 0)))
        own = jax.lax.dynamic_slice_in_dim(test, jax.lax.axis_index(FEATURES) * len(part), len(part), axis=1)
        return jax.lax.psum(jnp.einsum("rw,hrc->hwc", part, own, precision="highest"), FEATURES)

    given, found = (P(None, FEATURES), P()), P(None, FEATURES) if rest == 1 else P()
    tests = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=found, check_vma=False)(rows, test)
    return jax.lax.with_sharding_constraint(tests, NamedSharding(mesh, P()))


def _dealt_rows(x, mesh):
    """(rows / devices, D') whole rows of x (rows, D' / devices) on this device, zeros behind the last."""
    if mesh.size == 1:
        return x
    x = jnp.pad(x, ((0, -len(x) % mesh.size), (0, 0)))
    return jax.lax.all_to_all(x, FEATURES, split_axis=0, concat_axis=1, tiled=True)


def _along(rows, sizes, position):
    """Rows (num * rest, sizes[position]): one axis of those that the columns of rows (num, prod(sizes)) merge."""
    before, size, after = unfold.view(sizes, position)
    rows = rows[:, : math.prod(sizes)]
    return jnp.moveaxis(rows.reshape(len(rows), before, size, after), 2, 3).reshape(-1, size)


def _roots(grams):
    values, vectors = solvers.eigh(grams)
    return np.einsum("nij,nj,nkj->nik", vectors, np.sqrt(np.maximum(values, 0.0)), vectors)


def padded(width, mesh):
    """Columns of a factor with the zeros that make it divisible among devices."""
    return -(-width // (8 * mesh.size)) * 8 * mesh.size


def _largest(x):
    return max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))


def _safe_exponent(largest):
    exponent = math.frexp(largest)[1]
    return exponent if largest and abs(exponent) > precision.SAFE_EXPONENT // 2 else 0


def plan(group, options):
    """LayerPlan of a LoRA group: the factors of all models are held at once, in float32 (float64 if stored so)."""
    pairs = group.entries
    storage = precision.widest(t.dtype for e in pairs for t in (e.a, e.b))
    rank = max(e.rank for e in pairs)
    widths = [math.prod(pairs[0].a.shape[1:]), pairs[0].b.shape[0]]
    n = len(pairs)
    work = n**2 * rank**2 * sum(widths)
    dtype = precision.compute_dtype(storage, work, options.precision)
    return placement.LayerPlan(
        name=group.name,
        shape=tuple(group.shape),
        num_models=n,
        storage=storage,
        dtype=dtype,
        rows=0,
        width=0,
        num_blocks=1,
        exact_axes=(),
        other_side=False,
        sketched_axes=(),
        strengths=True,
        bytes_read=sum(e.a.num_bytes + e.b.num_bytes for e in pairs),
    )
