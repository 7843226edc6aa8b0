"""The plan of an analysis, from headers alone: what is read, in which blocks, memory, disk and time that it takes."""

import os
import resource
import sys

from jaxsub import errors, hostmemory
from jaxsub.formats import _files
from jaxsub.report import words

LISTED = 20  # layers of the plan before a run


def of(groups, mesh, options, base=None):
    """LayerPlans of layer groups on a mesh; `options` is a `layers.Options`, `base` a Model to subtract."""
    from jaxsub import placement
    from jaxsub.pipelines import lora, memory

    def one(group):
        is_lora = group.parametrisation == "lora"
        plan = lora.plan(group, mesh, options) if is_lora else placement.plan_dense(group, mesh.size, options, base)
        return memory.of(plan, group, mesh, options, base)

    return [one(g) for g in groups]


def peak(plans):
    """Largest host memory of the analysis, bytes, beyond the program's own."""
    from jaxsub.pipelines import memory

    return memory.peak(plans)


def device_peak(plans):
    """Largest memory of any one device, bytes."""
    return max((p.device_bytes for p in plans), default=0)


def device_limit(mesh):
    """Bytes that JAX may take of a device with memory of its own, the least of this process's; 0 on CPU."""
    import jax

    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index() and d.platform != "cpu"]
    return min(((d.memory_stats() or {}).get("bytes_limit", 0) for d in own), default=0)


def exceeds(plans, bound, device_bound=0):
    """Whether the host's peak or a device's is above its bound of bytes; a bound of 0 is none."""
    return bool(bound) and peak(plans) > bound or bool(device_bound) and device_peak(plans) > device_bound


def require_memory(plans, bound, device_bound=0):
    """Raises ResourceError where a layer needs more than `bound` bytes of the host, or than are free if it is 0, or
    more than `device_bound` of a device (0: no bound).
    """
    bound = bound or available_bytes()
    if exceeds(plans, bound):
        worst = max(plans, key=lambda p: peak([p]))
        raise errors.ResourceError(
            f"the analysis needs {size(peak(plans))} on the host, layer {errors.quote(worst.name)} alone "
            f"{size(peak([worst]))}; {size(bound)} are allowed or free; allow more with --max_host_bytes, "
            "or leave layers out with --exclude_layers"
        )
    require_device_memory(max(plans, key=lambda p: p.device_bytes, default=None), device_bound)


def require_host_memory(name, num_bytes, bound, cure, of=""):
    """Raises ResourceError, naming the layer and the cure, where it needs more than `bound`; 0: than is free."""
    free = bound or available_bytes()
    if free and num_bytes > free:
        needed = f"layer {errors.quote(name)} needs {size(num_bytes)} on the host{of}"
        raise errors.ResourceError(f"{needed}, {size(free)} are allowed or free; {cure}")


def require_device_memory(worst, bound):
    """Raises ResourceError where `worst`, what needs most (its `name` and `device_bytes`), needs more than `bound`."""
    if bound and worst is not None and worst.device_bytes > bound:
        raise errors.ResourceError(
            f"layer {errors.quote(worst.name)} needs {size(worst.device_bytes)} on a device, {size(bound)} are allowed "
            "or there; allow more with --max_device_bytes, take more devices, or leave it out with --exclude_layers"
        )


def require_disk(folder, num_bytes):
    """Raises ResourceError where `num_bytes` are to be written to a folder and fewer are free there."""
    free = _files.free_bytes(folder)
    if free is not None and num_bytes > free:
        raise errors.ResourceError(
            f"{errors.quote(folder)}: about {size(num_bytes)} are to be written ({num_bytes} bytes), {size(free)} are "
            f"free there ({free} bytes); make room, or give another folder"
        )


def bytes_in(folder):
    """Bytes of the files in a folder, or 0 where there is none."""
    return sum(e.stat().st_size for e in os.scandir(folder) if e.is_file()) if os.path.isdir(folder) else 0


def text(plans, num_models, mesh, time=(), *, workdir=None, most=None):
    """The plan as a table of at most 100 columns, and its sums.

    Args:
        plans: LayerPlans with their bytes.
        num_models: of the collection.
        mesh: devices.
        time: (Seconds, Rates) of `estimate`, or nothing.
        workdir: folder that is written to, or None.
        most: layers to list; None for all.
    """
    import jax

    lines = [f"{num_models} models, {len(plans)} layers, {mesh.size} device(s)"]
    lines += listing(plans, most, "blocks", lambda p: f"{p.num_blocks:>6} {size(peak([p])):>10}")
    spared = workdir is not None and os.path.isdir(os.path.join(workdir, "statistics"))
    note = ", but for layers whose statistics in the workdir still hold" if spared else ""
    total, own = (sum(getattr(p, name) for p in plans) for name in ("bytes_read", "own_bytes"))
    lines.append(to_read(total, own, jax.process_count()) + note)
    lines += memory_lines(peak(plans), device_peak(plans), mesh)
    if workdir is not None:
        from jaxsub.pipelines import memory

        statistics, report = memory.written(plans, num_models)
        lines.append(f"to write: up to about {size(statistics)} of statistics, about {size(report)} of report")
    else:
        lines.append("to write: nothing without --workdir")
    return "\n".join([*lines, *(time_lines(*time) if time else [])])


def listing(plans, most, head, middle):
    """The table of a plan's layers, as lines of at most 100 columns.

    Args:
        plans: with name, shape, num_models, bytes_read and device_bytes.
        most: layers to list; None for all.
        head: of the column before the last two.
        middle: function of a plan, its text in that column (6 wide) and in that of the host's memory (10 wide).
    """
    columns = f"{'shape':>15} {'models':>6} {'to read':>10} {head:>6} {'host':>10} {'a device':>10}"
    lines = [f"{'layer':37} {columns}"]
    names = words.columns([p.name for p in plans[:most]], 37)
    for name, p in zip(names, plans[:most], strict=True):
        shape = "x".join(map(str, p.shape))
        lines.append(
            f"{name} {shape:>15} {p.num_models:>6} {size(p.bytes_read):>10} {middle(p)} {size(p.device_bytes):>10}"
        )
    if len(plans[:most]) < len(plans):
        lines.append(f"... and {len(plans) - len(plans[:most])} more, which --dry_run lists")
    return lines


def to_read(num_bytes, own=0, processes=1):
    """The line about the bytes of weights that are read: of all, and `own` by one process."""
    shared = f", {size(own)} by each of {processes} processes" if processes > 1 else ""
    return f"to read: {size(num_bytes)}{shared}"


def memory_lines(host, device, mesh):
    """Lines about the peaks of memory, bytes; on CPU the devices' is the host's, and is not to be added."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    note = " (on CPU a part of the host's)" if on_cpu else ""
    return [
        f"peak host memory beyond the program's own: {size(host)}",
        f"peak device memory, on each of {mesh.size}: {size(device)}{note}",
    ]


def time_lines(seconds, rates):
    """Lines about the time, from `estimate.Seconds` and `estimate.Rates`."""
    read = f"{duration(seconds.read)} at {rate(rates.read)}" if rates.read else "of files that are not raw, unknown"
    return [
        f"time, about {duration(seconds.total)}; reading {read}, products {duration(seconds.compute)}"
        f" at {rates.product / 1e9:.0f} GFLOP/s, figures {duration(seconds.figures)}",
        f"  (from {size(rates.sampled)} of the files, no weight whole, and one small product; compiling comes on top)",
    ]


def duration(seconds):
    """Seconds for people: 0.3 s, 12 s, 4 min, 2.5 h."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def rate(bytes_a_second):
    """Bytes a second for people, in powers of ten as drives are sold: 1.25 GB/s."""
    return f"{bytes_a_second / 1e9:.2f} GB/s" if bytes_a_second >= 1e7 else f"{bytes_a_second / 1e6:.2f} MB/s"


def size(num_bytes):
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def available_bytes():
    """Memory that this process can have without swapping, bytes; 0 where the system does not say.

    Processes of one run share what their machine has.
    """
    from jaxsub import distributed

    return hostmemory.available() // distributed.processes_here()


def total_bytes():
    """Memory of the machine, bytes; 0 where the system does not say."""
    return hostmemory.total()


def outgrows_cache(num_bytes):
    """Whether the page cache would not hold so much for the next read either."""
    total = total_bytes()
    return bool(total) and num_bytes > total / 2


def peak_resident():
    """Largest memory that this process has held so far, bytes."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # ru_maxrss is that of the parent too, after a fork
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
