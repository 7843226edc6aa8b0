"""The plan of a fit, from headers alone: what is read, the memory of the host and of the device, what is written.

A layer's stack is whole on the devices, a large one shared by them (`sharing`).
One that would not fit is streamed where it can be, else the fit is refused.
"""

import dataclasses
import heapq
import math
import os

import jax

from jaxsub import collection, descriptors, errors, lineup, placement, precision
from jaxsub.decompositions import _fit
from jaxsub.linalg import leading, mode_gram, ranking
from jaxsub.pipelines import estimate, fit_streamed, plan, sharing

# Bytes of compiled kernels and libraries, and of each further shape of layers: half-way between a first start, which
# compiles them, and a later one, which finds them in the cache; 30 to 60 MiB either way.
ROW_KERNELS, ROW_SHAPE, LARGE_ROWS = 61 * 2**20, 17 * 2**20, 8 * 2**20  # the last of large layers
KERNELS, SHAPE, LARGE = 148 * 2**20, 33 * 2**20, 31 * 2**20  # of Tucker fits; LARGE by the square of further axes
LAPACK_COPIES = 1.9  # of a stack of float64 rows, by its SVD
FACTOR_COPIES, SWEEP_COPIES = 2, 5.5  # of low-rank updates' factors in the products' dtype, and where sweeps follow
SQUARES = 32  # bytes for each entry of the largest Gram matrix: itself, scaled, and what LAPACK takes
PROGRAM = 12  # the same for each further program that makes it


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What the fit of one layer takes; bytes. `device_bytes` are on each device, on CPU a part of `host_bytes`."""

    name: str
    shape: tuple[int, ...]
    num_models: int
    bytes_read: int
    host_bytes: int
    device_bytes: int
    bundle_bytes: int  # mean, directions and coefficients; 0 where the spectra decide
    kernel_bytes: int = 0  # compiled for all layers of its kind and shape together
    base_bytes: int = 0  # compiled for all layers of its kind
    is_streamed: bool = False  # block by block, in two reads


def of(groups, modules, config):
    """LayerPlans of layer groups, `modules` their decompositions, on a mesh of one device."""
    return [of_layer(g, m, config) for g, m in zip(groups, modules, strict=True)]


def mesh_of(group, module):
    """The mesh that holds a group's stack; rows of float64 are decomposed by LAPACK, on one device."""
    is_by_rows = by_rows(group, module)
    if is_by_rows and "float64" in group.dtypes:
        return placement.make_mesh(1, is_local=True)
    return sharing.mesh(len(group.members), group.shape, stored_bytes(group), by_rows=is_by_rows)


def by_rows(group, module):
    """Whether a decomposition takes the models of a group as rows of features."""
    return group.parametrisation != lineup.LORA and hasattr(module, "BY_ROWS")


def require_rank(groups, modules, config):
    """Raises ConfigError, before anything is read, for a rank that centred models of a layer cannot have."""
    for group, module in zip(groups, modules, strict=True):
        cap = len(group.members) - 1
        if config.rank > cap and by_rows(group, module) and not hasattr(module, "CUTS_RANK"):
            raise errors.ConfigError(
                f"rank={config.rank}: layer {errors.quote(group.name)} has {cap + 1} models, which have at most {cap} "
                "components about their mean; take fewer, or leave the layer whole with --exclude_layers"
            )


def stored_bytes(group):
    """Bytes of a group's stack as it is read; of low-rank updates, of their factors."""
    wide = descriptors.numpy_dtype(precision.widest(group.dtypes)).itemsize
    if group.parametrisation != lineup.LORA:
        return len(group.members) * math.prod(group.shape) * wide
    rank = max(e.rank for e in group.entries)
    return max(wide, 4) * len(group.members) * rank * sum(lineup.flat_shape(group.shape))


def of_layer(group, module, config):
    """LayerPlan of one layer group; streamed where its whole stack is more than may be, and it can be."""
    count, size = len(group.members), math.prod(group.shape)
    of_rows, is_lora = by_rows(group, module), group.parametrisation == lineup.LORA
    wide = max(descriptors.numpy_dtype(precision.widest(group.dtypes)).itemsize, 4)
    stack, kept = stored_bytes(group), 0
    if of_rows and config.rank:
        each = wide if not config.basis_dtype else 1 if config.basis_dtype == "int8" else 2
        kept = (1 + min(config.rank, count - 1)) * size * each + count * config.rank * wide
    mesh = mesh_of(group, module)
    if is_lora:
        device = _updates(group, module, stack)
    else:
        device = stack + count * size * wide + (_rows if of_rows else _tucker)(group, module, config, wide)
    if mesh.size > 1 and not (of_rows or is_lora):
        device += mesh.size * 2 * size * wide  # the mean, and what its rounding left of it, on each
    # One CPU device works on the host's stack in place.
    on_host = mesh.devices.flat[0].platform == "cpu"
    host = (stack if mesh.size > 1 or is_lora or not on_host else 0) + on_host * device
    # Of large layers more: other kernels, and what malloc keeps; of several axes products with each left out.
    axes = 2 if is_lora else len(group.shape)
    base, most = (ROW_KERNELS, LARGE_ROWS) if of_rows else (KERNELS, LARGE * max(axes - 1, 1) ** 2)
    kernels = (ROW_SHAPE if of_rows else SHAPE) + min(3 * stack, most)
    share = device // mesh.size
    found = LayerPlan(group.name, group.shape, count, group.num_bytes, host, share, kept, kernels, base)
    bound = config.max_device_bytes or plan.device_limit(placement.make_mesh(1, is_local=True))
    is_too_large = peak([found]) > fit_streamed.allowed(config) or (bound and share > bound)
    if not (is_too_large and fit_streamed.can(group, config)):
        return found
    block, host = fit_streamed.block_bytes(config), fit_streamed.peak(group, config.rank or 1, config)
    more = {"bytes_read": 2 * group.num_bytes, "host_bytes": host, "is_streamed": True}
    more |= {"kernel_bytes": 0, "base_bytes": fit_streamed.KERNELS}
    more["device_bytes"] = 4 * block // jax.local_device_count()
    return dataclasses.replace(found, **more)


def _updates(group, module, stack):
    """Bytes that factors of low-rank updates take on the device, their own among them."""
    shape, rank = lineup.flat_shape(group.shape), max(e.rank for e in group.entries)
    stored = "float64" if "float64" in group.dtypes else "float32"
    is_wider = stored != _fit.dtype_of_updates(stored, len(group.members), rank, shape)
    copies = SWEEP_COPIES if "sweeps" in _options(module) else FACTOR_COPIES
    return int(copies * stack * (1 + is_wider)) + SQUARES * max(shape) ** 2


def _options(module):
    return {f.name: f.default for f in dataclasses.fields(module.Options)}


def _rows(group, module, config, wide):
    """Bytes that principal components of rows take beside the stack and its centred copy."""
    count, size = len(group.members), math.prod(group.shape)
    if "float64" in group.dtypes:
        return int(LAPACK_COPIES * count * size * wide)
    rank = min(config.rank, count) or count * config.energy / 2  # where spectra decide, a guess
    options = _options(module)
    if "oversample" in options:  # its long test vectors, drawn, multiplied and orthonormalised
        return int(7 * (rank + options["oversample"]) * size * wide)
    return int(rank * size * wide)


def _tucker(group, module, config, wide):
    """Bytes that factors of weight axes take beside the stack and its centred copy."""
    count, shape = len(group.members), group.shape or (1,)
    energies = [config.energy] * len(shape)
    if "error" in _options(module):  # each axis that shares what the fit may lose has an equal part of it
        sharing = ranking.sharing(shape, range(len(shape)))
        energies = [1 - (1 - config.energy) / len(sharing) if a in sharing else 1.0 for a in range(len(shape))]
    ranks = [min(config.rank, d) if config.rank else math.ceil(e * d) for d, e in zip(shape, energies, strict=True)]
    shares = [k / d for k, d in zip(ranks, shape, strict=True)]
    share = math.prod(shares) if "ranks" in _options(module) else max(shares)  # some reduce one axis
    kept = count * math.prod(shape) * share
    # After the others an axis may be longer than what is left is wide, and needs no Gram matrix.
    later = [d for d, own in zip(shape, shares, strict=True) if 4 * kept <= own * d**2 and d > min(shape)]
    side = max(d for d in shape if not (hasattr(module, "SHRINKS") and d in later))
    is_cpu = jax.default_backend() == "cpu"
    programs = mode_gram.num_programs(side, count * math.prod(shape) // max(side, 1)) if is_cpu else 1
    by_iteration = config.rank and leading.are_few(side, config.rank)  # without LAPACK
    squares = (SQUARES // (2 if by_iteration else 1) + PROGRAM * (programs - 1)) * side**2
    # Cores of all models, and of half of them in float64; of noise more than of what has structure. Sweeps hold the
    # stack without one axis.
    swept = kept / min(shares) if "sweeps" in _options(module) else 0
    return int(((2 if config.rank else 1) * kept + swept) * wide) + squares


def deal(groups, count):
    """[which of `count` processes fits each group]: the largest first, each to the one with the fewest bytes so far."""
    owners, loads = [0] * len(groups), [(0, process) for process in range(count)]
    for index in sorted(range(len(groups)), key=lambda i: -groups[i].num_bytes):  # ties stay in their order
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + groups[index].num_bytes, owners[index]))
    return owners


def peak(plans):
    """Largest host memory of the fit, bytes, beyond the program's own: its kernels, layers so far, and the largest."""
    kernels = {(p.num_models, p.shape, p.kernel_bytes): p.kernel_bytes for p in plans}
    known = max(p.base_bytes for p in plans) + sum(kernels.values()) + sum(p.bundle_bytes for p in plans)
    return known + max(p.host_bytes - p.bundle_bytes for p in plans)


def require_memory(plans, config):
    """Raises ResourceError, naming the layer that needs most, where the host's or the device's memory does not do."""
    free, worst = config.max_host_bytes or plan.available_bytes(), max(plans, key=lambda p: p.host_bytes)
    cure = "allow more with --max_host_bytes, or leave it whole with --exclude_layers"
    plan.require_host_memory(worst.name, peak([worst]), free, cure)
    if free and peak(plans) > free:
        raise errors.ResourceError(
            f"all layers together need {plan.size(peak(plans))} on the host, with kernels of each shape and layers "
            f"that are finished, {plan.size(free)} are allowed or free; allow more with --max_host_bytes, or fit "
            "fewer layers at a time with --layers"
        )
    bound = config.max_device_bytes or plan.device_limit(placement.make_mesh(1, is_local=True))
    plan.require_device_memory(max(plans, key=lambda p: p.device_bytes), bound)


def require_disk(plans, opened, config, folder):
    """Raises ResourceError where the layers' parts in `folder`, and the bundle of them, do not fit on the disk.

    Of layers whose ranks their spectra decide nothing is known before they are read. None writes nothing.
    """
    if folder is not None:
        known = min(config.budget_bytes, _stored(opened)) or sum(p.bundle_bytes for p in plans)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        saved = sum(plan.bytes_in(os.path.join(folder, name, "layers")) for name in names)
        plan.require_disk(os.path.dirname(folder), 2 * known - saved)


def _stored(opened):
    """Bytes of all tensors of a collection."""
    pairs = [t for m in opened.models for pair in m.adapters.values() for t in (pair.a, pair.b)]
    return sum(t.num_bytes for m in opened.models for t in m.tensors.values()) + sum(t.num_bytes for t in pairs)


def text(plans, groups, opened, config, *, most=None):
    """The plan as a table of at most 100 columns and its sums; reads no weight whole.

    Args:
        plans: LayerPlans.
        groups: their LayerGroups.
        opened: the Collection.
        config: Config of the fit.
        most: layers to list; None for all.
    """
    lines = plan.listing(plans, most, "reads", lambda p: f"{1 + p.is_streamed:>6} {plan.size(p.host_bytes):>10}")
    mesh, passes = placement.make_mesh(is_local=True), 2 if config.budget_bytes else 1
    num_bytes = passes * sum(p.bytes_read for p in plans)
    lines.append(plan.to_read(num_bytes) + (", in two passes" if passes > 1 else ""))
    count = jax.process_count()
    if count > 1:
        owners = deal(groups, count)
        loads = [sum(p.bytes_read for p, o in zip(plans, owners, strict=True) if o == one) for one in range(count)]
        num_bytes = passes * max(loads)
        lines.append(
            f"{count} processes share the layers, each fits whole ones: one reads {plan.size(num_bytes)} at most"
        )
    lines += plan.memory_lines(peak(plans), plan.device_peak(plans), mesh)
    lines.append(_to_write(plans, groups, opened, config))
    rates = estimate.measure(groups, opened.models, mesh)
    if rates.read:
        lines.append(
            f"time, an estimate: reading {plan.duration(num_bytes / rates.read)} at {plan.rate(rates.read)};"
            " decompositions come on top\n"
            f"  (from {plan.size(rates.sampled)} of the files, no weight whole)"
        )
    return "\n".join(lines)


def _to_write(plans, groups, opened, config):
    """The line about the bundle's size."""
    if config.budget_bytes:
        return f"to write: at most {plan.size(config.budget_bytes)}"
    covered = sum(t.num_bytes for g in groups for e in g.entries for t in collection.stored_tensors(e))
    whole = f"at most {plan.size(_stored(opened) - covered)} of tensors kept whole"
    if not all(p.bundle_bytes for p in plans):
        return f"to write: {whole}; of layers as much as their spectra ask for"
    return f"to write: about {plan.size(sum(p.bundle_bytes for p in plans))} of layers, {whole}"
