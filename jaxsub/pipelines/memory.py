"""Memory of a layer on the host and on each device, from its plan: the arrays that are held together when most are.

    host   = RUNTIME + statistics of all layers + the larger of (the pass over one layer, figures of layers at once)
    device = blocks + the results of one + what a kernel adds; on CPU a part of the former

Follows the code of `reading.Blocks`, `layers`, `linalg` and `figures`; a change of what they hold belongs here too.
Right to -10 (where figures of several layers decide, -20) and +25 % for one CPU device, which a test measures; an upper
bound where devices have memory of their own.
"""

import dataclasses
import itertools
import math

from jaxsub import descriptors, placement, reading
from jaxsub.linalg import gram, modes, secular, symmetric
from jaxsub.pipelines import figures, kinship, layers, lora
from jaxsub.statistics import KEPT_ENTRIES, QR_ENTRIES

RUNTIME_BYTES = 48 * 2**20  # compiled kernels, threads, and what malloc keeps of arrays that are gone
LORA_BYTES = 32 * 2**20  # more compiled kernels, of low-rank updates
SMALL_BYTES = 2**16  # keys, sums of columns and the like on a device
SKETCH_BYTES = 14 * 2**20  # compiling a sketch of one axis
BLOCKS_BYTES = 10 * 2**20  # compiling the products of an axis with itself in blocks
OTHER_BYTES = 22 * 2**20  # compiling the products of an axis' other side, and what threads then keep
SKETCHES = 2 * modes.MIXTURES
TESTS = SKETCHES * modes.COLUMNS  # columns of both halves of a sketch
DRAW = 10  # matrices (N, N) of a thread that draws and judges a null
ARENAS, MOST = 6, 200 * 2**20  # matrices that malloc keeps of all draws, and bytes of them: large ones it gives back
HEADER_BYTES, ID_BYTES = 1800, 12  # of a statistics file: names of its arrays, and of a model
REPORT_BYTES, REPORT_LAYER = 50_000, 20_000  # of the report without models: the page itself, and each layer's card
SECULAR = 22  # work arrays of secular.BLOCK_ELEMENTS


def of(plan, group, mesh, options, base=None):
    """The LayerPlan with its bytes; `group`, `mesh`, `options` and `base` are those that it was made for."""
    is_lora = group.parametrisation == "lora"
    found, kept = _lora(plan, group, mesh, options) if is_lora else _dense(plan, group, mesh, base)
    return dataclasses.replace(
        plan,
        pass_bytes=found,
        figure_bytes=_figures(plan.num_models),
        kept_bytes=kept,
        device_bytes=_lora_device(plan, group, mesh, options) if is_lora else _dense_device(plan, mesh),
        written_bytes=_written(plan, group, options),
    )


def peak(plans):
    """Host bytes of an analysis of several layers, beyond the program's own."""
    if not plans:
        return 0
    together = figures.threads(max(p.num_models for p in plans))
    together = sorted((p.figure_bytes for p in plans), reverse=True)[:together]
    passes = [p.pass_bytes + _ahead(p, following) for p, following in itertools.pairwise([*plans, None])]
    return RUNTIME_BYTES + sum(p.kept_bytes for p in plans) + max(sum(together), *passes)


def _ahead(plan, following):
    """Bytes of the next layer's first block, read while the last is computed, beyond the buffer that is then free."""
    if following is None:
        return 0
    return max(0, following.block_bytes - (min(plan.num_blocks, 2) - 1) * plan.block_bytes)


def _dense(plan, group, mesh, base):
    """Bytes of the pass over a dense layer, and of its statistics."""
    n, width, shape = plan.num_models, plan.width, plan.shape
    stored, wide = descriptors.numpy_dtype(plan.storage).itemsize, 8 if plan.dtype == "float64" else 4
    rest = math.prod(shape[1:])
    block = plan.block_bytes

    held = min(plan.num_blocks, 2) * block
    if mesh.size > 1:
        held += block  # the columns of one device do not lie together: device_put copies
    if any(t.extent is None for t in group.entries):
        held += n * math.prod(shape) * stored  # loaded whole, and kept while the layer lasts
    if stored == 2 or any(t.dtype != plan.storage for t in group.entries):
        held += min(reading.READERS, n) * width * 4  # what a reader converts
    if base is not None:
        held += width * (stored + 8)  # the base's rows and their squares

    # Results, summed over blocks.
    exact = [8 * shape[a] ** 2 for a in plan.exact_axes] + [8 * (n * rest) ** 2] * plan.other_side
    short = 8 * n * min(shape) ** 2 if plan.strengths else 0
    tests = sum(8 * TESTS * shape[a] for a in plan.sketched_axes)
    sums = sum(exact) + short + tests

    # What each step over a block adds to them.
    pieces = gram.num_pieces(width // mesh.size, mesh)
    steps = [pieces * (2 * wide * n * min(width, gram.PRODUCT) + 8 * 8 * n**2)]
    if plan.sketched_axes:
        mixed = wide * SKETCHES * width
        now = sum(8 * TESTS * (plan.rows if a == 0 else shape[a]) for a in plan.sketched_axes)
        steps[0] += mixed * min(pieces, 2)  # in pieces, and joined
        steps.append(mixed + 2 * now + max(_sketch(plan, axis) for axis in plan.sketched_axes) * wide)
    steps += [3 * m + 3 * 8 * width for m in exact]  # a model and the mean in float64
    if plan.strengths:
        steps.append(2 * short + 2 * 8 * width)
    if plan.storage == "float64":
        steps.append(5 * 8 * n * min(width, max(4 * n, QR_ENTRIES // n)))
    # The last block may be a shape of its own.
    kernels = SKETCH_BYTES * len(plan.sketched_axes) * (2 if shape[0] % plan.rows else 1)
    kernels += BLOCKS_BYTES * sum(shape[a] >= symmetric.HALVES for a in plan.exact_axes)
    kernels += OTHER_BYTES * plan.other_side
    after = max([8 * TESTS * shape[0] if 0 in plan.sketched_axes else 0, 2 * short, *(3 * m for m in exact)])

    kept = 8 * n**2 * (2 if plan.storage == "float64" else 1) + (8 * n * min(shape) if plan.strengths else 0)
    kept += _entries(plan)
    return max(held + sums + max(steps), sums + after) + kernels, kept


def _entries(plan):
    """Bytes of a small layer's entries, which are kept if a few of them carry much."""
    size = plan.num_models * math.prod(plan.shape)
    return 2 * size if size <= KEPT_ENTRIES else 0


def _dense_device(plan, mesh):
    """Bytes of one device in the pass over a dense layer: it holds its share of the columns, and all of the results."""
    n, width, shape = plan.num_models, -(-plan.width // mesh.size), plan.shape
    size, block = math.prod(shape) // shape[0] * plan.rows if shape[0] else 0, plan.block_bytes // mesh.size
    wide = 8 if plan.dtype == "float64" else 4
    mixed = wide * SKETCHES * width if plan.sketched_axes else 0
    tests = sum(wide * TESTS * (plan.rows if a == 0 else shape[a]) for a in plan.sketched_axes)
    results = 8 * n**2 + tests
    pieces = gram.num_pieces(width, mesh)
    steps = [mixed * min(pieces, 2) + pieces * (3 * wide * n * min(width, gram.PRODUCT) + 4 * 8 * n**2)]
    if plan.sketched_axes:
        dealt = math.prod(shape) if mesh.size > 1 else 0  # a mixture as it comes from all devices
        made = (dealt + max(_sketch(plan, axis) for axis in plan.sketched_axes)) * wide
        sketching = mixed + tests + made  # its sums, and what is returned of them, in another order
        steps = [steps[0] + sketching * (plan.num_blocks > 1 and layers.sketches_beside(plan, mesh)), sketching]
    exact = [shape[a] for a in plan.exact_axes] + [n * (size // plan.rows)] * plan.other_side
    steps += [3 * 8 * side**2 + 3 * 8 * size for side in exact]  # a model and the mean in float64
    if plan.strengths:
        steps.append(8 * n * min(shape) ** 2 + 2 * 8 * size)
    # The results of the block before are still there; a new block comes while the last one is, before any kernel runs.
    blocks = min(plan.num_blocks, 2)
    return SMALL_BYTES + max(blocks * block + results, block + blocks * results + max(steps))


def written(plans, num_models):
    """Bytes that an analysis of `num_models` models writes: (statistics, the report's files roughly)."""
    layers = sum(REPORT_LAYER + 300 * p.num_models for p in plans)
    return sum(p.written_bytes for p in plans), REPORT_BYTES + layers + 12 * min(num_models, kinship.PICTURED) ** 2


def _written(plan, group, options):
    """Bytes of a layer's statistics file: its arrays, and what they are called."""
    n, numbers = plan.num_models, plan.num_models**2 + 4 * plan.num_models
    if group.parametrisation == "lora":
        pair, rank = group.entries[0], max(e.rank for e in group.entries)
        numbers += 2 * n**2 + n * (2 + rank)
        for sizes in (pair.a.shape[1:], pair.b.shape[:1]):
            rows = n * rank * math.prod(sizes)
            numbers += sum(s if lora.mode_is_exact(rows // s, s, options) else min(s, TESTS // 2) for s in sizes)
    else:
        numbers += _entries(plan) // 8
        numbers += (n**2 if plan.storage == "float64" else 0) + (n * min(plan.shape) if plan.strengths else 0)
        numbers += sum(
            min(plan.shape[a], TESTS // 2) if a in plan.sketched_axes else plan.shape[a] for a in _axes(plan)
        )
    return 8 * numbers + HEADER_BYTES + ID_BYTES * n


def _axes(plan):
    """Weight axes that have a mode spectrum."""
    return {*plan.exact_axes, *plan.sketched_axes, *([0] if plan.other_side else [])}


def _sketch(plan, axis):
    """Entries of the temporary arrays of `modes.sketch`: one mixture as a matrix, a piece of it, its random signs."""
    shape = (plan.rows, *plan.shape[1:])
    count, across = math.prod(shape), math.prod(shape) // shape[axis]
    piece = min(across, modes.SIGNS)
    copied = count != plan.width or plan.shape[0] % plan.rows or 0 < axis < len(shape) - 1
    part = shape[axis] * piece if across > piece else 0
    return bool(copied) * count + part + modes.COLUMNS * piece


def _lora(plan, group, mesh, options):
    """The same of a LoRA layer: the factors of all its pairs' models are held at once."""
    n, rank, dealt = plan.num_models, max(e.rank for e in group.entries), lora.deal_of(group, mesh)
    model, steps = _lora_parts(plan, group, mesh, options)
    here = dealt.read_by(placement.devices_here(mesh))
    steps.append(6 * 8 * n * rank**2)  # roots of the factors' Gram matrices, and cores
    copied = dealt.together * dealt.held if len(here) != dealt.held else 0  # of each device its own models
    return model * (len(here) + copied) + max(steps) + LORA_BYTES, 3 * 8 * n**2 + 8 * n * rank


def _lora_device(plan, group, mesh, options):
    """Bytes of one device: the models of its pairs, and one kernel's arrays."""
    model, steps = _lora_parts(plan, group, mesh, options)
    return SMALL_BYTES + model * lora.deal_of(group, mesh).held + max(steps)


def _lora_parts(plan, group, mesh, options):
    """Bytes of one model's factors, and of what each kernel adds on a device."""
    pairs, dealt = group.entries, lora.deal_of(group, mesh)
    stored, wide = 8 if plan.storage == "float64" else 4, 8 if plan.dtype == "float64" else 4
    rank = max(e.rank for e in pairs)
    widths = [math.prod(pairs[0].a.shape[1:]), pairs[0].b.shape[0]]
    # One or two blocks of models, both factors of each; their products, and the blocks of all pairs.
    two, side, count = min(2, dealt.blocks), dealt.size * rank, len(dealt.rows()[0])
    results = 8 * (3 * count * dealt.size**2 + 2 * dealt.held * rank**2)
    steps = [two * wide * side * sum(widths) + 4 * wide * side**2 + 2 * results + 8 * 3 * plan.num_models**2]
    for sizes in (pairs[0].a.shape[1:], (widths[1],)):
        entries = dealt.own * rank * math.prod(sizes)
        copies = stored * entries * min(2, len(sizes))  # rows of one axis, where a side has several
        for size in sizes:
            rows = plan.num_models * rank * math.prod(sizes) // size
            if lora.mode_is_exact(rows, size, options):
                steps.append(copies + 8 * entries + min(mesh.size + 1, 3) * 8 * min(rows, size) ** 2)
            else:
                steps.append(SKETCH_BYTES + copies + stored * TESTS * (rows + size) + 8 * TESTS * size)
    return stored * rank * sum(widths), steps


def _figures(num_models):
    """Bytes of a layer's spectra, null draws and held-out curves, made by all cores."""
    square = 8 * num_models**2
    work = SECULAR * min(8 * secular.BLOCK_ELEMENTS, 8 * square) + DRAW * figures.threads(num_models) * square
    return work + min(ARENAS * square, MOST)
