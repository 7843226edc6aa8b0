"""Raw .safetensors files: one file, one model. Reads headers only; writes for every reader of the format."""

import functools
import json
import math
import os
import struct

import numpy as np

from jaxsub import plugins
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
    _files.write_atomic(path, chunks(tensors, metadata))


def chunks(tensors, metadata=None):
    """The bytes of the file that `write` would make: first the header, then array by array."""
    arrays = {name: _plain(name, array) for name, array in tensors.items()}
    return _chunks(arrays, _order(arrays), metadata or {})


def rewrite(model, path, layers):
    """Writes a file again at `path` with other values in some layers; see `formats.rewrite`."""
    tensors = read(model.path)
    for name, array in layers.items():
        stored = tensors[name]
        tensors[name] = _rewrite.cast(np.reshape(array, stored.shape), stored.dtype, model, name)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write(path, tensors, dict(model.metadata))


def _order(arrays):
    """Names, widest dtype first: each dtype stays aligned."""
    return sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))


def _plain(name, array):
    """The array in row-major little-endian order, its shape kept (numpy's ascontiguousarray makes scalars 1-D)."""
    array = np.asarray(array, order="C")
    if array.dtype.name not in _CODES or not isinstance(name, str):
        raise TypeError(f"tensor {name!r}: dtype {array.dtype} has no place in safetensors")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _chunks(arrays, order, metadata):
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items()):
        raise TypeError("metadata must map names to strings")
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        array = arrays[name]
        end = position + math.prod(array.shape) * array.dtype.itemsize
        header[name] = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _header.MAX_HEADER:
        raise TypeError(f"the header would have {len(text)} bytes, more than the format allows")
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        if arrays[name].size:
            yield memoryview(arrays[name].reshape(-1).view(np.uint8))
