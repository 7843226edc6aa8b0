"""Puts a Model together from the tensors of a reader; the checks of names happen here, once for all formats."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _names

MAX_BITS = 56  # of the sizes of an empty array, together; NumPy multiplies those that are not zero


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """All that one weight file holds, before it is known what model it belongs to.

    Attributes:
        file: the FileId.
        tensors: list of Tensor in file order, weights or not.
        skipped: name -> reason, for those that are not weights.
        metadata: strings beside the tensors.
        load: reads a tensor without extent, by name.
        notes: a dict that files of the same header share, to keep what follows from names alone; or None.
    """

    file: Any
    tensors: list
    skipped: dict
    metadata: dict
    load: Callable | None = None
    notes: dict | None = None


def from_content(path, form, content):
    """The Model of one weight file."""
    kept = {t.name: t for t in content.tensors if t.name not in content.skipped}
    more = {"metadata": content.metadata, "load": content.load, "files": (content.file,)}
    return build(path, form, kept, content.skipped, **more)


def build(path, form, kept, skipped, *, adapters=None, warnings=(), metadata=None, load=None, files=()):
    """The Model of tensors that are sorted already into `kept` and `skipped` (name -> reason)."""
    if not kept and not adapters:
        found = "holds no tensors" if not skipped else "holds buffers only, no weights"
        raise errors.InputError(path, found, hint="is this the right file?", rule="H7")
    for name, tensor in kept.items():
        _names.check_no_factor(name, path)
        if 0 in tensor.shape:
            _check_empty(name, tensor, path)
    proxy = types.MappingProxyType
    return descriptors.Model(
        path=str(path),
        format=form,
        tensors=proxy(kept),
        adapters=proxy(adapters or {}),
        skipped=proxy(dict(skipped)),
        warnings=tuple(warnings),
        metadata=proxy(metadata or {}),
        load=load,
        files=tuple(files),
    )


def _check_empty(name, tensor, path):
    """Refuses an empty array whose other sizes no array can have: zero bytes pass every comparison with the file."""
    bits = sum(size.bit_length() for size in tensor.shape)
    if bits > MAX_BITS:
        reason = f"has the impossible shape {errors.quote(list(tensor.shape), 80)}"
        raise errors.InputError(path, reason, key=name, hint="the file is damaged; get it again", rule="H5")


def whole(tensor):
    """A stored tensor that has an extent, read whole, in its storage dtype, row-major."""
    array = np.empty(tensor.shape, descriptors.numpy_dtype(tensor.dtype))
    if array.size:
        _files.read_into(tensor.extent, 0, memoryview(array.reshape(-1).view(np.uint8)))
    return array


def read(tensor, load):
    """A stored tensor read whole: by its extent, or by `load` of its name where it has none."""
    return load(tensor.name) if tensor.extent is None else whole(tensor)


def check_all(names, file):
    """Refuses hostile names, quantised weights, and too many tensors."""
    _names.check_count(len(names), file)
    for name in names:
        _names.check(name, file)
        _names.check_not_quantised(name, file)


def require_float(tensor, file):
    """Refuses a tensor that is no float where a float is needed (a LoRA factor)."""
    if not tensor.is_float:
        raise errors.InputError(
            file, f"has dtype {tensor.dtype}, floats expected", key=tensor.name, hint="re-save it as float32", rule="H6"
        )


def blocks(tensor, load, first=4096, size=1 << 20):
    """Flat arrays that together are the whole tensor, in order: a short one first, for questions answered early."""
    if tensor.extent is None:
        yield load(tensor.name).reshape(-1)
        return
    dtype = descriptors.numpy_dtype(tensor.dtype)
    position = 0
    while position < tensor.size:
        count = max(1, (first if not position else size) // dtype.itemsize)
        flat = np.empty(min(count, tensor.size - position), dtype)
        _files.read_into(tensor.extent, position * dtype.itemsize, memoryview(flat.view(np.uint8)))
        position += flat.size
        yield flat
