"""The one loop over layers: each layer's stack is read once and leaves its Statistics behind."""

import dataclasses
import functools
import math
import time
import zlib
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import descriptors, formats, placement, precision
from jaxsub.linalg import gram as gram_kernels, modes as mode_kernels
from jaxsub.linalg.gram import FEATURES
from jaxsub.linalg.modes import COLUMNS, MIXTURES
from jaxsub.statistics import ModeEnergies, Statistics

TRIM_EVERY = 4  # blocks: what is handed back must be backed with pages anew, 10 ms a block of 128 MiB


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the bits of a layer's statistics, beside the weights and the mesh."""

    precision: str = "auto"  # auto, float32 or float64: dtype of the products (float64 weights always keep theirs)
    block_bytes: int = 128 * 2**20  # stored bytes of one block of a stack
    mode_work: int = 2**36  # multiply-adds (N * D * d) above which a weight axis of size d is sketched
    mode_width: int = 2048  # axes wider than this are sketched
    strength_width: int = 128  # matrices with a shorter side up to this keep each model's singular values
    seed: int = 0


@dataclasses.dataclass
class Meter:
    """Bytes and seconds of a run, for the report's provenance."""

    bytes_read: int = 0
    read_seconds: float = 0.0
    compute_seconds: float = 0.0


def layer_key(name, seed):
    """The layer's own PRNG key: independent of which layers come before, fold_in(seed, crc32(name))."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode("utf-8", "surrogatepass")))


def statistics(group, models, mesh, options, *, base=None, meter=None):
    """Statistics of one layer group.

    Args:
        group: LayerGroup; its entries are Tensors (dense) or LoraPairs (lora), one a member.
        models: (id, Model) of each member, same order.
        mesh: mesh with the axis "features".
        options: Options.
        base: Model to subtract from dense layers, or None.
        meter: Meter to add to.

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
    """
    meter = meter or Meter()
    with jax.enable_x64(True):
        if group.parametrisation == "lora":
            return _lora(group, models, mesh, options, meter)
        return _dense(group, models, mesh, options, base, meter)


def _dense(group, models, mesh, options, base, meter):
    plan = placement.plan_dense(group, mesh.size, options, base)
    ids = tuple(i for i, _ in models)
    stats = Statistics.empty(group.name, plan.shape, "dense", ids, plan.storage, plan.dtype)
    key = layer_key(group.name, options.seed)
    stats.roundings = np.array([precision.rounding(t.dtype) for t in group.entries])
    weights = mode_kernels.mixtures(key, plan.num_models, MIXTURES if plan.sketched_axes else 0)
    sums = _Sums(plan, stats)
    stream = placement.blocks(group, [m for _, m in models], plan, mesh, base=base)
    before, count = None, 0
    while True:
        started = time.perf_counter()
        if before is not None:
            jax.block_until_ready(before.results)  # only then may its buffer be refilled
        ready = time.perf_counter()
        block = next(stream, None)
        read = time.perf_counter()
        launched = None if block is None else _launch(block, weights, key, plan, options, mesh)
        # The devices are at work again: now the host adds up what the block before left.
        if before is not None:
            sums.add(before)
        if launched is not None and plan.storage == "float64":  # its factor is of the buffer's own numbers
            sums.add(launched)
            stats.add_factor(np.asarray(block.x)[:, : math.prod(block.shape)], block.exponent)
            launched = None
        before, count = launched, count + 1
        if count % TRIM_EVERY == 1:
            placement.trim()
        meter.read_seconds += read - ready
        meter.compute_seconds += ready - started + time.perf_counter() - read
        if block is None:
            break
    placement.trim()
    meter.bytes_read += plan.bytes_read
    total = float(np.trace(stats.centred()))
    stats.base_norm = math.sqrt(sums.base_square)
    if plan.strengths:
        values = np.linalg.eigvalsh(sums.strengths)[:, ::-1]
        stats.model_singular_values = np.sqrt(np.maximum(values, 0.0))
    with futures.ThreadPoolExecutor(2) as pool:  # LAPACK releases the interpreter lock
        sketched = pool.map(lambda item: _sketched_mode(*item, total), sums.halves.items())
        stats.modes = (*(_exact_mode(axis, plan.shape[axis], k) for axis, k in sums.exact.items()), *sketched)
    if plan.other_side:
        stats.modes = (*stats.modes, _exact_mode(0, plan.shape[0], sums.other))
    stats.modes = tuple(sorted(stats.modes, key=lambda m: m.axis))
    if not total and not stats.mean_square:
        stats.exponent = 0  # zeros have no scale
    return stats


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A block's results; `results` may still be under way on the devices, the rest is on the host."""

    results: tuple  # (DenseSums, sketches of the axes that have one)
    exact: dict
    other: np.ndarray | None
    strengths: np.ndarray | None
    exponent: int
    base_square: float


def _launch(block, weights, key, plan, options, mesh):
    """Starts the kernels of a block; waits for those of exact mode Grams only, whose temporaries would add up."""
    dense, mixed = gram_kernels.dense_gram(block.x, weights, mesh=mesh, dtype=plan.dtype)
    tests = ()
    if plan.sketched_axes:
        row = jnp.int32(block.row)
        tests = mode_kernels.sketch(mixed, key, row, shape=block.shape, axes=plan.sketched_axes, columns=COLUMNS)
    del mixed  # it may be as large as a block: not to be held beside the next one
    exact = {
        axis: np.asarray(
            mode_kernels.mode_gram(block.x, shape=block.shape, axis=axis, dtype=_mode_dtype(plan, options, axis))
        )
        for axis in plan.exact_axes
    }
    other = strengths = None
    if plan.other_side:
        dtype = _mode_dtype(plan, options, 0)
        other = np.asarray(mode_kernels.unfolding_gram(block.x, shape=block.shape, dtype=dtype))
    if plan.strengths:
        last = len(plan.shape) == 2 and plan.shape[1] <= plan.shape[0]
        strengths = np.asarray(mode_kernels.model_grams(block.x, shape=block.shape, last=last))
    return _Launched((dense, tests), exact, other, strengths, block.exponent, block.base_square)


class _Sums:
    """Host sums over the blocks of a layer, kept at the largest scale that any has had: powers of two, exact."""

    def __init__(self, plan, stats):
        self.stats = stats
        self.exact = {axis: 0.0 for axis in plan.exact_axes}
        self.halves = {axis: [] if axis == 0 else 0.0 for axis in plan.sketched_axes}
        self.other = self.strengths = self.base_square = 0.0
        self.exponent = placement.ZERO_EXPONENT

    def add(self, found):
        """Adds a block's _Launched."""
        if found.exponent > self.exponent:
            self._rescale(max(self.exponent - found.exponent, -2000))
            self.exponent = found.exponent
        step = max(found.exponent - self.exponent, -2000)
        dense, tests = found.results
        self.stats.add(jax.device_get(dense), found.exponent)
        self.exact = {axis: _plus(k, found.exact[axis], 2 * step) for axis, k in self.exact.items()}
        if found.other is not None:
            self.other = _plus(self.other, found.other, 2 * step)
        if found.strengths is not None:
            self.strengths = _plus(self.strengths, found.strengths, 2 * step)
        for (axis, half), test in zip(self.halves.items(), tests, strict=True):
            self.halves[axis] = [*half, _plus(0.0, test, step)] if axis == 0 else _plus(half, test, step)
        self.base_square += found.base_square

    def _rescale(self, down):
        self.exact = {axis: np.ldexp(k, 2 * down) for axis, k in self.exact.items()}
        self.other, self.strengths = np.ldexp(self.other, 2 * down), np.ldexp(self.strengths, 2 * down)
        for axis, half in self.halves.items():
            self.halves[axis] = [np.ldexp(t, down) for t in half] if axis == 0 else np.ldexp(half, down)


def _plus(total, found, power):
    """total + found * 2**power in float64, in place where `total` is an array; it may be the number 0."""
    found = np.asarray(found)
    if power:
        found = np.ldexp(found.astype(np.float64), power)
    if isinstance(total, np.ndarray):
        return np.add(total, found, out=total)
    return total + found.astype(np.float64)


def _mode_dtype(plan, options, axis):
    work = plan.num_models * math.prod(plan.shape) * plan.shape[axis]
    return precision.compute_dtype(plan.storage, work, options.precision)


def _exact_mode(axis, size, k, *, centred=True):
    values = np.maximum(np.linalg.eigvalsh(k)[::-1], 0.0)[:size]
    return ModeEnergies(axis, size, values, float(np.trace(k)), 0, centred)


def _sketched_mode(axis, halves, total, *, centred=True):
    """Energies of directions found in one half of a sketch and measured in the other, both ways, averaged."""
    first, second = np.concatenate(halves, axis=1) if isinstance(halves, list) else np.asarray(halves)
    shares = sum(_cross_shares(first, second)) / 2
    return ModeEnergies(axis, first.shape[0], total * shares, total, first.shape[1], centred)


def _cross_shares(first, second):
    """Shares of each half (size, columns) along the directions found in the other."""
    size, columns = first.shape
    if columns <= size:  # from inner products of test columns: directions are combinations of them
        grams, across = (first.T @ first, second.T @ second), first.T @ second
        return _shares(grams[0], across, grams[1]), _shares(grams[1], across.T, grams[0])
    grams = first @ first.T, second @ second.T
    return _shares(grams[0], None, grams[1]), _shares(grams[1], None, grams[0])


def _shares(found, across, scored):
    """Shares of the scored half's energy along the directions found in the other, strongest first.

    Args:
        found, scored: the halves' Gram matrices, of test columns where `across` is given, else of rows.
        across: inner products of the found half's test columns with the scored half's.
    """
    values, vectors = np.linalg.eigh(found)
    values, vectors = values[::-1], vectors[:, ::-1]
    keep = values > values[0] * 1e-10 if values[0] > 0 else np.zeros(len(values), bool)
    if across is None:
        energy = np.einsum("dj,dj->j", vectors, scored @ vectors)
    else:
        energy = np.square(across.T @ vectors).sum(axis=0) / np.where(keep, values, 1.0)
    total = np.trace(scored)
    return energy * keep / total if total > 0 else energy * 0.0


def _lora(group, models, mesh, options, meter):
    started = time.perf_counter()
    pairs = group.entries
    storage = precision.widest(t.dtype for e in pairs for t in (e.a, e.b))
    ranks = np.array([e.rank for e in pairs])
    rank = int(ranks.max())
    width_a, width_b = math.prod(pairs[0].a.shape[1:]), pairs[0].b.shape[0]
    work = len(pairs) ** 2 * rank**2 * (width_a + width_b)
    dtype = precision.compute_dtype(storage, work, options.precision)
    read_dtype = descriptors.numpy_dtype("float64" if storage == "float64" else "float32")
    a = placement.zeros((len(pairs), rank, padded(width_a, mesh)), read_dtype)
    bt = placement.zeros((len(pairs), rank, padded(width_b, mesh)), read_dtype)
    for n, ((_, model), pair) in enumerate(zip(models, pairs, strict=True)):
        a[n, : pair.rank, :width_a] = require_finite(formats.read(model, pair.a), n, model, pair.a).reshape(
            pair.rank, width_a
        )
        b = require_finite(formats.read(model, pair.b), n, model, pair.b).reshape(width_b, pair.rank)
        bt[n, : pair.rank, :width_b] = b.T
    scales = np.array([e.scale for e in pairs])
    common = math.frexp(float(np.abs(scales).max()))[1]
    common = common if abs(common) > precision.SAFE_EXPONENT else 0
    scales = np.ldexp(scales, -common)
    powers = [_safe_exponent(x) for x in (a, bt)]
    for x, power in zip((a, bt), powers, strict=True):
        if power:
            np.ldexp(x, -power, out=x)
    meter.read_seconds += time.perf_counter() - started
    meter.bytes_read += sum(e.a.num_bytes + e.b.num_bytes for e in pairs)

    started = time.perf_counter()
    sharding = NamedSharding(mesh, P(None, None, FEATURES))
    factors = [jax.device_put(x, sharding) for x in (a, bt)]
    sums = jax.device_get(gram_kernels.lora_gram(*factors, mesh=mesh, dtype=dtype))
    outer = scales[:, None] * scales[None, :]
    stats = Statistics.empty(group.name, pairs[0].shape, "lora", tuple(i for i, _ in models), storage, dtype)
    stats.exponent = sum(powers) + common
    stats.roundings = np.array([max(precision.rounding(t.dtype) for t in (e.a, e.b)) for e in pairs])
    stats.gram = sums.gram * outer
    stats.row_sums = scales * np.einsum("nr,nr->n", a.sum(axis=2, dtype=np.float64), bt.sum(axis=2, dtype=np.float64))
    stats.variance_squares = stats.deviation_fourths = math.nan  # not to be had from the factors alone
    stats.row_fourths = np.full(len(pairs), math.nan)
    stats.ranks, stats.a_width = ranks.astype(np.float64), width_a
    stats.b_overlap = sums.b_overlap * outer**2
    stats.b_norms = np.sqrt(np.trace(sums.b_gram, axis1=1, axis2=2)) * np.abs(scales)
    norms = np.sqrt(np.maximum(np.diag(sums.a_cosines), 1e-300))
    stats.a_cosines = sums.a_cosines / norms[:, None] / norms[None, :]
    roots_a, roots_b = _roots(sums.a_gram), _roots(sums.b_gram)
    cores = np.linalg.svd(roots_b @ roots_a, compute_uv=False)
    stats.model_singular_values = cores * np.abs(scales)[:, None]
    sides = ((factors[0], roots_b, width_a, True), (factors[1], roots_a, width_b, False))
    key = layer_key(group.name, options.seed)
    found = [_lora_mode(x, root, scales, width, side, group, options, key) for x, root, width, side in sides]
    stats.modes = tuple(sorted(found, key=lambda m: m.axis))
    meter.compute_seconds += time.perf_counter() - started
    return stats


def _lora_mode(x, roots, scales, width, is_input, group, options, key):
    """Energies of C_in = sum s^2 A.T (B.T B) A or C_out = sum s^2 B (A A.T) B.T; uncentred, as centring factors
    would depend on the gauge. From the rows (B.T B)^(1/2) A, never from a matrix of updates."""
    rows, total = _weighted_rows(roots * scales[:, None, None], x, width)
    total = float(total)
    transposed = group.entries[0].transposed
    axis = 1 if is_input != transposed else 0
    if mode_is_exact(*rows.shape, options):
        values = np.asarray(_row_energies(rows))[::-1]
        return ModeEnergies(axis, width, np.maximum(values, 0.0), total, 0, False)
    test = jax.random.normal(jax.random.fold_in(key, axis), (2, rows.shape[0], MIXTURES * COLUMNS), dtype=rows.dtype)
    tests = np.asarray(jnp.einsum("rw,hrc->hwc", rows, test, precision="highest"), np.float64)
    return _sketched_mode(axis, tests, total, centred=False)


def mode_is_exact(num_rows, width, options):
    """Whether the energies of (num_rows, width) rows are taken from their Gram matrix, not from a sketch."""
    shorter = min(num_rows, width)
    return num_rows * width * shorter <= options.mode_work and shorter <= options.mode_width


@functools.partial(jax.jit, static_argnames="width")
def _weighted_rows(roots, x, width):
    """Rows (N * r, width) of the products, and the sum of their squares in float64."""
    rows = jnp.einsum("nrs,nsw->nrw", roots.astype(x.dtype), x, precision="highest")
    return rows[:, :, :width].reshape(-1, width), jnp.sum(jnp.square(rows.astype(jnp.float64)))


@jax.jit
def _row_energies(rows):
    rows = rows.astype(jnp.float64)
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    return jnp.linalg.eigvalsh(gram)


def _roots(grams):
    values, vectors = np.linalg.eigh(grams)
    return np.einsum("nij,nj,nkj->nik", vectors, np.sqrt(np.maximum(values, 0.0)), vectors)


def padded(width, mesh):
    """Columns of a factor with the zeros that make it divisible among devices."""
    return -(-width // (8 * mesh.size)) * 8 * mesh.size


def _safe_exponent(x):
    largest = max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))
    exponent = math.frexp(largest)[1]
    return exponent if largest and abs(exponent) > precision.SAFE_EXPONENT // 2 else 0


def require_finite(array, member, model, tensor):
    """The array, at least float32 wide; raises NonFiniteError naming the model where it holds a NaN or an Inf."""
    wide = array if array.dtype.itemsize >= 4 else array.astype(np.float32)
    if not np.isfinite(wide).all():
        bad = np.flatnonzero(~np.isfinite(wide.reshape(-1)))
        raise placement.NonFiniteError(member, model, tensor.name, len(bad), int(bad[0]))
    return wide


def plan_lora(group, options):
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
