"""The one loop over layers: each layer's stack is read once and leaves its Statistics behind."""

import dataclasses
import math
import time
import zlib
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import descriptors, distributed, hostmemory, placement, precision, reading, solvers
from jaxsub.linalg import gram as gram_kernels, modes as mode_kernels
from jaxsub.linalg.modes import COLUMNS, MIXTURES
from jaxsub.pipelines import axes, lora
from jaxsub.statistics import KEPT_ENTRIES, Statistics

BESIDE = 8  # times as large as its mixtures is a block that is sketched while the next one is multiplied
HELD_BLOCKS = 2.5  # resident beyond what was before a pass: more is freed memory, which is handed back


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
    open_seconds: float = 0.0
    figure_seconds: float = 0.0
    write_seconds: float = 0.0


def layer_key(name, seed):
    """The layer's own PRNG key: independent of which layers come before, fold_in(seed, crc32(name))."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode("utf-8", "surrogatepass")))


class Ahead:
    """Opens the blocks of dense layers, and keeps those of one layer that are being read before it is its turn."""

    def __init__(self, mesh, options, base=None):
        """Arguments as in `statistics`.

        `following`, where it is set, is called once the last block of a layer is on its devices; with `past_cache`,
        blocks are read past the page cache (`formats.read_into`).
        """
        self.mesh, self.options, self.base = mesh, options, base
        self.begun, self.following, self.past_cache = None, None, False

    def begin(self, group, models):
        """Starts to read a layer's first block; low-rank updates are not read ahead: they are whole in memory."""
        self.close()
        if group.parametrisation != "lora":
            self.begun = (_identity(group), self._open(group, models))

    def take(self, group, models):
        """Blocks of a layer."""
        begun, self.begun = self.begun, None
        if begun is not None and begun[0] == _identity(group):
            return begun[1]
        if begun is not None:
            begun[1].close()
        return self._open(group, models)

    def close(self):
        """Drops what was begun."""
        if self.begun is not None:
            self.begun[1].close()
        self.begun = None

    def _open(self, group, models):
        plan = placement.plan_dense(group, self.mesh.size, self.options, self.base)
        models = [m for _, m in models]
        return reading.Blocks(
            group, models, plan, self.mesh, base=self.base, past_cache=self.past_cache, then=self._then
        )

    def _then(self):
        if self.following is not None:
            self.following()


def _identity(group):
    return group.name, group.shape, group.parametrisation, group.members


def statistics(group, models, mesh, options, *, ahead=None, base=None, meter=None):
    """Statistics of one layer group.

    Args:
        group: LayerGroup; its entries are Tensors (dense) or LoraPairs (lora), one a member.
        models: (id, Model) of each member, same order.
        mesh: mesh with the axis "features".
        options: Options.
        ahead: Ahead that opens the layer's blocks, made with the same mesh, options and base.
        base: Model to subtract from dense layers, or None.
        meter: Meter to add to.

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
    """
    meter, key = meter or Meter(), layer_key(group.name, options.seed)
    with jax.enable_x64(True):
        if group.parametrisation == "lora":
            return lora.statistics(group, models, mesh, options, meter, key)
        return _dense(group, models, mesh, options, ahead or Ahead(mesh, options, base), meter, key)


def _dense(group, models, mesh, options, ahead, meter, key):
    stream = ahead.take(group, models)
    plan, stream = stream.plan, iter(stream)
    ids = tuple(i for i, _ in models)
    stats = Statistics.empty(group.name, plan.shape, "dense", ids, plan.storage, plan.dtype)
    stats.roundings = np.array([precision.rounding(t.dtype) for t in group.entries])
    weights = mode_kernels.mixtures(key, plan.num_models, MIXTURES if plan.sketched_axes else 0)
    sums, adding = _Sums(plan, stats), None
    whole, small = None, plan.num_blocks == 1 and plan.num_models * math.prod(plan.shape) <= KEPT_ENTRIES
    most = hostmemory.resident() + HELD_BLOCKS * plan.block_bytes
    with futures.ThreadPoolExecutor(1) as host:  # adds a block's results up while kernels are at the next one
        while True:
            started = time.perf_counter()
            block = next(stream, None)  # refills the buffer of the last but one
            read = time.perf_counter()
            launched = None if block is None else _launch(block, weights, key, plan, options, mesh)
            whole = block.x if small and block is not None else whole
            if adding is not None:
                adding.result()
            if launched is not None:
                adding = host.submit(sums.add, launched)
                if plan.storage == "float64":  # its factor is of the buffer's own numbers
                    adding.result()
                    stats.add_factor(np.asarray(block.x)[:, : math.prod(block.shape)], block.exponent)
            del launched
            if hostmemory.resident() > most:  # not always: pages handed back must be backed anew, 10 ms for 128 MiB
                hostmemory.trim()
            meter.read_seconds += read - started
            meter.compute_seconds += time.perf_counter() - read
            if block is None:
                break
    if whole is not None and stats.is_heavy():
        stats.keep(_rows(whole, math.prod(plan.shape)))
    meter.bytes_read += plan.bytes_read // plan.num_processes
    total = float(np.trace(stats.centred()))
    stats.base_norm = math.sqrt(sums.base_square)
    if plan.strengths:
        values = solvers.eigvalsh(sums.strengths)[:, ::-1]
        stats.model_singular_values = np.sqrt(np.maximum(values, 0.0))
    with futures.ThreadPoolExecutor(3) as pool:  # LAPACK and malloc release the interpreter lock
        pool.submit(hostmemory.trim)
        sketched = pool.map(lambda item: axes.sketched_mode(*item, total), sums.halves.items())
        stats.modes = (*(axes.exact_mode(axis, plan.shape[axis], k) for axis, k in sums.exact.items()), *sketched)
    if plan.other_side:
        stats.modes = (*stats.modes, axes.exact_mode(0, plan.shape[0], sums.other))
    stats.modes = tuple(sorted(stats.modes, key=lambda m: m.axis))
    if not total and not stats.mean_square:
        stats.exponent = 0  # zeros have no scale
    return stats


def _rows(x, width):
    """The first columns of rows on the mesh, on the host of every process."""
    own = placement.part_here(x, axis=1).astype(np.float64)
    return np.concatenate(distributed.gather(own), axis=1)[:, :width]


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A block's results; the sketches may still be under way on the devices, which no longer read the block."""

    results: tuple  # (DenseSums, sketches of the axes that have one)
    exact: dict
    other: np.ndarray | None
    strengths: np.ndarray | None
    exponent: int
    base_square: float


def _launch(block, weights, key, plan, options, mesh):
    """Runs the kernels of a block, and waits for those that read it; its sketches alone may be made beside the next."""
    dense, mixed = gram_kernels.dense_gram(block.x, weights, mesh=mesh, dtype=plan.dtype)
    tests = ()
    if plan.sketched_axes:
        row = jnp.int32(block.row)
        tests = mode_kernels.sketch(
            mixed, key, row, shape=block.shape, axes=plan.sketched_axes, columns=COLUMNS, mesh=mesh
        )
        if not sketches_beside(plan, mesh):
            jax.block_until_ready(tests)
    del mixed
    exact = {
        axis: np.asarray(
            mode_kernels.mode_gram(
                block.x, shape=block.shape, axis=axis, dtype=_mode_dtype(plan, options, axis), mesh=mesh
            )
        )
        for axis in plan.exact_axes
    }
    other = strengths = None
    if plan.other_side:
        dtype = _mode_dtype(plan, options, 0)
        other = np.asarray(mode_kernels.unfolding_gram(block.x, shape=block.shape, dtype=dtype, mesh=mesh))
    if plan.strengths:
        last = len(plan.shape) == 2 and plan.shape[1] <= plan.shape[0]
        strengths = np.asarray(mode_kernels.model_grams(block.x, shape=block.shape, last=last, mesh=mesh))
    jax.block_until_ready(dense)  # its buffer may now be refilled
    return _Launched((dense, tests), exact, other, strengths, block.exponent, block.base_square)


def sketches_beside(plan, mesh):
    """Whether a block may be sketched while the next one is multiplied.

    Mixtures that are large are not held beside the next block, and programs of many devices take turns.
    """
    wide, stored = 8 if plan.dtype == "float64" else 4, descriptors.numpy_dtype(plan.storage).itemsize
    return mesh.size == 1 and BESIDE * 2 * MIXTURES * wide <= plan.num_models * stored


class _Sums:
    """Host sums over the blocks of a layer, kept at the largest scale that any has had: powers of two, exact."""

    def __init__(self, plan, stats):
        self.stats = stats
        self.exact = {axis: 0.0 for axis in plan.exact_axes}
        self.halves = {axis: [] if axis == 0 else 0.0 for axis in plan.sketched_axes}
        self.other = self.strengths = self.base_square = 0.0
        self.exponent = reading.ZERO_EXPONENT

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
