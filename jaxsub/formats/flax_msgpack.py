"""Flax msgpack files (.msgpack): nested dicts of arrays, names joined by slashes. Needs no flax."""

import functools
import os

from jaxsub.formats import _files, _model, _msgpack, _names, _rewrite, _sniff

ENDING = ".msgpack"  # of a rewritten model


def claims(path):
    """Whether `path` is a msgpack file by its ending."""
    return _sniff.kind(path) == "flax_msgpack"


def open(path, *, root=None, allow_roots=()):
    """The Model in a file of `flax.serialization.to_bytes`; kernels keep flax's orientation (in, out).

    Raises:
        InputError: cut short, damaged, or beyond the limits of `_msgpack`.
    """
    file, found = _leaves(path, root, allow_roots)
    _model.check_all(found, file.path)
    tensors = [leaf.tensor(name, file) for name, leaf in found.items()]
    skipped = {name: reason for name in found if (reason := _names.not_a_weight(name))}
    content = _model.Content(file, tensors, skipped, {}, functools.partial(_load, file, found))
    return _model.from_content(path, "flax_msgpack", content)


def _load(file, found, name):
    return found[name].load(file)


def _leaves(path, root=None, allow_roots=()):
    """(FileId, name -> Leaf) of a file."""
    file = _files.identify(path, root=root, allow_roots=allow_roots)
    with _files.reader(file) as reader:
        return file, _msgpack.walk(reader)


def rewrite(model, path, layers):
    """Writes a file again, its own bytes but for those of some layers; see `formats.rewrite`.

    A layer keeps its shape and dtype and so its bytes keep their places, in one piece or in chunks.
    """
    file, found = _leaves(model.path, allow_roots=_rewrite.ANYWHERE)
    _rewrite.require_unchanged(model, [file])
    patches = []
    for name, values in layers.items():
        tensor, at = found[name].tensor(name, file), 0
        make = functools.lru_cache(1)(functools.partial(_rewrite.stored, values, tensor, model))
        for offset, count in found[name].pieces:
            num_bytes = count * tensor.num_bytes // max(1, tensor.size)
            patches.append((offset, num_bytes, functools.partial(_part, make, at, count)))
            at += count
    _files.make_folder(os.path.dirname(os.path.abspath(path)))
    _files.write_atomic(path, _rewrite.patched(file, patches))


def _part(make, at, count):
    return make().reshape(-1)[at : at + count]
