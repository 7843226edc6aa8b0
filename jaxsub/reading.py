"""From files to devices: the blocks of a layer's stack, read ahead.

    layer group --Blocks--> (N, columns) host buffers --device_put--> rows on the mesh, features sharded

A block holds the same columns of every model. Two buffers: one is read by threads while the other is computed.
"""

import concurrent.futures
import dataclasses
import math
import threading

import jax
import numpy as np

from jaxsub import descriptors, distributed, errors, formats, hostmemory, lineup, placement, precision

ZERO_EXPONENT = -1100  # of a block of zeros: below every other, so that it rescales nothing
READERS = 4  # threads; pread releases the interpreter lock


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a layer: `x` (N, width) on the mesh, `shape` of its tensor part, first row, power-of-two scale.

    The values in `x` are the stored ones times 2**-exponent; `exponent` is 0 unless products could overflow.
    """

    x: jax.Array
    shape: tuple[int, ...]
    row: int
    exponent: int
    base_square: float = 0.0  # sum of the squares of what was subtracted


class NonFiniteError(errors.InputError):
    """A model holds NaN or Inf; `member` is its index in the group."""

    def __init__(self, member, path, key, count, first):
        self.member, self.found = member, (member, count, first)
        found = f"holds NaN or Inf, in {count} of its entries, the first at flat index {first}"
        super().__init__(path, found, key=key, hint="repair or remove the model", rule="N1")


def require_finite(array, member, model, tensor):
    """The array, at least float32 wide; raises NonFiniteError naming the model where it holds a NaN or an Inf."""
    wide = array if array.dtype.itemsize >= 4 else array.astype(np.float32)
    if not np.isfinite(wide).all():
        bad = np.flatnonzero(~np.isfinite(wide.reshape(-1)))
        raise NonFiniteError(member, model.path, tensor.name, len(bad), int(bad[0]))
    return wide


class Blocks:
    """Iterates once over the `Block`s of a dense group in order, the next one being read meanwhile.

    The first is read from now on; `close` ends that where no one asks for it.
    """

    def __init__(self, group, models, plan, mesh, *, base=None, past_cache=False, then=None):
        """Begins to read.

        Args:
            group: LayerGroup with `entries`, one Tensor a member.
            models: the Model of each member, same order.
            plan: LayerPlan of the group.
            mesh: mesh with the axis "features".
            base: Model to subtract, or None; its tensor must have the group's name and shape.
            past_cache: see `formats.read_into`.
            then: called once the last block is on its devices: readers are free, and so is one of the two buffers.

        Raises:
            InputError: the base lacks the tensor.
        """
        self.group, self.plan, self.mesh, self.then = group, plan, mesh, then
        self.window = placement.columns_here(plan.width, mesh)
        self.sources = [Source(m, t, past_cache) for m, t in zip(models, group.entries, strict=True)]
        self.base = Source(base, _base_tensor(base, group)) if base is not None else None
        self.pool = concurrent.futures.ThreadPoolExecutor(READERS)
        self.ahead = concurrent.futures.ThreadPoolExecutor(1)
        self.buffers = [None] * min(plan.num_blocks, 2)
        self.pending = self.ahead.submit(self._fill, 0)

    def close(self):
        """Waits for the block that is being read and drops it; to be called more than once if need be."""
        self.ahead.shutdown(cancel_futures=True)
        self.pool.shutdown(cancel_futures=True)

    def __iter__(self):
        """Yields the blocks.

        Raises:
            NonFiniteError: at the first block with a NaN or an Inf, for the first such model.
        """
        plan, buffers = self.plan, self.buffers
        try:
            for index in range(plan.num_blocks):
                try:
                    filled, failure = self.pending.result(), None
                except errors.InputError as error:
                    filled, failure = (0.0, 0.0), error
                largest, base_square = agree(*filled, failure, self.mesh)
                exponent = _scaled(buffers[index % 2], largest)
                x = placement.put(buffers[index % 2], (plan.num_models, plan.width), self.mesh)
                if index + 1 < plan.num_blocks:
                    self.pending = self.ahead.submit(self._fill, index + 1)
                else:
                    buffers.clear()
                    if self.then is not None:
                        self.then()
                # The consumer waits for a block's results before it asks for the next: then its buffer is refilled.
                rows = min(plan.rows, plan.shape[0] - index * plan.rows)
                block = Block(x, (rows, *plan.shape[1:]), index * plan.rows, exponent, base_square)
                del x
                yield block
                del block
        finally:
            self.close()

    def _fill(self, index):
        if self.buffers[index % 2] is None:
            shape = self.plan.num_models, self.window[1] - self.window[0]
            self.buffers[index % 2] = hostmemory.zeros(shape, descriptors.numpy_dtype(self.plan.storage))
        buffer = self.buffers[index % 2]
        return _fill(buffer, index, self.window, self.sources, self.base, self.plan, self.group, self.pool)


def agree(largest, square, failure, mesh, *, is_shared=False):
    """(largest, sum of squares) over the mesh's processes; raises on all where one has a failure, the same if it can.

    Args:
        largest, square: floats of this process.
        failure: NonFiniteError or InputError of this process, or None.
        mesh: of this process alone, or of all.
        is_shared: whether processes read models whole, some of them the same, instead of columns of their own.
    """
    if not mesh.is_multi_process:
        if failure is not None:
            raise failure
        return largest, square
    bad = isinstance(failure, NonFiniteError)
    numbers = [largest, square, failure is not None and not bad, *(failure.found if bad else ())]
    found = distributed.gather(np.array([*numbers, *[math.inf] * (6 - len(numbers))]))
    if found[:, 2].any():
        distributed.share(None if bad else failure)
    first = int(found[:, 3].min()) if np.isfinite(found[:, 3]).any() else None
    if first is not None:
        same = found[found[:, 3] == first]
        own = distributed.gather_objects([failure.file, failure.key] if bad and failure.member == first else None)
        path, key = next(one for one in own if one)
        count = same[:, 4].max() if is_shared else same[:, 4].sum()
        raise NonFiniteError(first, path, key, int(count), int(same[:, 5].min()))
    return float(found[:, 0].max()), float(found[:, 1].sum())


def _base_tensor(base, group):
    tensor = base.tensors.get(group.name)
    if tensor is None or (tensor.shape or (1,)) != (group.shape or (1,)):
        found = "lacks it" if tensor is None else f"has shape {tensor.shape}"
        raise errors.InputError(
            base.path, f"the base {found}, the models have shape {group.shape}", key=group.name, hint="use --layers"
        )
    return tensor


def threads():
    """Threads that make and write the pieces of a result."""
    return min(hostmemory.cores(), READERS)


def read_stack(group, models):
    """The whole stack of a dense group on the host, (N, *shape) in the widest stored dtype.

    Args:
        group: LayerGroup with `entries`, one Tensor a member.
        models: the Model of each member, same order.

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
        InputError: numbers so large that float64 has no room for sums of them.
    """
    shape = group.shape or (1,)
    dtype = descriptors.numpy_dtype(precision.widest(group.dtypes))
    x = hostmemory.zeros((len(models), math.prod(shape)), dtype)  # a CPU device uses it where it is

    def one(member):
        Source(models[member], group.entries[member]).read(0, x.shape[1], x[member])
        require_finite(x[member], member, models[member], group.entries[member])

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for done in [pool.submit(one, m) for m in range(len(models))]:
            done.result()
    if x.dtype == np.float64:
        require_room(x, models, group.name)
    return x.reshape(len(models), *shape)


def require_room(x, models, layer):
    """Refuses float64 weights x (N, ...) near the end of its range: norms and sums of them are no numbers."""
    if precision.power_of(precision.largest(x)) > precision.ROOM["float64"]:
        sizes = [precision.largest(row) for row in x]
        raise _no_room(models[int(np.argmax(sizes))].path, f"holds entries up to {max(sizes):.3g}", layer)


def _no_room(path, found, layer):
    hint = "scale the model down, or leave the layer out with --exclude_layers"
    return errors.InputError(path, f"{found}, which leave float64 no room for sums", key=layer, hint=hint, rule="N5")


def read_factors(group, models):
    """The factors of a group of low-rank updates, on the host.

    Args:
        group: LayerGroup with `entries`, one LoraPair a member; layers of weights stored transposed have their factors
            turned, so that b_n a_n has the group's shape, all axes but the first flattened.
        models: the Model of each member, same order.

    Returns:
        a (N, r, i), b (N, o, r) in float32 or wider, mixed ranks padded with zeros, and scales (N,) float64.

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
        InputError: updates so large that squares of them are no numbers.
    """
    pairs = group.entries
    wide = "float64" if precision.widest(t.dtype for e in pairs for t in (e.a, e.b)) == "float64" else "float32"
    rank, (size_out, size_in) = max(e.rank for e in pairs), lineup.flat_shape(group.shape)
    a, b = np.zeros((len(pairs), rank, size_in), wide), np.zeros((len(pairs), size_out, rank), wide)
    for n, (model, pair) in enumerate(zip(models, pairs, strict=True)):
        right, left = (require_finite(formats.read(model, t), n, model, t) for t in (pair.a, pair.b))
        if precision.power_of(*map(precision.largest, (right, left)), pair.scale) > precision.ROOM_FOR_SQUARES:
            raise _no_room(model.path, f"holds updates of a scale of {pair.scale:.3g}", group.name)
        if pair.transposed:
            right, left = left.T, right.T
        a[n, : pair.rank], b[n, :, : pair.rank] = (x.reshape(x.shape[0], -1) for x in (right, left))
    return a, b, np.array([e.scale for e in pairs])


def read_factor(model, tensor, member, *, transposed):
    """(r, width) of A (r, *width) or, if `transposed`, of B (width, r, *ones), float32 or as stored if wider."""
    part = require_finite(formats.read(model, tensor), member, model, tensor)
    return part.reshape(tensor.shape[0], -1).T if transposed else part.reshape(tensor.shape[0], -1)


class Source:
    """Rows of one model's tensor; tensors without an extent are loaded once and kept while the layer lasts."""

    def __init__(self, model, tensor, past_cache=False):
        self.model, self.tensor, self.loaded, self.past_cache = model, tensor, None, past_cache
        self.lock = threading.Lock()
        self.dtype = descriptors.numpy_dtype(tensor.dtype)

    def read(self, start, count, out):
        """Copies `count` entries from flat index `start` on into `out` (count,), converting exactly."""
        if self.tensor.extent is not None and out.dtype == self.dtype:
            formats.read_into(self.tensor.extent, start * self.dtype.itemsize, out.view(np.uint8), self.past_cache)
        elif self.tensor.extent is not None:
            raw = np.empty(count, self.dtype)
            formats.read_into(self.tensor.extent, start * self.dtype.itemsize, raw.view(np.uint8), self.past_cache)
            out[:] = raw
        else:
            with self.lock:
                if self.loaded is None:
                    self.loaded = np.ascontiguousarray(formats.read(self.model, self.tensor)).reshape(-1)
            out[:] = self.loaded[start : start + count]


def _fill(buffer, index, window, sources, base, plan, group, pool):
    """Reads and checks the columns `window` of block `index` into `buffer`; returns (bound on entries, base square)."""
    row = index * plan.rows
    rows = min(plan.rows, plan.shape[0] - row)
    per_row = math.prod(plan.shape[1:])
    start, count = row * per_row + window[0], max(0, min(window[1], rows * per_row) - window[0])
    reference, base_square = None, 0.0
    if base is not None:
        reference = np.empty(count, descriptors.numpy_dtype(base.tensor.dtype))
        base.read(start, count, reference)
        reference = reference.astype(buffer.dtype)  # exact: the buffer's dtype holds both
        base_square = float(np.square(reference, dtype=np.float64).sum())
        if not math.isfinite(base_square):
            raise errors.InputError(base.model.path, "the base holds NaN, Inf or numbers near them", key=group.name)

    def one(member):
        target = buffer[member, :count]
        sources[member].read(start, count, target)
        if reference is None and target.dtype == np.float32 and count:
            # One fast pass tells almost always that all is finite and of a size that needs no scaling.
            with np.errstate(over="ignore", invalid="ignore"):
                square = float(np.dot(target, target)) / count
            if 4.0**-precision.SAFE_EXPONENT <= square <= 2.0**precision.SAFE_EXPONENT:
                return math.sqrt(square)
        wide = target if target.dtype.itemsize >= 4 else target.astype(np.float32)
        low, high = (float(wide.min()), float(wide.max())) if count else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = np.flatnonzero(~np.isfinite(wide))
            return NonFiniteError(member, sources[member].model.path, group.name, len(bad), start + int(bad[0]))
        if reference is not None:
            np.subtract(target, reference, out=target)  # exact for neighbours (Sterbenz), else one rounding
            low, high = float(target.min()), float(target.max())
        return max(-low, high)

    # A few models a task: handing over single ones costs as much as reading them where blocks are small.
    spans = np.array_split(np.arange(plan.num_models), min(plan.num_models, 4 * READERS))
    results = [r for span in pool.map(lambda span: [one(int(m)) for m in span], spans) for r in span]
    for result in results:
        if isinstance(result, NonFiniteError):
            raise result
    buffer[:, count:] = 0
    return max(results, default=0.0), base_square


def _scaled(buffer, largest):
    """Scales a block by a power of two where products could overflow; returns its exponent."""
    exponent = math.frexp(largest)[1]
    if largest == 0.0:
        exponent = ZERO_EXPONENT
    elif abs(exponent) <= precision.SAFE_EXPONENT or buffer.dtype == np.float16:  # float16 reaches no unsafe square
        exponent = 0
    elif buffer.dtype.itemsize >= 4:
        np.ldexp(buffer, -exponent, out=buffer)
    else:
        for model in buffer:
            model[:] = np.ldexp(model.astype(np.float32), -exponent)  # a power of two: exact
    return exponent
