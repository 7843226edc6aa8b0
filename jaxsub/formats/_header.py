"""The safetensors container: a length, a JSON header, bytes. Every rule of the format, and a few limits more.

    8 bytes n (little-endian) | n bytes of JSON: name -> {dtype, shape, data_offsets} | data, no holes

Collections hold hundreds of files with the same header byte for byte, so what a header says is kept by its digest.
"""

import dataclasses
import functools
import hashlib
import struct

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _json, _model, _names

MAX_HEADER = 100_000_000  # bytes, the reference reader's limit
MAX_METADATA = 1 << 24  # bytes of its strings, which stay in memory; trainers write some hundred kilobytes
MAX_DIM = 2**48 - 1  # the format's schema
MAX_DIMS = 32  # numpy's limit up to version 1
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))

# name in the file -> (numpy or ml_dtypes name, bits)
DTYPES = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "U16": ("uint16", 16), "I16": ("int16", 16),
    "U32": ("uint32", 32), "I32": ("int32", 32), "U64": ("uint64", 64), "I64": ("int64", 64),
    "F16": ("float16", 16), "BF16": ("bfloat16", 16), "F32": ("float32", 32), "F64": ("float64", 64),
    "C64": ("complex64", 64), "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F4": ("float4_e2m1fn", 4), "F6_E2M3": ("float6_e2m3fn", 6), "F6_E3M2": ("float6_e3m2fn", 6),
}  # fmt: skip
PACKED = frozenset(("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"))  # several entries in a byte: no extent


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What a header says of any file that starts with it.

    Attributes:
        entries: (name, shape, dtype, offset in the file) in header order.
        skipped: name -> reason, for entries that are not weights.
        metadata: strings of `__metadata__`.
        size: bytes of a whole file.
        notes: room for readers that derive more from the names; filled by them.
    """

    entries: tuple
    skipped: dict
    metadata: dict
    size: int
    notes: dict = dataclasses.field(default_factory=dict)


def content(path, *, root=None, allow_roots=()):
    """The Content of a safetensors file; nothing but the header is read.

    Raises:
        InputError: the file breaks the format (rules H1 to H7).
    """
    file, layout = _read(path, root, allow_roots)
    make, extent = descriptors.Tensor, descriptors.Extent
    tensors = [
        make(name, shape, dtype, extent(file, offset) if dtype not in PACKED else None)
        for name, shape, dtype, offset in layout.entries
    ]
    return _model.Content(file, tensors, layout.skipped, layout.metadata, _refuse_packed(file.path), layout.notes)


def _refuse_packed(path):
    def load(name):
        """Packed 4- and 6-bit floats have no extent, and no array type."""
        raise errors.InputError(
            path, "has packed entries of under 8 bits", key=name, hint="re-save as bfloat16", rule="H6"
        )

    return load


def _read(path, root, allow_roots):
    file = _files.identify(path, root=root, allow_roots=allow_roots)
    if file.size < 8:
        raise _files.damaged(file, f"is {file.size} bytes long, too short for safetensors", rule="H1")
    (length,) = struct.unpack("<Q", _files.read_bytes(file, 0, 8))
    limit = min(MAX_HEADER, file.size - 8)
    if not 0 < length <= limit:
        reason = f"says its header has {length} bytes, 1 to {limit} are possible"
        hint = "the download is incomplete, or this is no safetensors file: get it again, or move it elsewhere"
        raise _files.damaged(file, reason, rule="H1", hint=hint)
    data = _files.read_bytes(file, 8, length)
    layout = _cached(data, file)
    if layout.size != file.size:
        reason = f"has {file.size} bytes where its header needs {layout.size}"
        raise errors.InputError(file.path, reason, hint="it is cut short or was changed; get it again", rule="H4")
    return file, layout


_CACHE = {}
_CACHE_BYTES = 200_000_000  # of what is kept, roughly
_CACHED = {"bytes": 0}


def _cached(data, file):
    digest = hashlib.blake2b(data, digest_size=32).digest()
    layout = _CACHE.get(digest)
    if layout is None:
        layout = parse(data, file.path)
        size = 200 * len(layout.entries) + _size_of(layout.metadata)
        if _CACHED["bytes"] + size > _CACHE_BYTES:
            _CACHE.clear()
            _CACHED["bytes"] = 0
        _CACHE[digest] = layout
        _CACHED["bytes"] += size
    return layout


def _size_of(metadata):
    """Characters of names and texts, and what Python needs beside them."""
    return sum(100 + len(key) + len(value) for key, value in metadata.items())


def parse(data, path):
    """The Layout of the header bytes `data`; pure.

    Raises:
        InputError: naming `path` and the tensor.
    """
    header = _json.parse(data, path)
    if not isinstance(header, dict):
        raise errors.InputError(path, "its header is no JSON object", hint="get the file again", rule="H2")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    _model.check_all(header, path)
    start, spans, entries = 8 + len(data), [], []
    for name, entry in header.items():
        fail = functools.partial(_refuse, path, name)
        dtype, shape, begin, end = _entry(entry, fail)
        spans.append((begin, end, name))
        entries.append((name, shape, dtype, start + begin))
    size = start + _covered(spans, path)
    skipped = {name: reason for name in header if (reason := _names.not_a_weight(name))}
    return Layout(tuple(entries), skipped, metadata, size)


def _refuse(path, name, rule, reason):
    raise errors.InputError(path, reason, key=name, hint="the file is damaged; get it again", rule=rule)


def _metadata(value, path):
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise errors.InputError(
            path, "must map names to strings", key="__metadata__", hint="re-save the file", rule="H2"
        )
    if _size_of(value) > MAX_METADATA:
        reason = f"has {len(value)} entries of more than {MAX_METADATA >> 20} MiB together"
        raise errors.InputError(path, reason, key="__metadata__", hint="leave them out of the file", rule="H19")
    return value


def _entry(entry, fail):
    """(dtype, shape, begin, end) of one tensor, checked."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = ", ".join(sorted(map(errors.quote, entry))) if isinstance(entry, dict) else type(entry).__name__
        fail("H5", f"has {found[:200] or 'nothing'} where dtype, shape and data_offsets belong")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        fail("H6", f"has the unknown dtype {errors.quote(dtype, 40)!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        fail("H5", f"has no shape of at most {MAX_DIMS} sizes")
    count = 1
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_DIM:
            fail("H5", f"has the impossible size {errors.quote(dim, 40)} in its shape")
        count *= dim
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int for o in offsets):
        fail("H4", "has no pair of integers as data_offsets")
    begin, end = offsets
    name, bits = DTYPES[dtype]
    if not 0 <= begin <= end:
        fail("H4", f"lies at the impossible bytes {begin} to {end}")
    if count * bits != (end - begin) * 8:
        fail("H5", f"is {dtype} of shape {shape}, which does not fill its {end - begin} bytes exactly")
    return name, tuple(shape), begin, end


def _covered(spans, path):
    """Bytes of data: the spans, sorted, must join without a hole or an overlap, from 0 on."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps another tensor" if begin < position else "leaves bytes before it that belong to no tensor"
            _refuse(path, name, "H4", f"starts at byte {begin}, {position} expected: it {what}")
        position = end
    return position
