"""Raw .safetensors files: one file, one model. Reads headers only; writes for every reader of the format."""

import functools
import itertools
import json
import math
import os
import struct

import numpy as np

from jaxsub import descriptors, errors, plugins
from jaxsub.formats import _factors, _files, _header, _model, _rewrite, _sniff

ALIGNMENT = 64  # bytes; the data starts on a cache line, so readers can use it in place
ENDING = ".safetensors"  # of a rewritten model
_CODES = {name: code for code, (name, _) in _header.DTYPES.items() if name not in _header.PACKED}


def claims(path):
    """Whether `path` is a safetensors file by its ending, or by its content where the ending says nothing."""
    return _sniff.kind(path) == "safetensors"


def open(path, *, root=None, allow_roots=()):
    """The Model in one safetensors file, from its header; files of LoRA factors go to the reader of their family.

    Raises:
        InputError: the file breaks the format, or holds what is no weight by itself (see `_names`).
    """
    content = _header.content(path, root=root, allow_roots=allow_roots)
    family = _factors.family(content)
    if family:
        return _reader(family).assemble(path, content)
    return _model.from_content(path, "safetensors", content)


_reader = functools.cache(functools.partial(plugins.load, "formats"))


def read(path):
    """{name: array} of all tensors of a file, weights or not, in their stored dtypes.

    Raises:
        InputError: the file breaks the format, or changed while it was read.
    """
    return {tensor.name: _model.whole(tensor) for tensor in _header.content(path).tensors}


def header_bytes(tensors, metadata=None):
    """Bytes of the file that `write` would make, less those of the arrays."""
    return len(next(chunks(tensors, metadata)))


def open_metadata(path):
    """The strings beside the tensors of a file."""
    return dict(_header.content(path).metadata)


def write(path, tensors, metadata=None):
    """Writes arrays to one safetensors file, atomically, the same bytes for the same content.

    Args:
        path: the file; replaced whole if it exists.
        tensors: name -> array of any shape, memory order and storage dtype; values are kept exactly.
        metadata: strings by name.

    Raises:
        TypeError: a dtype the format lacks, or metadata that is not text.
    """
    _files.write_atomic(path, list(chunks(tensors, metadata)))  # no copies: the arrays' own memory


def chunks(tensors, metadata=None):
    """The bytes of the file that `write` would make: first the header, then array by array."""
    arrays = {name: _plain(name, array) for name, array in tensors.items()}
    specs = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    return _chunks(specs, metadata or {}, arrays.__getitem__)


def stream(path, tensors, load, metadata=None):
    """Writes tensors to one file as `write` does, with one of them in memory at a time.

    Args:
        path: the file.
        tensors: Tensors; only names, shapes and dtypes are used.
        load: function Tensor -> row-major array of its shape and dtype.
        metadata: strings by name.
    """
    by_name = {t.name: t for t in tensors}
    specs = {t.name: (t.shape, t.dtype) for t in tensors}
    _files.write_atomic(path, _chunks(specs, metadata or {}, lambda name: load(by_name[name])))


def require_known(tensors, path):
    """Refuses Tensors of dtypes that the format lacks."""
    for t in tensors:
        if t.dtype not in _CODES and t.dtype not in _header.PACKED:
            raise errors.InputError(path, f"{t.dtype} has no place in safetensors", key=t.name, rule="H6")


def is_packed(tensors):
    """Whether some of these Tensors have entries of under a byte, which no array holds."""
    return any(t.dtype in _header.PACKED for t in tensors)


def rewrite(model, path, layers):
    """Writes a file again at `path` with other values in some layers; see `formats.rewrite`."""
    content = _header.content(model.path, allow_roots=_rewrite.ANYWHERE)
    _files.make_folder(os.path.dirname(os.path.abspath(path)))
    patch(content, path, layers, model)


def frames(model, folder):
    """`_frame.Frames` of a file model.safetensors in a folder; see `formats.frames`."""
    from jaxsub.formats import _frame

    content = _header.content(model.path, allow_roots=_rewrite.ANYWHERE)
    _rewrite.require_unchanged(model, [content.file])
    if is_packed(content.tensors):
        return None
    pieces = functools.partial(_model.blocks, load=content.load)
    return _frame.Frames(folder, [("model" + ENDING, content.tensors, content.metadata, pieces)], {}, lambda _: None)


def patch(content, path, layers, model, metadata=None):
    """Writes a file again: its own bytes, with other values in the layers that it holds.

    Args:
        content: of the original.
        path: the new file.
        layers: layer -> array; those of other files are passed over.
        model: that the file belongs to.
        metadata: strings that its header lacks.
    """
    _rewrite.require_unchanged(model, [content.file])
    changed = [t for t in content.tensors if t.name in layers and t.name not in content.skipped]
    patches = [
        (t.extent.offset, t.num_bytes, functools.partial(_rewrite.stored, layers[t.name], t, model)) for t in changed
    ]
    head = _files.read_bytes(content.file, 0, 8)
    start = 8 + struct.unpack("<Q", head)[0]
    lacking = {key: value for key, value in (metadata or {}).items() if key not in content.metadata}
    if not lacking:
        _files.write_atomic(path, _rewrite.patched(content.file, patches))
        return
    header = json.loads(_files.read_bytes(content.file, 8, start - 8))
    header = {"__metadata__": {**content.metadata, **lacking}} | {
        k: v for k, v in header.items() if k != "__metadata__"
    }
    rest = _rewrite.patched(content.file, patches, start)
    _files.write_atomic(path, itertools.chain([_header_bytes(header)], rest))


def _plain(name, array):
    """The array in row-major little-endian order, its shape kept (numpy's ascontiguousarray makes scalars 1-D)."""
    array = np.asarray(array, order="C")
    if array.dtype.name not in _CODES or not isinstance(name, str):
        raise TypeError(f"tensor {name!r}: dtype {array.dtype} has no place in safetensors")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _chunks(specs, metadata, load):
    """The file in pieces; `specs` is name -> (shape, dtype name), `load` the array of a name."""
    header, places, _ = layout(specs, metadata)
    yield header
    for name, (_, num_bytes) in places.items():
        if num_bytes:
            yield memoryview(load(name).reshape(-1).view(np.uint8))


def layout(specs, metadata):
    """(header bytes, {name: (offset in the file, bytes)} in file order, bytes of the whole file) of tensors.

    Args:
        specs: name -> (shape, dtype name).
        metadata: strings by name.

    Raises:
        TypeError: metadata that is not text, or a header longer than the format allows.
    """
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items()):
        raise TypeError("metadata must map names to strings")
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    widths = {name: descriptors.numpy_dtype(dtype).itemsize for name, (_, dtype) in specs.items()}
    order = sorted(specs, key=lambda name: (-widths[name], name))  # widest first: each dtype stays aligned
    position, spans = 0, {}
    for name in order:
        shape, dtype = specs[name]
        spans[name] = position, math.prod(shape) * widths[name]
        position += spans[name][1]
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [spans[name][0], position]}
    text = _header_bytes(header)
    return text, {name: (len(text) + start, size) for name, (start, size) in spans.items()}, len(text) + position


def _header_bytes(header):
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _header.MAX_HEADER:
        raise TypeError(f"the header would have {len(text)} bytes, more than the format allows")
    return struct.pack("<Q", len(text)) + text
