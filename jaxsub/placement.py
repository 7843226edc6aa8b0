"""From files to devices: the mesh, the memory plan, and the blocks of a layer's stack, read ahead.

    layer group --blocks--> (N, columns) host buffers --device_put--> rows on the mesh, features sharded

A block holds the same columns of every model. Two buffers: one is read by threads while the other is computed.
"""

import concurrent.futures
import dataclasses
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import descriptors, distributed, errors, formats, hostmemory, lineup, precision
from jaxsub.linalg.gram import FEATURES
from jaxsub.linalg.modes import MIXTURES

ZERO_EXPONENT = -1100  # of a block of zeros: below every other, so that it rescales nothing
READERS = 4  # threads; pread releases the interpreter lock


def make_mesh(num_devices=None):
    """One-dimensional mesh over the first `num_devices` devices (all by default), axis "features"."""
    devices = jax.devices()
    count = len(devices) if num_devices in (None, 0) else num_devices
    if count > len(devices):
        raise errors.ConfigError(f"devices={count}, but JAX sees {len(devices)} ({devices[0].platform})")
    if count < len(devices) and jax.process_count() > 1:
        raise errors.ConfigError(f"devices={count}: a run of several processes takes all {len(devices)} devices")
    return jax.sharding.Mesh(np.asarray(devices[:count]), (FEATURES,))


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one layer is read and computed; all sizes known from headers.

    `rows` leading-axis rows of every model make a block of `width` columns (padded); `exact_axes` get a full mode
    Gram, `sketched_axes` a sketch; `strengths` says whether each model's own singular values are taken.
    """

    name: str
    shape: tuple[int, ...]
    num_models: int
    storage: str
    dtype: str
    rows: int
    width: int
    num_blocks: int
    exact_axes: tuple[int, ...]
    other_side: bool
    sketched_axes: tuple[int, ...]
    strengths: bool
    bytes_read: int
    pass_bytes: int = 0  # of the host, while the layer is read and summed
    num_processes: int = 1  # that share a block
    figure_bytes: int = 0  # of the host, while its figures are made
    kept_bytes: int = 0  # of the host, its statistics until the report is made
    device_bytes: int = 0  # of one device, while the layer is summed
    written_bytes: int = 0  # of its statistics file

    @property
    def block_bytes(self):
        """Bytes of one block as it is stored, of this process's columns."""
        return self.num_models * self.width // self.num_processes * descriptors.numpy_dtype(self.storage).itemsize


def plan_dense(group, num_devices, options, base=None):
    """LayerPlan of a dense group; `options` is a `layers.Options`, `base` a Model to subtract or None."""
    shape = group.shape or (1,)
    num_models, size = len(group.members), math.prod(shape)
    storage = precision.widest(t.dtype for t in group.entries)
    if base is not None:  # differences need more digits than the weights they are of
        own = (t.dtype for n, t in base.tensors.items() if n == group.name and t.is_float)
        dtypes = {storage, "float32", *own}
        storage = precision.widest(dtypes)
    dtype = precision.compute_dtype(storage, num_models**2 * size, options.precision)
    itemsize = descriptors.numpy_dtype(storage).itemsize
    row = size // shape[0] if shape[0] else 0
    axes = tuple(a for a in range(len(shape)) if len(shape) > 1 and shape[a] > 1)
    cheap = {a for a in axes if num_models * size * shape[a] <= options.mode_work and shape[a] <= options.mode_width}
    # The other side of the leading axis' unfolding, (N * rest)^2, is additive over rows and small where rest is.
    side = num_models * row
    other = 0 in axes and side <= options.mode_width and shape[0] * side**2 <= options.mode_work
    rows = _rows(shape[0], row * num_models * itemsize, options.block_bytes)
    wanting = {*axes} - {0} if other else {*axes}  # what only a sketch can serve where it is not cheap
    if not wanting <= cheap or (0 in wanting and rows < shape[0]):  # mixtures of few models outgrow their block
        mixtures = 2 * MIXTURES * (8 if dtype == "float64" else 4)
        rows = _rows(shape[0], row * max(num_models * itemsize, mixtures), options.block_bytes)
    num_blocks = max(1, -(-shape[0] // rows))
    exact = tuple(a for a in axes if a in cheap and (num_blocks == 1 or a > 0))
    other = other and 0 not in exact
    sketched = tuple(a for a in axes if a not in exact and not (other and a == 0))
    short = len(shape) == 2 and min(shape) <= options.strength_width
    strengths = short and (num_blocks == 1 or shape[1] <= shape[0])
    return LayerPlan(
        name=group.name,
        shape=shape,
        num_models=num_models,
        storage=storage,
        dtype=dtype,
        rows=rows,
        width=num_devices * -(-rows // num_devices) * row if other else _bucket(rows * row, num_devices),
        num_blocks=num_blocks,
        exact_axes=exact,
        other_side=other,
        sketched_axes=sketched,
        strengths=strengths,
        bytes_read=sum(t.num_bytes for t in group.entries),
        num_processes=jax.process_count(),
    )


def _rows(length, row_bytes, block_bytes):
    """Rows a block: at most `block_bytes` if one row fits, alike where that can be, so that one shape is compiled."""
    most = max(1, min(length, block_bytes // max(1, row_bytes)))
    return max(1, -(-length // max(1, -(-length // most))))


def _bucket(columns, num_devices):
    """Columns padded so that few distinct shapes are compiled: a power of two, or a multiple of 64 chunks."""
    step = 64 * num_devices
    if columns <= 65536:
        power = 1 << max(0, columns - 1).bit_length()
        return -(-max(power, step) // step) * step
    step = math.lcm(step, 4096 * num_devices)
    return -(-columns // step) * step


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
        found = f"entries that are not finite: {count}, the first at flat index {first}"
        super().__init__(path, found, key=key, hint="repair or remove the model", rule="N1")


def require_finite(array, member, model, tensor):
    """The array, at least float32 wide; raises NonFiniteError naming the model where it holds a NaN or an Inf."""
    wide = array if array.dtype.itemsize >= 4 else array.astype(np.float32)
    if not np.isfinite(wide).all():
        bad = np.flatnonzero(~np.isfinite(wide.reshape(-1)))
        raise NonFiniteError(member, model.path, tensor.name, len(bad), int(bad[0]))
    return wide


def blocks(group, models, plan, mesh, *, base=None, past_cache=False):
    """Yields the `Block`s of a dense group in order, the next one being read meanwhile.

    Args:
        group: LayerGroup with `entries`, one Tensor a member.
        models: the Model of each member, same order.
        plan: LayerPlan of the group.
        mesh: mesh with the axis "features".
        base: Model to subtract, or None; its tensor must have the group's name and shape.
        past_cache: see `formats.read_into`.

    Raises:
        NonFiniteError: at the first block with a NaN or an Inf, for the first such model.
    """
    window = columns_here(plan.width, mesh)
    sources = [_Source(m, t, past_cache) for m, t in zip(models, group.entries, strict=True)]
    base_source = _Source(base, _base_tensor(base, group)) if base is not None else None
    dtype = descriptors.numpy_dtype(plan.storage)
    buffers = [
        hostmemory.zeros((plan.num_models, window[1] - window[0]), dtype) for _ in range(min(plan.num_blocks, 2))
    ]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool, concurrent.futures.ThreadPoolExecutor(1) as ahead:

        def fill(index):
            return _fill(buffers[index % 2], index, window, sources, base_source, plan, group, pool)

        pending = ahead.submit(fill, 0)
        for index in range(plan.num_blocks):
            try:
                filled, failure = pending.result(), None
            except errors.InputError as error:
                filled, failure = (0.0, 0.0), error
            largest, base_square = agree(*filled, failure)
            exponent = _scaled(buffers[index % 2], largest)
            x = put(buffers[index % 2], (plan.num_models, plan.width), mesh)
            if index + 1 < plan.num_blocks:
                pending = ahead.submit(fill, index + 1)
            # The consumer waits for the block's results before it asks for the next: only then is the buffer refilled.
            rows = min(plan.rows, plan.shape[0] - index * plan.rows)
            yield Block(x, (rows, *plan.shape[1:]), index * plan.rows, exponent, base_square)


def columns_here(width, mesh):
    """(first, end) of the columns of a sharded axis of `width` that this process's devices hold."""
    if jax.process_count() == 1:
        return 0, width
    own = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
    if own != list(range(own[0], own[0] + len(own))):
        raise errors.ConfigError("the devices of a process do not follow each other in the mesh")
    return own[0] * width // mesh.size, (own[-1] + 1) * width // mesh.size


def put(local, shape, mesh):
    """An array of `shape` on the mesh, its last axis sharded, from the columns of this process."""
    sharding = NamedSharding(mesh, P(*[None] * (len(shape) - 1), FEATURES))
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    return jax.make_array_from_process_local_data(sharding, local, shape)


def agree(largest, square, failure):
    """(largest, sum of squares) over all processes; raises on all where one has a failure, as the same error if it can.

    Args:
        largest, square: floats of this process.
        failure: NonFiniteError or InputError of this process, or None.
    """
    if jax.process_count() == 1:
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
        raise NonFiniteError(first, path, key, int(same[:, 4].sum()), int(same[:, 5].min()))
    return float(found[:, 0].max()), float(found[:, 1].sum())


def _base_tensor(base, group):
    tensor = base.tensors.get(group.name)
    if tensor is None or (tensor.shape or (1,)) != (group.shape or (1,)):
        found = "lacks it" if tensor is None else f"has shape {tensor.shape}"
        raise errors.InputError(
            base.path, f"the base {found}, the models have shape {group.shape}", key=group.name, hint="use --layers"
        )
    return tensor


def read_stack(group, models):
    """The whole stack of a dense group on the host, (N, *shape) in the widest stored dtype.

    Args:
        group: LayerGroup with `entries`, one Tensor a member.
        models: the Model of each member, same order.

    Raises:
        NonFiniteError: naming the first model with a NaN or an Inf.
    """
    shape = group.shape or (1,)
    x = np.empty((len(models), math.prod(shape)), descriptors.numpy_dtype(precision.widest(group.dtypes)))

    def one(member):
        _Source(models[member], group.entries[member]).read(0, x.shape[1], x[member])
        require_finite(x[member], member, models[member], group.entries[member])

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for done in [pool.submit(one, m) for m in range(len(models))]:
            done.result()
    return x.reshape(len(models), *shape)


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
    """
    pairs = group.entries
    wide = "float64" if precision.widest(t.dtype for e in pairs for t in (e.a, e.b)) == "float64" else "float32"
    rank, (size_out, size_in) = max(e.rank for e in pairs), lineup.flat_shape(group.shape)
    a, b = np.zeros((len(pairs), rank, size_in), wide), np.zeros((len(pairs), size_out, rank), wide)
    for n, (model, pair) in enumerate(zip(models, pairs, strict=True)):
        right, left = (require_finite(formats.read(model, t), n, model, t) for t in (pair.a, pair.b))
        if pair.transposed:
            right, left = left.T, right.T
        a[n, : pair.rank], b[n, :, : pair.rank] = (x.reshape(x.shape[0], -1) for x in (right, left))
    return a, b, np.array([e.scale for e in pairs])


def read_columns(model, tensor, member, first, end, *, leading):
    """(r, columns) of A (r, width), of B (width, r) if `leading`: columns first to end, fewer where it ends before."""
    rank = tensor.shape[1] if leading else tensor.shape[0]
    first, end = (min(at, tensor.size // rank) for at in (first, end))
    source = _Source(model, tensor)
    part = np.empty((end - first, rank) if leading else (rank, end - first), source.dtype)
    if leading or end - first == tensor.size // rank:
        source.read(first * rank, part.size, part.reshape(-1))
    else:
        for row, out in enumerate(part):
            source.read(row * (tensor.size // rank) + first, out.size, out)
    part = require_finite(part, member, model, tensor)
    return part.T if leading else part


class _Source:
    """Rows of one model's tensor; tensors without an extent are loaded once and kept while the layer lasts."""

    def __init__(self, model, tensor, past_cache=False):
        self.model, self.tensor, self.loaded, self.past_cache = model, tensor, None, past_cache
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
