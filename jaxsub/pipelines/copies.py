"""Bit-identical models, found before the pass so that every figure is of distinct models only.

A few hundred bytes of each layer tell almost all models apart; only those that agree in all samples are read, layer
by layer, until they differ or turn out to be copies. Copies always agree in every sample, so none is missed.
"""

import hashlib

import numpy as np

from jaxsub import collection, formats

SAMPLE_BYTES, SAMPLED_LAYERS = 256, 64


def find(groups, models, meter=None):
    """Groups of models identical in every one of `groups`.

    Args:
        groups: LayerGroups; `members` index into `models`.
        models: Models of the collection.
        meter: Meter whose bytes_read grows by what was read in full.

    Returns:
        list of sorted index lists of two or more, by first member.
    """
    own = {m: [] for g in groups for m in g.members}  # member -> [(group number, entry)]
    for number, group in enumerate(groups):
        for member, entry in zip(group.members, group.entries, strict=True):
            own[member].append((number, entry))
    classes = {}
    for member, entries in own.items():
        signature = tuple(n for n, _ in entries)
        step = max(1, len(entries) // SAMPLED_LAYERS)
        samples = tuple(_sample(models[member], e) for _, e in entries[::step])
        classes.setdefault((signature, samples), []).append(member)
    suspects = [c for c in classes.values() if len(c) > 1]
    return sorted(sorted(c) for s in suspects for c in _split(s, own, models, meter))


def _sample(model, entry):
    parts = [repr(getattr(entry, "scale", ""))]
    for tensor in collection.stored_tensors(entry):
        if tensor.extent is None or not tensor.num_bytes:
            parts.append("")
            continue
        # From the middle: first rows of embeddings and padded kernels are often equal in unrelated models.
        size = min(SAMPLE_BYTES, tensor.num_bytes)
        out = np.empty(size, np.uint8)
        formats.read_into(tensor.extent, (tensor.num_bytes - size) // 2, out)
        parts.append(out.tobytes())
    return tuple(parts)


def _split(members, own, models, meter):
    """Classes of two or more of `members` whose layers are equal byte for byte; reads only while undecided."""
    classes = [members]
    for position in range(len(own[members[0]])):
        refined = []
        for members in classes:
            by_hash = {}
            for member in members:
                entry = own[member][position][1]
                by_hash.setdefault(_hash(models[member], entry, meter), []).append(member)
            refined += [c for c in by_hash.values() if len(c) > 1]
        classes = refined
        if not classes:
            break
    return classes


def _hash(model, entry, meter):
    digest = hashlib.sha256(repr((getattr(entry, "scale", ""), getattr(entry, "transposed", ""))).encode())
    for tensor in collection.stored_tensors(entry):
        digest.update(f"{tensor.dtype}{tensor.shape}".encode())
        for block in formats.blocks(model, tensor):
            digest.update(np.ascontiguousarray(block).view(np.uint8))
        if meter is not None:
            meter.bytes_read += tensor.num_bytes
    return digest.digest()
