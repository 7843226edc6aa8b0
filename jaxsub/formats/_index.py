"""Sharded models: an index file and shards that must say the same, entry by entry."""

import os
import re

from jaxsub import errors
from jaxsub.formats import _files, _json, _model, _names

MAX_INDEX = 1 << 26  # bytes
# What no file of an index may be called, by the rules of POSIX and of Windows, wherever this runs.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f/\\:*?"<>|]|^\.|[. ]$|^\s')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)


def content(path, read_shard, *, root=None, allow_roots=()):
    """(Contents of the shards, warnings) of the model that an index file describes.

    Index and shard headers must be a bijection: every listed key in the shard it is listed for, nothing else.

    Args:
        path: `<stem>.<ending>.index.json`.
        read_shard: `_header.content` or `_torch.content`.
        root, allow_roots: as for `open_model`.

    Raises:
        InputError: a name that leaves the folder, a shard or key that is missing, misplaced or not listed (H10, H11).
    """
    index = read(path, root=root, allow_roots=allow_roots)
    where, ending = index["weight_map"], os.path.splitext(path.removesuffix(".index.json"))[1]
    for key, name in where.items():
        _check_shard_name(name, ending, key, path)
    folder, contents = os.path.dirname(path), []
    for name in sorted(set(where.values())):
        shard = os.path.join(folder, name)
        if not os.path.lexists(shard):
            raise errors.InputError(path, "is listed, and not there", key=name, hint="fetch all shards", rule="H11")
        contents.append(read_shard(shard, root=root, allow_roots=allow_roots))
    _require_bijection(where, contents, path)
    return contents, _size_warning(index, contents, path)


def read(path, *, root=None, allow_roots=()):
    """The JSON of an index file, a dict with a `weight_map` that is not empty; its names are not checked yet."""
    file = _files.identify(path, root=root, allow_roots=allow_roots)
    if file.size > MAX_INDEX:
        raise errors.InputError(
            path, f"has {file.size} bytes, more than {MAX_INDEX}", hint="is it an index?", rule="H11"
        )
    index = _json.parse(_files.read_bytes(file, 0, file.size), path) if file.size else None
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise _files.damaged(file, "has no weight_map from tensor to shard", rule="H11", hint="get it again")
    _names.check_count(len(where), path)
    return index


def _check_shard_name(name, ending, key, path):
    bad = not isinstance(name, str) or not name or len(name) > 255 or _UNSAFE.search(name) or _RESERVED.match(name)
    if bad or not name.endswith(ending):
        raise errors.InputError(
            path,
            f"is listed in {errors.quote(name, 80)!r}, which is no {ending} file of this folder",
            key=key,
            hint="nothing outside the folder is read; write the index again",
            rule="H10",
        )


def _require_bijection(where, contents, path):
    found = {}
    for shard in contents:
        name = os.path.basename(shard.file.path)
        for tensor in shard.tensors:
            listed = where.get(tensor.name)
            if listed != name:
                reason = (
                    f"is in {name}, and the index lists it in {listed}" if listed else f"is in {name} and not listed"
                )
                raise errors.InputError(path, reason, key=tensor.name, hint="index and shards must agree", rule="H11")
            found[tensor.name] = name
    for key, name in where.items():
        if key not in found:
            reason = f"is listed in {name}, and not there"
            raise errors.InputError(path, reason, key=key, hint="index and shards must agree", rule="H11")


def _size_warning(index, contents, path):
    metadata = index.get("metadata")
    declared = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(t.num_bytes for shard in contents for t in shard.tensors)
    if declared is None or declared == total:
        return ()
    shown = errors.quote(declared, 40)
    return (f"{os.path.basename(path)} says total_size is {shown}, the tensors have {total} bytes",)


def merge(path, form, contents, warnings):
    """One Model of several Contents, in sorted order of names."""
    tensors = sorted((t for c in contents for t in c.tensors), key=lambda t: t.name)
    skipped = {name: reason for c in contents for name, reason in c.skipped.items()}
    loads = {t.name: c.load for c in contents for t in c.tensors if t.extent is None}
    metadata = {k: v for c in contents for k, v in c.metadata.items()}
    kept = {t.name: t for t in tensors if t.name not in skipped}
    more = {"warnings": warnings, "metadata": metadata, "files": [c.file for c in contents]}
    return _model.build(path, form, kept, skipped, load=lambda name: loads[name](name), **more)
