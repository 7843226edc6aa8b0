"""Keras files: HDF5 (.h5, .hdf5) and Keras 3 archives (.keras), which hold one HDF5 file. Needs the extra `h5`."""

import functools

from jaxsub.formats import _files, _hdf5, _model, _sniff, _zip

_WEIGHTS = "model.weights.h5"


def claims(path):
    """Whether `path` is a Keras or HDF5 file by ending or content."""
    return _sniff.kind(path) == "keras"


def open(path, *, root=None, allow_roots=()):
    """The Model in a Keras file; names are the paths of the datasets, kernels keep Keras' orientation (in, out).

    Raises:
        InputError: h5py is missing, or any fault that `_hdf5` or `_zip` find.
    """
    file = _files.identify(path, root=root, allow_roots=allow_roots)
    _hdf5.module(file.path)
    with _files.reader(file) as reader:
        offset, size = _place(reader)
        tensors, skipped = _hdf5.walk(reader, offset, size)
    content = _model.Content(file, tensors, skipped, {}, functools.partial(_hdf5.load, file, offset, size))
    return _model.from_content(path, "keras", content)


def _place(reader):
    """(offset, bytes) of the HDF5 file."""
    head = reader.read(0, min(reader.file.size, 8))
    if head == b"\x89HDF\r\n\x1a\n":
        return 0, reader.file.size
    if head[:4] != b"PK\x03\x04":
        raise _files.damaged(reader.file, "is no HDF5 file and no .keras archive", rule="H8", hint="is it cut short?")
    member = _zip.walk(reader).get(_WEIGHTS)
    if member is None or member.method != _zip.STORED:
        hint = "save the model again with Keras 3"
        raise _zip.fault(reader, f"has no {_WEIGHTS} stored as it is", hint=hint)
    _zip.verify(reader, member)
    return member.offset, member.size
