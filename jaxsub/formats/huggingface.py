"""Hugging Face model folders: one weight file, or an index and its shards; safetensors before torch files.

Nothing else in the folder is opened.
"""

import os

from jaxsub import errors
from jaxsub.formats import _files, _header, _index, _model, _sniff, _torch

_READERS = {".safetensors": _header.content, ".bin": _torch.content}


def claims(path):
    """Whether `path` is a folder, and no adapter folder."""
    return _sniff.kind(path) == "huggingface"


def open(path, *, root=None, allow_roots=()):
    """The Model of a folder.

    Raises:
        InputError: no weights, more than one candidate, or any fault of index and shards (rules H10, H11).
    """
    where = {"root": path if root is None else root, "allow_roots": allow_roots}
    names = _files.list_folder(path)
    stem, ending = _choose(path, names)
    file = os.path.join(path, stem + ending)
    if stem + ending + ".index.json" in names:
        contents, warnings = _index.content(file + ".index.json", _READERS[ending], **where)
        return _index.merge(path, "huggingface", contents, warnings)
    return _model.from_content(path, "huggingface", _READERS[ending](file, **where))


def _choose(path, names):
    """(stem, ending) of the one file, or index, that is the model."""
    for ending in _READERS:
        found = [stem for stem in _sniff.WEIGHT_FILES if {stem + ending, stem + ending + ".index.json"} & set(names)]
        if len(found) > 1:
            raise _refuse(path, f"holds several models: {', '.join(s + ending for s in found)}", found[1] + ending)
        if found:
            name = found[0] + ending
            if {name, name + ".index.json"} <= set(names):
                raise _refuse(path, f"{name} and an index beside it: which one is the model?", name)
            return found[0], ending
    files = [n for n in names if _sniff.extension(n) in _sniff.EXTENSIONS and n not in _sniff.SIDECARS]
    if not files:
        raise errors.InputError(path, "holds no weights", hint="give a folder with model.safetensors", rule="H12")
    shown = ", ".join(errors.quote(n) for n in files[:3])
    hint = "give the file itself, or one folder a model"
    raise errors.InputError(path, f"holds {len(files)} weight files and no index ({shown})", hint=hint, rule="H11")


def _refuse(path, reason, name):
    return errors.InputError(os.path.join(path, name), reason, hint="remove the one that is not wanted", rule="H11")
