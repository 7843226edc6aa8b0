"""The plan of a merge, from headers alone: what is read and written, and the memory of the layer that needs most."""

import dataclasses
import math
import os
import textwrap

from jaxsub import descriptors, placement, precision, rows
from jaxsub.formats import _files
from jaxsub.pipelines import memory, plan
from jaxsub.rows import files, lora

RUNTIME_BYTES = memory.RUNTIME_BYTES + 80 * 2**20  # kernels of each shape, scratch of the threads that read and write
BLOCKS = 3  # of all models that a kernel holds beside those that are read, unless its method says more
LOSS = 4  # models in memory beside the N of a loss: the merged one, its gradient, moments


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What merging one layer takes; bytes. `device_bytes` are on CPU a part of `host_bytes`; `kept_bytes` stay."""

    name: str
    shape: tuple[int, ...]
    num_models: int
    bytes_read: int
    host_bytes: int
    device_bytes: int
    written: int
    reads: int
    kept_bytes: int = 0


def of(found, sources, module, *, has_loss=False):
    """LayerPlans of a `merge_layers.Lineup` for a method's module."""
    template = sources.opened.models[found.template]
    return [_layer(layer, sources, module, template, has_loss) for layer in found.layers]


def _layer(layer, sources, module, template, has_loss):
    group, count = layer.group, len(sources.opened.refs)
    size, bytes_read = math.prod(group.shape), group.num_bytes
    item = 8 if precision.widest(group.dtypes) == "float64" else 4
    most = getattr(module, "READS", 1)
    if layer.is_lora:
        o, i = group.shape[0], size // group.shape[0]
        factors = count * max(e.rank for e in group.entries) * (o + i)
        host, reads, written = (3 * item + 32) * factors, 1, factors * 8  # as read and scaled; bases, cores in float64
        if getattr(module, "IS_ENTRYWISE", False):
            host += rows.BLOCK_BYTES * 2 + size * (3 * item + (7 * 8 if min(o, i) <= lora.EXACT else 2 * item))
        device, kept = host // 2, factors * 4
    else:
        has_base = sources.base is not None
        host, reads = _dense(size, count, has_base, item, most, getattr(module, "BLOCKS", BLOCKS))
        if sources.statistics:
            host *= 2
        if len(group.shape) == 2 and hasattr(module, "held"):
            host, reads = module.held(group.shape, count, item), most
        device, kept = host, (count + LOSS) * size * 4
        written = size * descriptors.numpy_dtype(template.tensors[layer.name].dtype).itemsize
        if has_base:
            bytes_read += sources.base.tensors[layer.name].num_bytes
        if getattr(module, "MANY", False):
            host, reads = host + 2 * size * item, 2
    if sources.bundle is not None:
        host = max(host, 3 * count * size * item)
    kept = kept if has_loss else 0
    return LayerPlan(group.name, group.shape, len(group.members), bytes_read, host, device, written, reads, kept)


def _dense(size, count, has_base, item, most, beside):
    """(bytes, reads) of a method that goes block by block, needs the layer `most` times and holds `beside` blocks."""
    width = rows.block_width(size, count, item)
    block, blocks = (count + has_base) * width * item, -(-size // width)
    is_kept = blocks * block <= files.KEPT_BYTES
    buffers = blocks if is_kept else min(blocks, 2)
    columns = beside * count + 6  # masks and draws of the models, and results
    return block * buffers + columns * width * item, 1 if is_kept else most


def peak(plans):
    """Largest host memory of the merge, bytes, beyond the program's own."""
    return RUNTIME_BYTES + max(p.host_bytes for p in plans) + sum(p.kept_bytes for p in plans)


def require_memory(plans, config):
    """Raises ResourceError, naming the layer that needs most, where memory does not do."""
    worst = max(plans, key=lambda p: p.host_bytes)
    cure = "allow more with --max_host_bytes, take one that goes block by block (mean, ties), or leave the layer out"
    of = " beside what is kept of other layers" if peak(plans) > peak([worst]) else ""
    plan.require_host_memory(worst.name, peak(plans), config.max_host_bytes, f"{cure} with --exclude_layers", of)


def written(plans, found, sources):
    """Bytes of the new model, roughly: as the template's."""
    template = sources.opened.models[found.template]
    merged = sum(p.written for p in plans)
    names = {layer.name for layer in found.layers}
    copied = sum(t.num_bytes for name, t in template.tensors.items() if name not in names)
    return merged + copied


def require_disk(folder, plans, found, sources):
    """Raises ResourceError where the new model does not fit on the disk, beside what a killed run has left there."""
    there = sum(plan.bytes_in(os.path.join(folder, name)) for name in ("model", "layers"))
    needed = written(plans, found, sources)
    if there < needed:
        free = _files.free_bytes(folder)
        if free is not None and needed > free:
            plan.require_disk(folder, needed)


def text(plans, found, sources, *, most=None):
    """The plan as a table of at most 100 columns and its sums; `most` layers are listed, None for all."""
    lines = [f"{len(sources.opened.refs)} models, {len(plans)} layers to merge"]
    lines += plan.listing(plans, most, "reads", lambda p: f"{p.reads:>6} {plan.size(p.host_bytes):>10}")
    lines.append(plan.to_read(sum(p.bytes_read * p.reads for p in plans)))
    lines += plan.memory_lines(peak(plans), max(p.device_bytes for p in plans), placement.make_mesh(1, is_local=True))
    lines.append(f"to write: about {plan.size(written(plans, found, sources))}")
    return "\n".join([*lines, *(textwrap.fill(one, 100) for one in found.said)])
