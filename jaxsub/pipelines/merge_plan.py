"""The plan of a merge, from headers alone: what is read and written, and the memory of the layer that needs most."""

import dataclasses
import math
import os
import textwrap

from jaxsub import descriptors, errors, placement, precision, rows
from jaxsub.formats import _files
from jaxsub.pipelines import memory, plan
from jaxsub.rows import files


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What merging one layer takes; bytes. `device_bytes` are on CPU a part of `host_bytes`."""

    name: str
    shape: tuple[int, ...]
    num_models: int
    bytes_read: int
    host_bytes: int
    device_bytes: int
    written: int
    reads: int


def of(found, sources, module):
    """LayerPlans of a `merge_layers.Lineup` for a method's module."""
    template = sources.opened.models[found.template]
    return [_layer(layer, sources, module, template) for layer in found.layers]


def _layer(layer, sources, module, template):
    group, count = layer.group, len(sources.opened.refs)
    has_base = sources.base is not None and not layer.is_lora
    size, bytes_read = math.prod(group.shape), group.num_bytes
    item = 8 if precision.widest(group.dtypes) == "float64" else 4
    held = getattr(module, "held", None)
    is_matrix = len(group.shape) == 2 and held is not None
    if layer.is_lora:
        o, i = group.shape[0], size // group.shape[0]
        rank = max(e.rank for e in group.entries)
        factors = count * rank * (o + i)
        host = item * 3 * factors + 8 * 4 * factors  # as read and scaled; bases and cores in float64
        whole = getattr(module, "IS_ENTRYWISE", False)
        host += (item * 3 * size + rows.BLOCK_BYTES * 2) if whole else 0
        device, reads, written = host // 2, 1, factors * 8
    else:
        width = rows.block_width(size, count, item)
        block = (count + has_base) * width * item
        blocks = -(-size // width)
        is_kept = blocks * block <= files.KEPT_BYTES
        reads = 1 if is_kept else getattr(module, "READS", 1)
        host = block * (blocks if is_kept and getattr(module, "READS", 1) > 1 else min(blocks, 2)) + 6 * width * item
        if is_matrix:
            host = held(count) * size * item
            reads = getattr(module, "READS", 1)
        device = host
        written = size * descriptors.numpy_dtype(template.tensors[layer.name].dtype).itemsize
        if has_base:
            bytes_read += sources.base.tensors[layer.name].num_bytes
    if sources.bundle is not None:
        host = max(host, 3 * count * size * item)
    return LayerPlan(group.name, group.shape, len(group.members), bytes_read, host, device, written, reads)


def peak(plans):
    """Largest host memory of the merge, bytes, beyond the program's own."""
    return memory.RUNTIME_BYTES + max(p.host_bytes for p in plans)


def require_memory(plans, config):
    """Raises ResourceError, naming the layer that needs most, where memory does not do."""
    free = config.max_host_bytes or plan.available_bytes()
    if free and peak(plans) > free:
        worst = max(plans, key=lambda p: p.host_bytes)
        raise errors.ResourceError(
            f"layer {errors.quote(worst.name)} needs {plan.size(peak([worst]))} on the host, {plan.size(free)} are "
            "allowed or free; allow more with --max_host_bytes, take one that goes block by block (mean, ties), or "
            "leave the layer out with --exclude_layers"
        )


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
