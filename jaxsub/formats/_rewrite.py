"""What the writers of the formats share: casts that refuse to overflow, files beside the weights, places of layers."""

import math
import os

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _sniff

ANYWHERE = ("/",)  # roots of links in a model that was opened, and its links checked, before

MAX_SIDECAR = 1 << 26  # bytes of a file beside the weights that is still copied
# Programs and pickles beside weights are never passed on, and weights in another format would contradict the new ones.
_LEFT_OUT = (".py", ".pyc", ".so", ".pkl", ".pickle", ".joblib", ".onnx", ".ot", ".tflite", ".gguf")


def read(path):
    """All bytes of a file."""
    file = _files.identify(path)
    return _files.read_bytes(file, 0, file.size)


def copy_sidecars(source, target, *, without):
    """Copies the files of a folder that are not in `without`; no folders, large files, programs or other weights."""
    for name in sorted(_files.list_folder(source)):
        full = os.path.join(source, name)
        is_left_out = name in without or name.endswith(".index.json")
        is_left_out |= _sniff.extension(name) in (*_LEFT_OUT, *_sniff.EXTENSIONS)
        if is_left_out or not os.path.isfile(full) or os.path.getsize(full) > MAX_SIDECAR:
            continue
        _files.write_atomic(os.path.join(target, name), [read(full)])


def require_unchanged(model, files):
    """Refuses files that are not those whose headers gave the model (FileIds)."""
    known = {t.extent.file.path: t.extent.file for t in model.tensors.values() if t.extent}
    for file in files:
        if known.get(file.path, file) != file:
            hint = "leave the inputs alone during a run, and start it again"
            raise errors.InputChangedError(file.path, "changed since its header was read", hint=hint, rule="F4")


def patched(file, patches, start=0):
    """Blocks of a file's bytes from `start` on, some of them replaced.

    Args:
        file: FileId.
        patches: (offset, number of bytes, function that makes the array of these bytes), apart from one another.
        start: first byte.
    """
    with _files.reader(file) as opened:
        for offset, num_bytes, make in sorted(patches, key=lambda patch: patch[:2]):
            if num_bytes:  # one layer at a time is in memory
                yield from opened.blocks(start, offset - start)
                yield memoryview(make().reshape(-1).view(np.uint8))
                start = offset + num_bytes
        yield from opened.blocks(start, file.size - start)


def stored(array, tensor, model):
    """The array of a layer as its Tensor is stored: shape, dtype, row-major."""
    dtype = descriptors.numpy_dtype(tensor.dtype)
    return np.asarray(cast(np.reshape(array, tensor.shape), dtype, model, tensor.name), order="C")


def place(folder, identifier):
    """Where a model of this id goes inside `folder`; ids that lead out of it, or have a shorter form, are refused."""
    folder = os.path.abspath(folder)
    found = os.path.normpath(os.path.join(folder, identifier))
    is_outside = os.path.commonpath([folder, found]) != folder or found == folder
    # "x" and "./x" would be one place, and one model would overwrite the other.
    if is_outside or "\0" in identifier or found != os.path.join(folder, identifier):
        raise errors.InputError(identifier, "is no place inside the folder of reconstructions", rule="H10")
    return found


def cast(array, dtype, model, name):
    """The array in the stored dtype, rounded once; what does not fit is refused."""
    return rounded(array, dtype, model.path, name)


def rounded(array, dtype, path, name):
    """`cast` for a file that has no Model yet."""
    with np.errstate(over="ignore"):
        found = np.asarray(array).astype(dtype)
    wide = found if dtype.itemsize >= 4 else found.astype(np.float32)
    if not np.isfinite(wide).all():
        largest = float(np.abs(np.asarray(array)).max())
        what = f"rebuilt entries reach {largest:.3g}" if math.isfinite(largest) else "rebuilt entries are not finite"
        raise errors.InputError(path, f"{what}: more than {dtype.name} holds", key=name, rule="N1")
    return found
