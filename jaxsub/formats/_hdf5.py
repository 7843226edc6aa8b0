"""HDF5 through h5py, with the doors shut: our own descriptor, hard links only, no attributes, known filters only.

h5py parses the file in this process, so a collection from strangers is better given as safetensors. What is
bounded here: links to other files, cycles, plug-in filters, and datasets that declare more than is stored.
"""

import contextlib
import io

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _names

MAX_RATIO, RATIO_SLACK = 256, 1 << 20  # declared over stored bytes, as for zip members
MAX_ALIASING = 8  # bytes of all datasets over bytes of the file: datasets may be linked twice, or lie upon each other
MAX_DEPTH = 32
MAX_ITEMS = 20_000  # groups and datasets; each costs h5py half a millisecond
_FILTERS = frozenset((1, 2, 3, 32000))  # deflate, shuffle, checksum, lzf: those h5py brings; others load plug-ins


def module(path):
    """The h5py module.

    Raises:
        InputError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        hint = "pip install 'jaxsub[h5]'"
        raise errors.InputError(path, "is HDF5, which needs h5py", hint=hint, rule="H8") from None
    return h5py


class Window(io.RawIOBase):
    """A part of a file as a read-only file object: all of an .h5, or the .h5 inside a .keras archive."""

    def __init__(self, reader, offset, size):
        self._reader, self._offset, self._size, self._at = reader, offset, size, 0

    def readable(self):
        """True."""
        return True

    def seekable(self):
        """True."""
        return True

    def seek(self, offset, whence=0):
        """Moves; places outside the window are allowed, as for files."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self):
        """The place in the window."""
        return self._at

    def readinto(self, buffer):
        """Fills the buffer, up to the end of the window."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        view[:count] = self._reader.read(self._offset + self._at, count) if count else b""
        self._at += count
        return count


def walk(reader, offset, size):
    """(tensors, skipped) of the HDF5 file in a window; tensors in file order, names are the paths.

    Raises:
        InputError: damaged, a link that is not a hard one, or a dataset that is not what it declares.
    """
    h5py, path = module(reader.file.path), reader.file.path
    tensors, skipped = [], {}
    with _guarded(path), h5py.File(Window(reader, offset, size), "r") as root:
        seen, todo, stored = set(), [("", root, 0)], 0
        while todo:
            prefix, group, depth = todo.pop()
            address = _address(h5py, group)
            if address in seen or depth > MAX_DEPTH:
                raise _fault(path, prefix, f"is a group met twice, or more than {MAX_DEPTH} deep")
            seen.add(address)
            if len(tensors) + len(skipped) + len(todo) + len(group) > MAX_ITEMS:
                hint = "save it as safetensors"
                raise errors.InputError(path, f"holds more than {MAX_ITEMS} datasets", hint=hint, rule="H19")
            children = []
            for name in group:
                if not isinstance(name, str):  # h5py gives bytes for what is no UTF-8
                    raise _fault(path, repr(name), "is a name that is not UTF-8")
                key = f"{prefix}/{name}" if prefix else name
                _names.check(key, path)
                child = _child(h5py, group, name, key, path)
                if isinstance(child, h5py.Group):
                    children.append((key, child, depth + 1))
                elif isinstance(child, h5py.Dataset):
                    stored += _add(h5py, child, key, reader.file, offset, tensors, skipped)
                    if stored > MAX_ALIASING * size:
                        raise _fault(
                            path, key, f"is one of datasets of {stored} bytes in {size}: they share what is stored"
                        )
            todo.extend(reversed(children))
    return tensors, skipped


@contextlib.contextmanager
def _guarded(path, key=None):
    """Turns what h5py raises on a damaged file, errors of many types, into an InputError."""
    try:
        yield
    except (errors.JaxsubError, MemoryError):
        raise
    except Exception as error:
        raise _fault(path, key, f"is no HDF5 file that can be read ({type(error).__name__})") from error


def _address(h5py, item):
    info = h5py.h5o.get_info(item.id)
    return info.fileno, info.addr


def _fault(path, key, reason, hint="it is damaged or hostile; get it again, or convert it to safetensors"):
    return errors.InputError(path, reason, key=key, hint=hint, rule="H8")


def _child(h5py, group, name, key, path):
    with _guarded(path, key):
        link = group.get(name, getlink=True)
        if type(link) is not h5py.HardLink:
            raise _fault(path, key, f"is a link ({type(link).__name__}), which is not followed")
        return group[name]


def _add(h5py, dataset, key, file, offset, tensors, skipped):
    """Adds a dataset to `tensors`, or to `skipped`; returns its stored bytes."""
    with _guarded(file.path, key):
        dtype, shape, plist = dataset.dtype, dataset.shape, dataset.id.get_create_plist()
        stored = dataset.id.get_storage_size()
        filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
        outside = plist.get_external_count() or dataset.is_virtual
        place = dataset.id.get_offset()
    if outside or filters - _FILTERS:
        raise _fault(file.path, key, f"lies in other files, or needs the filters {sorted(filters - _FILTERS)}")
    if dtype.kind == "f" and dtype.itemsize > 8:
        raise _fault(file.path, key, f"has the type {dtype}, which no other format knows", "save it as float64")
    if dtype.kind not in "fiub" or shape is None:
        if dtype.kind == "V" and dtype.itemsize <= 2:
            raise _fault(file.path, key, "holds raw bytes (bfloat16?)", "save it as float32 or as safetensors")
        skipped[key] = "no array of numbers"
        return stored
    declared = dataset.size * dtype.itemsize
    if declared > MAX_RATIO * stored + RATIO_SLACK * bool(filters) or (not filters and declared > stored):
        raise _fault(file.path, key, f"declares {declared} bytes and stores {stored}")
    _names.check_not_quantised(key, file.path)
    plain = place is not None and not filters and plist.get_layout() == h5py.h5d.CONTIGUOUS and dtype.byteorder != ">"
    if plain and offset + place + declared > file.size:
        raise _fault(file.path, key, "reaches past the end of the file")
    extent = descriptors.Extent(file, offset + place) if plain else None
    tensors.append(descriptors.Tensor(key, tuple(shape), dtype.newbyteorder("=").name, extent))
    if reason := _names.not_a_weight(key):
        skipped[key] = reason
    return stored


def load(file, offset, size, name):
    """The dataset `name`, in native byte order."""
    h5py = module(file.path)
    with _files.reader(file) as reader, _guarded(file.path, name):
        with h5py.File(Window(reader, offset, size), "r") as root:
            array = np.asarray(root[name][()])
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
