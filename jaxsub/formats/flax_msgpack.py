"""Flax msgpack files (.msgpack): nested dicts of arrays, names joined by slashes. Needs no flax."""

import functools

from jaxsub.formats import _files, _model, _msgpack, _names, _sniff


def claims(path):
    """Whether `path` is a msgpack file by its ending."""
    return _sniff.kind(path) == "flax_msgpack"


def open(path, *, root=None, allow_roots=()):
    """The Model in a file of `flax.serialization.to_bytes`; kernels keep flax's orientation (in, out).

    Raises:
        InputError: cut short, damaged, or beyond the limits of `_msgpack`.
    """
    file = _files.identify(path, root=root, allow_roots=allow_roots)
    with _files.reader(file) as reader:
        found = _msgpack.walk(reader)
    _model.check_all(found, file.path)
    tensors = [leaf.tensor(name, file) for name, leaf in found.items()]
    skipped = {name: reason for name in found if (reason := _names.not_a_weight(name))}
    content = _model.Content(file, tensors, skipped, {}, functools.partial(_load, file, found))
    return _model.from_content(path, "flax_msgpack", content)


def _load(file, found, name):
    return found[name].load(file)
