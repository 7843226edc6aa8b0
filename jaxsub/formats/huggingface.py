"""Hugging Face model folders: one weight file, or an index and its shards; safetensors before torch files.

Nothing else in the folder is opened by the reader. Models are written again file by file, torch files as
safetensors: no pickle is ever written.
"""

import dataclasses
import functools
import json
import os
import re

from jaxsub import errors
from jaxsub.formats import _files, _header, _index, _model, _rewrite, _sniff, _torch, safetensors

ENDING = ""  # of a rewritten model: a folder
_METADATA = {"format": "pt"}  # without it transformers refuses the file
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


def rewrite(model, path, layers):
    """Writes a folder again, its shards, index and sidecars as they are; see `formats.rewrite`."""
    found = _parts(model)
    with _files.new_folder(path) as folder:
        for content in found.contents:
            _write(content, os.path.join(folder, found.name_of(content)), layers, model, found.ending)
        _complete(model, found, folder)


def frames(model, folder):
    """`_frame.Frames` of a folder's weight files, torch files as safetensors; see `formats.frames`."""
    from jaxsub.formats import _frame

    found, files, twins = _parts(model), [], {}
    if any(safetensors.is_packed(content.tensors) for content in found.contents):
        return None
    for content in found.contents:
        _rewrite.require_unchanged(model, [content.file])
        pieces = functools.partial(_model.blocks, load=content.load)
        files.append((found.name_of(content), content.tensors, {**content.metadata, **_METADATA}, pieces))
        skipped = content.skipped.items()
        twins |= {n: why.removeprefix(_torch.TWIN) for n, why in skipped if why.startswith(_torch.TWIN)}
    return _frame.Frames(folder, files, twins, functools.partial(_complete, model, found))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a model's folder is made of: Contents of its weight files, their new names, the index if there is one."""

    stem: str
    ending: str
    contents: list
    names: dict
    index: dict | None

    def name_of(self, content):
        return self.names[os.path.basename(content.file.path)]


def _parts(model):
    stem, ending = _choose(model.path, _files.list_folder(model.path))
    file, index = os.path.join(model.path, stem + ending), None
    where = {"root": model.path, "allow_roots": _rewrite.ANYWHERE}
    if os.path.lexists(file):
        contents = [_READERS[ending](file, **where)]
    else:
        index = _index.read(file + ".index.json", **where)
        contents, _ = _index.content(file + ".index.json", _READERS[ending], **where)
    names = {name: _safetensors_name(name) for c in contents for name in [os.path.basename(c.file.path)]}
    if len({*names.values()}) < len(names):
        reason = "lists shards that would be called alike as safetensors"
        raise errors.InputError(file + ".index.json", reason, hint="rename them", rule="H11")
    safetensors.require_known([t for content in contents for t in content.tensors], model.path)
    return _Parts(stem, ending, contents, names, index)


def _complete(model, found, folder):
    """Writes what belongs beside the weight files: the files beside the original's, and the index."""
    _rewrite.copy_sidecars(model.path, folder, without=())
    if found.index is not None:
        total = sum(t.num_bytes for content in found.contents for t in content.tensors)
        metadata = found.index.get("metadata")
        metadata = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
        where = {key: found.names[name] for key, name in found.index["weight_map"].items()}
        text = json.dumps(found.index | {"metadata": metadata, "weight_map": where}, indent=2, allow_nan=False)
        name = _safetensors_name(found.stem + found.ending) + ".index.json"
        _files.write_atomic(os.path.join(folder, name), [text.encode("utf-8") + b"\n"])


def _safetensors_name(name):
    """What a weight file is called as safetensors: transformers looks for model, not for pytorch_model."""
    if name.endswith(".safetensors"):
        return name
    return re.sub("^pytorch_model", "model", name.removesuffix(".bin")) + ".safetensors"


def _write(content, path, layers, model, ending):
    """Writes one weight file again."""
    if ending == ".safetensors":
        safetensors.patch(content, path, layers, model, _METADATA)
        return
    _rewrite.require_unchanged(model, [content.file])

    def load(tensor):
        name = content.skipped.get(tensor.name, "").removeprefix(_torch.TWIN)
        source = name if name in layers else tensor.name  # names of one storage stay equal
        if source in layers:
            return _rewrite.stored(layers[source], tensor, model)
        return _model.whole(tensor) if tensor.extent else content.load(tensor.name)

    safetensors.stream(path, content.tensors, load, _METADATA)
