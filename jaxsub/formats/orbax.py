"""Orbax checkpoint folders as `StandardCheckpointer` writes them: nested dicts of arrays, names joined by slashes.

_METADATA            the tree: keys of every leaf, and what it was
commit_success.txt   written last: without it the checkpoint is not finished
manifest.ocdbt, d/   the arrays, in tensorstore's database; its file driver opens nothing outside the folder

Arrays are read by tensorstore one at a time, as numpy, whatever devices they came from: neither jax nor orbax is
loaded for it. Only `rewrite` needs orbax.
"""

import bisect
import dataclasses
import functools
import math
import os

import numpy as np

from jaxsub import descriptors, errors
from jaxsub.formats import _files, _header, _json, _model, _names, _rewrite, _sniff

ENDING = ""  # of a rewritten model: a folder
COMMITTED, TREE, MANIFEST = "commit_success.txt", "_METADATA", "manifest.ocdbt"
STEP = "_CHECKPOINT_METADATA"
MAX_TREE = 1 << 26  # bytes of _METADATA
MAX_OVERHANG, OVERHANG_SLACK = 16, 1 << 16  # entries of a piece over those of its array
# Decoded as a stream that ends where the piece does: one that expands to gigabytes costs nothing. blosc is not.
_CODECS = frozenset(("zstd", "gzip", "zlib", "bz2", "bytes", "crc32c", "transpose", "sharding_indexed"))
_ARRAYS = ("jax.Array", "np.ndarray")
_EMPTY = {"Dict": dict, "List": list, "Tuple": list, "None": lambda: None}  # leaves that nothing is stored of
_DTYPES = frozenset(name for name, _ in _header.DTYPES.values()) - _header.PACKED | {"complex128"}


def claims(path):
    """Whether `path` is a checkpoint folder, finished or not."""
    return _sniff.kind(path) == "orbax"


def open(path, *, root=None, allow_roots=()):
    """The Model in a committed checkpoint; nothing but the tree and the headers of its arrays is read.

    Raises:
        InputError: not committed, damaged, without some of its arrays' bytes, or with links that lead out of it.
    """
    path = os.fspath(path)
    _require_committed(path)
    files = _files.identify_tree(path, root=root, allow_roots=allow_roots)
    leaves = [leaf for leaf in _leaves(path) if leaf.kind in _ARRAYS]
    _model.check_all([leaf.name for leaf in leaves], path)
    store = _Store(path, files)
    tensors = [store.tensor(leaf) for leaf in leaves]
    skipped = {t.name: reason for t in tensors if (reason := _names.not_a_weight(t.name))}
    kept = {t.name: t for t in tensors if t.name not in skipped}
    return _model.build(path, "orbax", kept, skipped, metadata=_labels(path), load=store.load, files=files)


def _require_committed(path):
    if _sniff.UNFINISHED in os.path.basename(path):
        reason, hint = "is an unfinished checkpoint", "the run that wrote it ended too early; remove the folder"
    elif not os.path.lexists(os.path.join(path, COMMITTED)):
        reason = f"is no committed checkpoint: it has no {COMMITTED}"
        hint = "the run that wrote it ended too early; if orbax restores it, save it again with a current one"
    elif not os.path.lexists(os.path.join(path, MANIFEST)):
        reason = f"has no {MANIFEST}: its arrays are not stored as StandardCheckpointer stores them"
        hint = "save it again with orbax.checkpoint.StandardCheckpointer"
    else:
        return
    raise errors.InputError(path, reason, hint=hint, rule="H7")


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaf:
    """A leaf of the tree: its keys, which of them are places in a list, and what it was."""

    keys: tuple
    in_list: tuple
    kind: str

    @property
    def name(self):
        return "/".join(self.keys)

    @property
    def place(self):
        """What orbax calls it in the database."""
        return ".".join(self.keys)


def _leaves(path):
    """The leaves in `_METADATA`, in its order."""
    leaves = []
    try:
        for entry in _parsed(path, TREE)["tree_metadata"].values():
            keys = tuple(part["key"] for part in entry["key_metadata"])
            in_list = tuple(part["key_type"] == 1 for part in entry["key_metadata"])
            leaves.append(_Leaf(keys, in_list, entry["value_metadata"]["value_type"]))
    except (KeyError, TypeError, AttributeError):
        leaves = None
    if not leaves or not all(x.keys and all(isinstance(k, str) for k in (*x.keys, x.kind)) for x in leaves):
        raise errors.InputError(os.path.join(path, TREE), "holds no tree", hint="it is damaged", rule="H7")
    _require_tree(leaves, path)
    for attribute in ("name", "place"):
        named = [getattr(leaf, attribute) for leaf in leaves]
        if len({*named}) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise errors.InputError(path, "is the name of two arrays", key=twice, rule="H3")
    return leaves


def _require_tree(leaves, path):
    """Refuses leaves under leaves, and nodes that are lists and dicts at once."""
    ends, lists = {leaf.keys for leaf in leaves}, {}
    for leaf in leaves:
        for depth, (key, in_list) in enumerate(zip(leaf.keys, leaf.in_list, strict=True)):
            is_odd = lists.setdefault(leaf.keys[:depth], in_list) != in_list or (in_list and not key.isdecimal())
            if is_odd or (depth and leaf.keys[:depth] in ends):
                reason = "is a leaf under a leaf, or in a list that is a dict as well"
                raise errors.InputError(path, reason, key=leaf.name, hint="the tree is damaged", rule="H7")


def _parsed(path, name):
    """The JSON dict in a file of the folder."""
    file = _files.identify(os.path.join(path, name), allow_roots=_rewrite.ANYWHERE)  # links: see `identify_tree`
    found = _json.parse(_files.read_bytes(file, 0, file.size), file.path) if 0 < file.size <= MAX_TREE else None
    if not isinstance(found, dict):
        raise _files.damaged(file, "is no JSON object of a checkpoint", hint="get it again")
    return found


def _labels(path):
    """Strings that were saved beside the arrays as custom metadata."""
    return {k: v for k, v in _custom(path).items() if isinstance(v, str)}


def _custom(path):
    if not os.path.lexists(os.path.join(path, STEP)):  # an item of a CheckpointManager: one folder up, for all items
        return {}
    found = _parsed(path, STEP).get("custom_metadata")
    return found if isinstance(found, dict) else {}


class _Store:
    """The arrays of a checkpoint."""

    def __init__(self, path, files):
        self.path, self.files = path, files
        database = self._asked("is no database of arrays", lambda ts: ts.KvStore.open(self._spec()).result())
        keys = self._asked("cannot be listed", lambda ts: database.list().result())
        self.keys = sorted(keys)
        tree = _parsed(path, TREE)
        self.driver = "zarr3" if tree.get("use_zarr3") is True else "zarr"
        self.stores_zeros = tree.get("store_array_data_equal_to_fill_value") is True  # older ones leave such pieces out

    def _spec(self, place=None):
        base = {"driver": "file", "path": os.path.abspath(self.path) + "/"}
        return {"driver": "ocdbt", "base": base} | ({"path": f"{place}/"} if place else {})

    def _asked(self, reason, call, key=None):
        import tensorstore

        try:
            return call(tensorstore)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
            said = errors.quote(str(error).split(" [")[0], 200)
            hint = "it is damaged or hostile; get it again"
            raise errors.InputError(self.path, f"{reason}: {said}", key=key, hint=hint, rule="H7") from error

    def _array(self, place, key):
        spec = {"driver": self.driver, "kvstore": self._spec(place)}
        return self._asked("cannot be opened", lambda ts: ts.open(spec, open=True, read=True).result(), key)

    def _is_stored(self, array, key):
        if not math.prod(array.shape):
            return True
        found = self._asked(
            "cannot be listed", lambda ts: array.storage_statistics(query_not_stored=True).result(), key
        )
        return not found.not_stored

    def tensor(self, leaf):
        """The Tensor of a leaf, after all of its chunks are found: one that is absent would be read as zeros."""
        array = self._array(leaf.place, leaf.name)
        shape, dtype = tuple(array.shape), array.dtype.name
        if dtype not in _DTYPES:
            said = f"holds {errors.quote(dtype, 40)}, which is no number"
            raise errors.InputError(self.path, said, key=leaf.name, hint="leave it out of the checkpoint", rule="H6")
        if foreign := _codecs(array.codec.to_json()) - _CODECS:
            said = f"is stored by {errors.quote(', '.join(sorted(foreign)), 80)}, which orbax does not write"
            hint = "save it again with orbax.checkpoint.StandardCheckpointer"
            raise errors.InputError(self.path, said, key=leaf.name, hint=hint, rule="H14")
        chunk = array.chunk_layout.write_chunk.shape or ()  # a file of zarr 3 may hold several to read
        if math.prod(chunk) > MAX_OVERHANG * math.prod(shape) + OVERHANG_SLACK:  # tensorstore allocates one, or aborts
            said = f"has pieces of shape {list(chunk)}, far larger than its own shape {list(shape)}"
            raise errors.InputError(self.path, said, key=leaf.name, hint="it is damaged or hostile", rule="H14")
        wanted = math.prod(-(-size // step) for size, step in zip(shape, chunk, strict=True))
        prefix = f"{leaf.place}/".encode()
        found = bisect.bisect_left(self.keys, prefix[:-1] + b"0") - bisect.bisect_left(self.keys, prefix) - 1
        # Pieces may also be there under names that this array does not look for: all of it would be zeros.
        if self.stores_zeros and (found < wanted or not self._is_stored(array, leaf.name)):
            said = f"has {max(0, min(found, wanted - 1))} of its {wanted} pieces"
            raise errors.InputError(self.path, said, key=leaf.name, hint="it is incomplete; get it again", rule="H7")
        return descriptors.Tensor(leaf.name, shape, dtype)

    def read(self, place, key):
        """An array or number of the database, row-major, the files being those of the opening."""
        array = self._array(place, key)
        found = self._asked("cannot be read", lambda ts: array.read(order="C").result(), key)
        _files.require_unchanged(self.files)
        return np.asarray(found, order="C")

    @functools.cached_property
    def _places(self):
        return {leaf.name: leaf.place for leaf in _leaves(self.path)}

    def load(self, name):
        """The array of a tensor."""
        return self.read(self._places[name], name)


def _codecs(spec):
    """Names of the compressors, and whatever else, that pieces of an array go through; of both drivers."""
    if isinstance(spec, list):
        return set().union(*map(_codecs, spec))
    if not isinstance(spec, dict):
        return set()
    own = {spec["id"]} if "id" in spec else {spec["name"]} if "name" in spec and "driver" not in spec else set()
    return own.union(*(_codecs(value) for value in spec.values()))


def rewrite(model, path, layers):
    """Writes a checkpoint again with other values in some layers, by StandardCheckpointer; see `formats.rewrite`.

    The whole tree is in memory: orbax takes it at once.
    """
    from orbax import checkpoint

    store = _Store(model.path, _files.identify_tree(model.path, allow_roots=_rewrite.ANYWHERE))
    values = {}
    for leaf in _leaves(model.path):
        if leaf.kind in _ARRAYS and leaf.name in layers:
            values[leaf] = _rewrite.stored(layers[leaf.name], model.tensors[leaf.name], model)
        elif leaf.kind in _ARRAYS:
            values[leaf] = model.load(leaf.name)
        elif leaf.kind == "scalar":
            values[leaf] = store.read(leaf.place, leaf.name).item()
        elif leaf.kind in _EMPTY:
            values[leaf] = _EMPTY[leaf.kind]()
        else:
            what = f"{errors.quote(model.path)}, {errors.quote(leaf.name, 80)}: a {errors.quote(leaf.kind, 40)}"
            raise errors.ConfigError(f"{what} cannot be written yet")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with checkpoint.StandardCheckpointer() as writer:
        writer.save(os.path.abspath(path), _tree(values), custom_metadata=_custom(model.path) or None)


def _tree(values):
    """Nested dicts and lists of _Leaf -> value."""
    root, lists = {}, {}
    for leaf, value in values.items():
        node = root
        for depth, key in enumerate(leaf.keys):
            lists[leaf.keys[:depth]] = leaf.in_list[depth]
            node = node.setdefault(key, {}) if depth + 1 < len(leaf.keys) else node
        node[leaf.keys[-1]] = value
    return _listed(root, (), lists)


def _listed(node, at, lists):
    if at not in lists:
        return node  # a leaf
    children = {key: _listed(child, (*at, key), lists) for key, child in node.items()}
    return [children[key] for key in sorted(children, key=int)] if lists[at] else children
