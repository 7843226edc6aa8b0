"""The plan of an analysis, from headers alone: what is read, in which blocks, and how much memory it takes."""

from jaxsub import errors


def of(groups, mesh, options, base=None):
    """LayerPlans of layer groups on a mesh; `options` is a `layers.Options`, `base` a Model to subtract."""
    from jaxsub import placement
    from jaxsub.pipelines import lora, memory

    def one(group):
        is_lora = group.parametrisation == "lora"
        plan = lora.plan(group, options) if is_lora else placement.plan_dense(group, mesh.size, options, base)
        return memory.of(plan, group, mesh, options, base)

    return [one(g) for g in groups]


def peak(plans):
    """Largest host memory of the analysis, bytes, beyond the program's own."""
    from jaxsub.pipelines import memory

    return memory.peak(plans)


def exceeds(plans, bound):
    """Whether the peak is above a bound of bytes; a bound of 0 is none."""
    return bool(bound) and peak(plans) > bound


def require_memory(plans, bound):
    """Raises ResourceError where a layer needs more than `bound` bytes, or than is free if it is 0."""
    bound = bound or available_bytes()
    if exceeds(plans, bound):
        worst = max(plans, key=lambda p: peak([p]))
        raise errors.ResourceError(
            f"the analysis needs {size(peak(plans))} on the host, layer {errors.quote(worst.name)} alone "
            f"{size(peak([worst]))}; {size(bound)} are allowed or free; allow more with --config.max_host_bytes, "
            "or leave layers out with --exclude_layers"
        )


def text(plans, num_models, num_devices):
    """The plan as a table of at most 100 columns."""
    lines = [f"{num_models} models, {len(plans)} layers, {num_devices} device(s)"]
    lines.append(f"{'layer':42} {'shape':>18} {'models':>7} {'to read':>10} {'blocks':>7} {'host':>10}")
    for p in plans:
        shape = "x".join(map(str, p.shape))
        lines.append(
            f"{errors.quote(p.name, 42):42} {shape:>18} {p.num_models:>7} {size(p.bytes_read):>10} "
            f"{p.num_blocks:>7} {size(peak([p])):>10}"
        )
    total = size(sum(p.bytes_read for p in plans))
    lines.append(f"to read: {total}; peak host memory beyond the program's own: {size(peak(plans))}")
    return "\n".join(lines)


def size(num_bytes):
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def available_bytes():
    """Memory that can be had without swapping, bytes; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
