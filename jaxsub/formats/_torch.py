"""Torch zip files (.pt, .pth, .bin, .ckpt of torch 1.6 or later), read without torch.

<root>/data.pkl        names, shapes, and which bytes of which record each tensor is (`_pickle`)
<root>/data/<key>      the records, stored as they are: tensors that fill theirs in order get an extent
"""

import math

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _hints, _model, _names, _pickle, _zip

MAX_PICKLE = 1 << 26  # bytes of data.pkl; 300 bytes a tensor are usual
MAX_DEPTH = 32  # nested dicts
TWIN = "the same stored numbers as "  # of a tensor left out for another one, whose name follows
MAX_ALIASING = 8  # bytes of all views over bytes of their storage


def content(path, *, root=None, allow_roots=()):
    """The Content of a torch file: every tensor in its nested dicts, names joined by dots. Reads the file once,
    for the checksums.

    Raises:
        InputError: an old, damaged or hostile file, TorchScript, or anything beyond a state dict (rule H9).
    """
    file = _files.identify(path, root=root, allow_roots=allow_roots)
    head = _files.head(file)
    if not head.startswith(b"PK\x03\x04"):
        hint = _hints.explain(head, file.size) or "is it cut short, or of another format?"
        raise errors.InputError(file.path, "is no torch zip file", hint=hint, rule="H9")
    with _files.reader(file) as reader:
        members, top = _archive(reader)
        found = _pickle.read(_zip.content(reader, members[f"{top}/data.pkl"]), file.path)
        if not isinstance(found, dict):
            raise _fault(file, None, "holds no dict of tensors")
        views = _flatten(found, file)
        _model.check_all(views, file.path)
        placed = {name: _place(file, name, view, members, top) for name, view in views.items()}
        _bound_aliasing(file, views, members, top)
        for member in members.values():
            _zip.verify(reader, member)
    return _content(file, views, placed)


def _fault(file, name, reason, hint="save model.state_dict() again with a current torch, or as safetensors"):
    return errors.InputError(file.path, reason, key=name, hint=hint, rule="H9")


def _archive(reader):
    """(members, root folder) of an archive laid out as torch.save does."""
    members = _zip.walk(reader)
    tops = {name.split("/", 1)[0] for name in members}
    if len(tops) != 1:
        raise _zip.fault(reader, f"has {len(tops)} top folders where torch writes one")
    top = tops.pop()
    if f"{top}/constants.pkl" in members or any(name.startswith(f"{top}/code/") for name in members):
        raise _zip.fault(reader, "is a TorchScript program, not weights", hint="save model.state_dict() instead")
    for member in members.values():
        if member.method != _zip.STORED:
            raise _zip.fault(reader, "is compressed, which torch never does", member.name)
    if f"{top}/data.pkl" not in members or members[f"{top}/data.pkl"].size > MAX_PICKLE:
        raise _zip.fault(reader, f"has no data.pkl of at most {MAX_PICKLE} bytes", hint="it is no torch file")
    order = members.get(f"{top}/byteorder")
    if order and (order.size > 16 or _zip.content(reader, order).strip() != b"little"):
        raise _zip.fault(reader, "is not little-endian", order.name, hint="re-save it as safetensors")
    return members, top


def _flatten(found, file):
    """name -> View for all tensors in nested dicts, lists and tuples; numbers and texts are left out.

    A container that holds anything nested may appear once only: sharing is how a small stream becomes endless.
    """
    views, seen, todo = {}, set(), [("", found, 0)]
    while todo:
        prefix, item, depth = todo.pop()
        if isinstance(item, _pickle.View):
            if prefix in views:
                raise _fault(file, prefix, "is the name of two tensors")
            views[prefix] = item
            continue
        pairs = list(item.items() if isinstance(item, dict) else enumerate(item))
        nested = [(k, v) for k, v in pairs if isinstance(v, (dict, list, tuple, _pickle.View))]
        if not nested:
            continue
        if id(item) in seen or depth >= MAX_DEPTH:
            raise _fault(file, prefix, f"is shared between containers, or nested more than {MAX_DEPTH} deep")
        seen.add(id(item))
        if len(todo) + len(nested) > _names.MAX_TENSORS:
            _names.check_count(len(todo) + len(nested), file.path)
        todo.extend((f"{prefix}.{key}" if prefix else str(key), value, depth + 1) for key, value in reversed(nested))
    return views


def _place(file, name, view, members, top):
    """The Member whose bytes a view uses, after all of its numbers are checked against it."""
    storage, member = view.storage, members.get(f"{top}/data/{view.storage.key}")
    if member is None:
        raise _fault(file, name, f"uses the record {errors.quote(storage.key, 40)!r}, which is not in the file")
    width = descriptors.numpy_dtype(view.dtype).itemsize
    own = descriptors.numpy_dtype(storage.dtype).itemsize if storage.dtype else 1
    if storage.count * own != member.size:
        raise _fault(file, name, f"needs a record of {storage.count * own} bytes, it has {member.size}")
    steps = list(zip(view.shape, view.stride, strict=True))
    last = view.offset + sum((d - 1) * s for d, s in steps)
    count = math.prod(view.shape)
    if count == 0:
        return member
    if (last + 1) * width > member.size:
        raise _fault(file, name, f"reaches to entry {last} of a record of {member.size // width}")
    if count * width > member.size or any(s == 0 and d > 1 for d, s in steps):
        raise _fault(file, name, f"expands {member.size} stored bytes to {count * width}")
    return member


def _bound_aliasing(file, views, members, top):
    used = {}
    for view in {(v.storage.key, v.dtype, v.offset, v.shape, v.stride): v for v in views.values()}.values():
        width = descriptors.numpy_dtype(view.dtype).itemsize
        used[view.storage.key] = used.get(view.storage.key, 0) + math.prod(view.shape) * width
    for key, num_bytes in used.items():
        if num_bytes > MAX_ALIASING * members[f"{top}/data/{key}"].size:
            raise _fault(file, key, f"is one record under views of {num_bytes} bytes in all")


def _content(file, views, placed):
    tensors, skipped, first = [], {}, {}
    for name, view in views.items():
        offset = placed[name].offset + view.offset * descriptors.numpy_dtype(view.dtype).itemsize
        extent = descriptors.Extent(file, offset) if _is_row_major(view) else None
        tensors.append(descriptors.Tensor(name, view.shape, view.dtype, extent))
        same = first.setdefault((view.storage.key, view.dtype, view.offset, view.shape, view.stride), name)
        reason = _names.not_a_weight(name) or (TWIN + same if same != name else None)
        if reason:
            skipped[name] = reason
    return _model.Content(file, tensors, skipped, {}, lambda name: _load(file, views[name], placed[name].offset))


def _is_row_major(view):
    step = 1
    for dim, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if dim != 1 and stride != step:
            return math.prod(view.shape) == 0
        step *= dim
    return True


def _load(file, view, start):
    """The array of a view in any memory order, copied to row-major."""
    dtype = descriptors.numpy_dtype(view.dtype)
    if math.prod(view.shape) == 0:
        return np.empty(view.shape, dtype)
    span = 1 + sum((d - 1) * s for d, s in zip(view.shape, view.stride, strict=True))
    flat = np.empty(span, dtype)
    extent = descriptors.Extent(file, start + view.offset * dtype.itemsize)
    _files.read_into(extent, 0, memoryview(flat.view(np.uint8)))
    strides = [s * dtype.itemsize for s in view.stride]
    return np.array(np.lib.stride_tricks.as_strided(flat, view.shape, strides), order="C")
