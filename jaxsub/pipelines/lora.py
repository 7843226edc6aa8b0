"""Statistics of a layer of low-rank updates, from their factors alone: B @ A is never formed."""

import concurrent.futures
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsub import descriptors, distributed, errors, hostmemory, placement, precision, reading, solvers
from jaxsub.linalg import gram as gram_kernels, pairs as pair_kernels, unfold
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
    width_a, width_b = math.prod(pairs[0].a.shape[1:]), pairs[0].b.shape[0]
    dealt = deal_of(group, mesh)
    rank = int(ranks.max())
    dtype = precision.compute_dtype(storage, len(pairs) ** 2 * rank**2 * (width_a + width_b), options.precision)
    here = dealt.read_by(placement.devices_here(mesh))
    shapes = [(len(here), rank, width) for width in (width_a, width_b)]
    wide = descriptors.numpy_dtype("float64" if storage == "float64" else "float32")
    a, bt = (_read(side, shape, here, pairs, models, mesh, wide) for side, shape in zip("ab", shapes, strict=True))
    scales = np.array([e.scale for e in pairs])
    common = precision.exponent_of(precision.largest(scales))
    scales = np.ldexp(scales, -common)
    largest = distributed.gather([precision.largest(x) for x in (a, bt)]).max(axis=0).tolist()
    powers = [precision.exponent_of(x, precision.SAFE_EXPONENT // 2) for x in largest]
    for x, power in zip((a, bt), powers, strict=True):
        if power:
            np.ldexp(x, -power, out=x)
    meter.read_seconds += time.perf_counter() - started
    meter.bytes_read += sum(pairs[n].a.num_bytes + pairs[n].b.num_bytes for n in here if n < len(pairs))

    started = time.perf_counter()
    factors = [placement.deal(x, here, dealt, mesh) for x in (a, bt)]
    sums = gram_kernels.lora_gram(*factors, deal=dealt, mesh=mesh, dtype=dtype, stored=storage)
    gram, b_overlap, a_cosines = (dealt.assemble(placement.whole(x)) for x in sums[:3])
    outer = scales[:, None] * scales[None, :]
    stats = Statistics.empty(group.name, pairs[0].shape, "lora", tuple(i for i, _ in models), storage, dtype)
    stats.exponent = sum(powers) + common
    stats.roundings = np.array([max(precision.rounding(t.dtype) for t in (e.a, e.b)) for e in pairs])
    stats.gram = gram * outer
    stats.variance_squares = stats.deviation_fourths = math.nan  # not to be had from the factors alone
    stats.row_fourths = np.full(len(pairs), math.nan)
    stats.ranks, stats.a_width = ranks.astype(np.float64), width_a
    stats.b_overlap = b_overlap * outer**2
    norms = np.sqrt(np.maximum(np.diag(a_cosines), 1e-300))
    stats.a_cosines = a_cosines / norms[:, None] / norms[None, :]
    # Of this process' own models; what is known of each goes to the others as a few numbers.
    own = slice(*(dealt.own * k for k in placement.span(mesh)))
    own_scales = np.pad(scales, (0, dealt.padded - len(scales)))[own]
    a_gram, b_gram = (placement.part_here(x) for x in sums[3:])
    roots_a, roots_b = _roots(a_gram), _roots(b_gram)
    at = np.searchsorted(here, np.arange(own.start, own.stop))
    entry_sums = [x[at].sum(axis=2, dtype=np.float64) for x in (a, bt)]
    cores = solvers.singular_values(roots_b @ roots_a)
    b_norms = np.sqrt(np.trace(b_gram, axis1=1, axis2=2))
    each = np.column_stack([b_norms, cores]) * np.abs(own_scales)[:, None]
    each = np.column_stack([own_scales * np.einsum("nr,nr->n", *entry_sums), each])
    each = distributed.gather(each).reshape(dealt.padded, rank + 2)[: len(pairs)]
    stats.row_sums, stats.b_norms, stats.model_singular_values = each[:, 0], each[:, 1], each[:, 2:]
    transposed, sizes = int(pairs[0].transposed), pairs[0].a.shape[1:]
    weights = [
        placement.put(roots * own_scales[:, None, None], (dealt.padded, rank, rank), mesh, axis=0)
        for roots in (roots_b, roots_a)
    ]
    count = len(pairs) * rank
    inputs = _modes(factors[0], weights[0], count, sizes, 1 - transposed, options, key, mesh)
    outputs = _modes(factors[1], weights[1], count, (width_b,), transposed, options, key, mesh)
    stats.modes = tuple(sorted([*inputs, *outputs], key=lambda m: m.axis))
    meter.compute_seconds += time.perf_counter() - started
    return stats


def deal_of(group, mesh):
    """pairs.Deal of a layer of LoraPairs."""
    rank = max(e.rank for e in group.entries)
    return pair_kernels.Deal.create(len(group.entries), rank, mesh.size, len(placement.devices_here(mesh)))


def _read(side, shape, here, pairs, models, mesh, dtype):
    """One side of the factors of the models `here`, (n, r, width): A, or B transposed; zeros beyond their ranks.

    Raises:
        NonFiniteError, InputError: on all processes where one of them finds a fault.
    """
    x, failure = hostmemory.zeros(shape, dtype), None

    def one(row, n):
        part = reading.read_factor(models[n][1], getattr(pairs[n], side), n, transposed=side == "b")
        x[row, : pairs[n].rank] = part

    try:
        with concurrent.futures.ThreadPoolExecutor(reading.READERS) as pool:
            for done in [pool.submit(one, row, n) for row, n in enumerate(here.tolist()) if n < len(pairs)]:
                done.result()
    except errors.InputError as error:
        failure = error
    reading.agree(0.0, 0.0, failure, mesh, is_shared=True)
    return x


def _modes(x, roots, count, sizes, first, options, key, mesh):
    """Energies of C_in = sum s^2 A.T (B.T B) A or C_out = sum s^2 B (A A.T) B.T; uncentred, as centring factors
    would depend on the gauge. From the rows (B.T B)^(1/2) A, never from a matrix of updates.

    Args:
        x: (P * held, r, width) factors of this side, dealt as in `gram.lora_gram`; their columns are a C-ordered tensor
            of weight axes.
        roots: (P * own, r, r) of the other side, scales included, dealt likewise.
        count: N * r, rows of models that there are.
        sizes: of the weight axes of this side, more than one for convolutions.
        first: number of the first of them.
    """
    rows, total = _weighted_rows(roots, x, mesh)
    total, found = float(total), []
    for position, size in enumerate(sizes):
        if len(sizes) > 1 and size == 1:
            continue
        axis, num_rows = first + position, count * math.prod(sizes) // size
        if mode_is_exact(num_rows, size, options):
            values = _energies(rows, count, sizes, position, mesh)[::-1][: min(num_rows, size)]
            found.append(ModeEnergies(axis, size, np.maximum(values, 0.0), total, 0, False))
            continue
        tests = _tests(rows, jax.random.fold_in(key, axis), count, sizes, position, mesh)
        found.append(axes.sketched_mode(axis, np.asarray(tests, np.float64), total, centred=False))
    return found


def mode_is_exact(num_rows, width, options):
    """Whether the energies of (num_rows, width) rows are taken from their Gram matrix, not from a sketch."""
    shorter = min(num_rows, width)
    return num_rows * width * shorter <= options.mode_work and shorter <= options.mode_width


def _energies(rows, count, sizes, position, mesh):
    """Eigenvalues as `_row_energies` gives them; from the rows themselves where it gives none that are finite."""
    values = np.asarray(_row_energies(rows, count, sizes, position, mesh))
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
    """Rows (P * own * r, width) of the products, dealt, and the sum of their squares in float64."""

    def local(roots, x):
        rows = jnp.einsum("nrs,nsw->nrw", roots.astype(x.dtype), x[: len(roots)], precision="highest")
        total = jax.lax.psum(jnp.sum(jnp.square(rows.astype(jnp.float64))), FEATURES)
        return rows.reshape(-1, x.shape[2]), total

    dealt = P(FEATURES)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(dealt, dealt), out_specs=(dealt, P()), check_vma=False)
    return mapped(roots, x)


@functools.partial(jax.jit, static_argnames=("count", "sizes", "position", "mesh"))
def _row_energies(rows, count, sizes, position, mesh):
    """Eigenvalues, ascending, of the smaller Gram matrix of the rows (count * rest, sizes[position]) of an axis.

    Rows lie whole on devices, zeros behind the `count` that there are. Where the axis is longer than there are rows,
    its entries are dealt out: a device sends and gets its share of `rows` once.
    """
    size, rest = sizes[position], math.prod(sizes) // sizes[position]
    is_wide = count * rest <= size

    def local(x):
        part = _along(x, sizes, position)
        if is_wide:
            part = _dealt_columns(part, mesh)[: count * rest]
        part = part.astype(jnp.float64)
        return jax.lax.psum(part @ part.T if is_wide else part.T @ part, FEATURES)

    gram = jax.shard_map(local, mesh=mesh, in_specs=P(FEATURES), out_specs=P(), check_vma=False)(rows)
    return jnp.linalg.eigvalsh(gram)


@functools.partial(jax.jit, static_argnames=("count", "sizes", "position", "mesh"))
def _tests(rows, key, count, sizes, position, mesh):
    """(2, size, columns) products of an axis' rows with Gaussian test vectors, in two halves; on every device.

    The test vectors are those of one device, each device taking what belongs to its rows.
    """
    rest = math.prod(sizes) // sizes[position]
    test = jax.random.normal(key, (2, count * rest, MIXTURES * COLUMNS), dtype=rows.dtype)

    def local(x, test):
        part = _along(x, sizes, position)
        test = jnp.pad(test, ((0, 0), (0, mesh.size * len(part) - test.shape[1]), (0, 0)))
        own = jax.lax.dynamic_slice_in_dim(test, jax.lax.axis_index(FEATURES) * len(part), len(part), axis=1)
        return jax.lax.psum(jnp.einsum("rw,hrc->hwc", part, own, precision="highest"), FEATURES)

    given = P(FEATURES), P()
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=P(), check_vma=False)(rows, test)


def _dealt_columns(x, mesh):
    """(rows of all devices, D' / devices): of each device's x (rows, D') some whole columns; zeros behind the last."""
    if mesh.size == 1:
        return x
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % mesh.size)))
    return jax.lax.all_to_all(x, FEATURES, split_axis=1, concat_axis=0, tiled=True)


def _along(rows, sizes, position):
    """Rows (num * rest, sizes[position]): one axis of those that the columns of rows (num, prod(sizes)) merge."""
    before, size, after = unfold.view(sizes, position)
    return jnp.moveaxis(rows.reshape(len(rows), before, size, after), 2, 3).reshape(-1, size)


def _roots(grams):
    values, vectors = solvers.eigh(grams)
    return np.einsum("nij,nj,nkj->nik", vectors, np.sqrt(np.maximum(values, 0.0)), vectors)


def plan(group, mesh, options):
    """LayerPlan of a LoRA group: the factors of all models are held at once, in float32 (float64 if stored so)."""
    pairs = group.entries
    storage = precision.widest(t.dtype for e in pairs for t in (e.a, e.b))
    rank = max(e.rank for e in pairs)
    widths = [math.prod(pairs[0].a.shape[1:]), pairs[0].b.shape[0]]
    n = len(pairs)
    work = n**2 * rank**2 * sum(widths)
    dtype = precision.compute_dtype(storage, work, options.precision)
    total = sum(e.a.num_bytes + e.b.num_bytes for e in pairs)
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
        bytes_read=total,
        own_bytes=round(total * deal_of(group, mesh).share),
    )
