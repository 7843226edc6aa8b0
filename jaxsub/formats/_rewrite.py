"""What the writers of the formats share: casts that refuse to overflow, files beside the weights, places of layers."""

import math
import os

import numpy as np

from jaxsub import errors
from jaxsub.formats import _files

MAX_SIDECAR = 1 << 26  # bytes of a file beside the weights that is still copied


def read(path):
    """All bytes of a file."""
    file = _files.identify(path)
    return _files.read_bytes(file, 0, file.size)


def copy_sidecars(source, target, *, without):
    """Copies the files of a folder that are not in `without`, folders and large files left out."""
    for name in sorted(_files.list_folder(source)):
        full = os.path.join(source, name)
        if name in without or not os.path.isfile(full) or os.path.getsize(full) > MAX_SIDECAR:
            continue
        _files.write_atomic(os.path.join(target, name), [read(full)])


def place(folder, identifier):
    """Where a model of this id goes inside `folder`; ids that lead out of it are refused."""
    folder = os.path.abspath(folder)
    found = os.path.normpath(os.path.join(folder, identifier))
    if os.path.commonpath([folder, found]) != folder or found == folder:
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
