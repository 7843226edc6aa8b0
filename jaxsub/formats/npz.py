"""NumPy files: .npz (one tensor a member) and .npy (one tensor, named after the file). Nothing is unpickled."""

import functools
import os
import zipfile

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _model, _names, _npy, _rewrite, _sniff, _zip

ENDING = ".npz"  # of a rewritten model; a .npy becomes an archive of one


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
        members, is_archive = _members(reader)
        found = {n.removesuffix(".npy"): m for n, m in members.items() if n.endswith(".npy")}
        skipped = {n: "no .npy member" for n in members if not n.endswith(".npy") and members[n].size}
        for member in found.values():
            if is_archive and member.method == _zip.STORED:
                _zip.verify(reader, member)
        _model.check_all(found, file.path)
        for name, member in found.items():
            tensor, load = _tensor(reader, name, member)
            tensors.append(tensor)
            loads[name] = load
    skipped |= {name: reason for name in found if (reason := _names.not_a_weight(name))}
    content = _model.Content(file, tensors, skipped, {}, lambda name: loads[name]())
    return _model.from_content(path, "npz", content)


def _members(reader):
    """(name -> Member, whether they are of an archive); a .npy is one member that no checksum covers."""
    file = reader.file
    head = reader.read(0, min(file.size, 512))
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _zip.walk(reader), True
    if not head.startswith(b"\x93NUMPY"):
        raise _files.damaged(file, "is neither .npy nor .npz", rule="H8", hint="is it cut short?")
    name = os.path.splitext(os.path.basename(file.path))[0] + ".npy"
    return {name: _zip.Member(name, _zip.STORED, 0, file.size, file.size, 0)}, False


def rewrite(model, path, layers):
    """Writes an archive again, member by member, with other values in some layers; see `formats.rewrite`."""
    file = _files.identify(model.path, allow_roots=_rewrite.ANYWHERE)
    _rewrite.require_unchanged(model, [file])
    _files.make_folder(os.path.dirname(os.path.abspath(path)))
    with _files.reader(file) as reader, _files.new_file(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        members, is_archive = _members(reader)
        for name, member in members.items():
            info = zipfile.ZipInfo(name)  # its date is fixed: the same bytes for the same content
            info.compress_type, info.file_size = member.method, member.size
            layer = name.removesuffix(".npy")
            with archive.open(info, "w") as target:
                if layer in layers and layer != name:
                    values = _rewrite.stored(layers[layer], model.tensors[layer], model)
                    np.lib.format.write_array(target, values, allow_pickle=False)
                else:
                    target.write(_zip.content(reader, member) if is_archive else reader.read(0, file.size))


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
        _zip.inflate(reader, member, num_bytes)
        if member.method
        else [reader.read(member.offset, min(num_bytes, member.size))]
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
