"""NumPy files: .npz (one tensor a member) and .npy (one tensor, named after the file). Nothing is unpickled."""

import functools
import os

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _model, _names, _npy, _sniff, _zip


def claims(path):
    """Whether `path` is a NumPy file by ending or content."""
    return _sniff.kind(path) == "npz"


def open(path, *, root=None, allow_roots=()):
    """The Model in a .npy or .npz file. Stored row-major arrays get extents; the rest is read by `Model.load`.

    Raises:
        InputError: objects, structured or raw types, sizes that do not match, a damaged archive.
    """
    file = _files.identify(path, root=root, allow_roots=allow_roots)
    skipped, tensors, loads = {}, [], {}
    with _files.reader(file) as reader:
        head = reader.read(0, min(file.size, 512))
        if head.startswith(b"\x93NUMPY"):
            name = os.path.splitext(os.path.basename(os.fspath(path)))[0]
            found = {name: _zip.Member(name, _zip.STORED, 0, file.size, file.size, 0)}
        elif head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            members = _zip.walk(reader)
            found = {n.removesuffix(".npy"): m for n, m in members.items() if n.endswith(".npy")}
            skipped = {n: "no .npy member" for n in members if not n.endswith(".npy") and members[n].size}
            for member in found.values():
                if member.method == _zip.STORED:
                    _zip.verify(reader, member)
        else:
            raise _files.damaged(file, "is neither .npy nor .npz", rule="H8", hint="is it cut short?")
        _model.check_all(found, file.path)
        for name, member in found.items():
            tensor, load = _tensor(reader, name, member)
            tensors.append(tensor)
            loads[name] = load
    skipped |= {name: reason for name in found if (reason := _names.not_a_weight(name))}
    content = _model.Content(file, tensors, skipped, {}, lambda name: loads[name]())
    return _model.from_content(path, "npz", content)


def _tensor(reader, name, member):
    """(Tensor, function that reads it) of one member."""
    start = _prefix(reader, member, 12)
    size = _npy.head_size(start)
    if size is None or size > min(member.size, _npy.MAX_HEADER):
        reason = "is no .npy" if size is None else f"says its header has {size} bytes"
        raise errors.InputError(reader.file.path, reason, key=name, hint="it is damaged; get it again", rule="H8")
    dtype, shape, fortran = _npy.parse(_prefix(reader, member, size), member.size, reader.file.path, name)
    plain = member.method == _zip.STORED and dtype.byteorder != ">" and not (fortran and len(shape) > 1)
    extent = descriptors.Extent(reader.file, member.offset + size) if plain else None
    read = functools.partial(_load, reader.file, member, size, dtype, shape, fortran)
    return descriptors.Tensor(name, shape, dtype.name, extent), read


def _prefix(reader, member, num_bytes):
    data = b""
    for block in (
        _zip.inflate(reader, member) if member.method else [reader.read(member.offset, min(num_bytes, member.size))]
    ):
        data += block
        if len(data) >= num_bytes:
            break
    return data[:num_bytes]


def _load(file, member, head, dtype, shape, fortran):
    with _files.reader(file) as reader:
        stored = member.method == _zip.STORED
        data = reader.read(member.offset, member.size) if stored else _zip.content(reader, member)
    return _npy.array(memoryview(data)[head:], dtype, shape, fortran)
