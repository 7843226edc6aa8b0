"""Where a layer's stack lies: the mesh, the columns of each process and device, and the plan of its blocks."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import descriptors, distributed, errors, hostmemory, precision
from jaxsub.linalg.gram import FEATURES
from jaxsub.linalg.modes import MIXTURES


def make_mesh(num_devices=None, *, is_local=False, axis=FEATURES):
    """One-dimensional mesh over the first `num_devices` devices (all by default), by its axis; `is_local`: ours."""
    devices = jax.local_devices() if is_local else jax.devices()
    count = len(devices) if num_devices in (None, 0) else num_devices
    if count > len(devices):
        raise errors.ConfigError(f"devices={count}, but JAX sees {len(devices)} ({devices[0].platform})")
    if count < len(devices) and jax.process_count() > 1 and not is_local:
        raise errors.ConfigError(f"devices={count}: a run of several processes takes all {len(devices)} devices")
    return jax.sharding.Mesh(np.asarray(devices[:count]), (axis,))


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
    own_bytes: int  # that one process reads, the most of any
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
    total = sum(t.num_bytes for t in group.entries)
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
        bytes_read=total,
        own_bytes=-(-total // jax.process_count()),
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


def span(mesh):
    """(first, end) of the devices of the mesh that are this process's."""
    own = devices_here(mesh)
    if own != list(range(own[0], own[0] + len(own))):
        raise errors.ConfigError("the devices of a process do not follow each other in the mesh")
    return own[0], own[-1] + 1


def devices_here(mesh):
    """Numbers of the devices of the mesh that are this process's."""
    return [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]


def columns_here(width, mesh):
    """(first, end) of the columns of a sharded axis of `width` that this process's devices hold."""
    return tuple(at * width // mesh.size for at in span(mesh))


def put(local, shape, mesh, axis=-1):
    """An array of `shape` on the mesh, one axis sharded, from the columns or rows of this process."""
    sharding = NamedSharding(mesh, P(*[None] * (axis % len(shape)), FEATURES))
    if not mesh.is_multi_process:
        return jax.device_put(local, sharding)
    return jax.make_array_from_process_local_data(sharding, local, shape)


def deal(x, models, dealt, mesh):
    """An array (P * held, ...) on the mesh: of each device the models that it holds.

    Args:
        x: (n, ...) host array, the models of this process.
        models: (n,) their numbers, ascending; with all that this process' devices hold, see `Deal.read_by`.
        dealt: linalg.pairs.Deal.
        mesh: mesh with an axis "features".
    """
    parts = []
    for number in devices_here(mesh):
        at, part = np.searchsorted(models, dealt.models(number)), x
        if not np.array_equal(at, np.arange(len(x))):
            part = np.take(x, at, axis=0, out=hostmemory.zeros((len(at), *x.shape[1:]), x.dtype))
        parts.append(jax.device_put(part, mesh.devices.flat[number]))
    shape = mesh.size * dealt.held, *x.shape[1:]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P(FEATURES)), parts)


def whole(x):
    """An array with a sharded first axis as one host array, on every process; each holds as many rows as another."""
    return distributed.gather(part_here(x)).reshape(x.shape)


def part_here(x, axis=0):
    """The part of an array with one sharded axis that this process' devices hold, on the host."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[axis].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards], axis=axis)
