"""Where the models of a collection lie: folders, globs and lists of paths become (id, path, root). Opens no model.

A text like org/name or org/name@revision that is no path is looked for in the cache of downloads (`hubcache`).

Hidden names, `__pycache__` and `.tmp-*` are passed over; files that are no models are listed as ignored; a
sub-folder without a model beside sub-folders with models is a model that is missing, and is set aside.
"""

import collections
import dataclasses
import glob
import os

from jaxsub import errors, formats, hubcache

_WORKDIR_LOCK, _WORKDIR_FOLDERS = ".jaxsub.lock", ("statistics", "parts", "bundle")
MAX_DEPTH = 32  # folders under folders; deeper is a loop or an accident
MAX_LIST_BYTES = 64 * 2**20  # of a text file of paths
_OF_BUNDLE = ("manifest.json", "coefficients.safetensors", "layers")
_LIST = ".txt"
_GENERIC = ("models", "checkpoints", "weights")
_CACHE_ONLY = ("blobs", "refs")  # of a hub cache: its models are under snapshots/


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A path that should be one model; links in it may lead anywhere inside `root`."""

    id: str
    path: str
    root: str


@dataclasses.dataclass
class Found:
    """What a search came upon."""

    candidates: list = dataclasses.field(default_factory=list)
    ignored: list = dataclasses.field(default_factory=list)
    refused: list = dataclasses.field(default_factory=list)  # (Candidate, InputError): no model where one should be
    folders: list = dataclasses.field(default_factory=list)  # that the paths name, each once: ids are relative to them


def find(paths, allow_roots=()):
    """The Found of a path or a list of paths, sorted by the bytes of the ids; every path stands once.

    Raises:
        InputError: a path leads nowhere, or a list of paths cannot be read.
    """
    found = Found()
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    for path in paths:
        for item, base, name in _expand(os.fspath(path)):
            found.folders += [] if base in found.folders else [base]
            first = len(found.candidates)
            if os.path.isdir(item) and not formats.is_model(item):
                _Walk(base if name is None else item, allow_roots, found).folder(item)
            else:
                root = item if os.path.isdir(item) and (item == path or name) else base
                found.candidates.append(Candidate(_identifier(item, base), item, root))
            if name is not None:  # a snapshot's own name is its commit
                new = found.candidates[first:]
                ids = [name if c.path == item else f"{name}/{c.id}" for c in new]
                found.candidates[first:] = [dataclasses.replace(c, id=i) for c, i in zip(new, ids, strict=True)]
    unique = {os.path.abspath(c.path): c for c in reversed(found.candidates)}
    found.candidates = sorted(_distinct_ids(list(unique.values())), key=lambda c: os.fsencode(c.id))
    found.refused.sort(key=lambda pair: os.fsencode(pair[0].id))
    return found


def _expand(path):
    """[(path, base, name)], ids being relative to the base: one a folder or file, one a line of a list or match of a
    glob; the name is that of a model in the cache of downloads, else None.
    """
    if path.endswith(_LIST) and os.path.isfile(path):
        base = os.path.dirname(os.path.abspath(path))
        places = [(os.path.normpath(os.path.join(base, line)), line) for line in _lines(path)]
        return [found for place, line in places for found in _plain(place, line, base)]
    return _plain(path, path)


def _plain(path, said, base=None):
    path = path.rstrip("/") or "/"
    if os.path.lexists(path):
        is_collection = os.path.isdir(path) and not formats.is_model(path)
        return [(path, base or (path if is_collection else os.path.dirname(os.path.abspath(path))), None)]
    if not glob.has_magic(path):
        return [_cached(path, said)]
    matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
    if not matches:
        raise errors.InputError(path, "no file or folder matches", hint="check --collection", rule="H12")
    fixed = os.path.dirname(path[: min(path.find(c) for c in "*?[" if c in path)]) or "."
    return [(match, base or fixed, None) for match in matches]


def _cached(path, said):
    """What `_expand` gives for the name of a model in the cache of downloads."""
    reason, hint = "no such file or folder", "check --collection"
    if hubcache.is_name(said):
        snapshot, looked = hubcache.locate(said)
        if snapshot:
            return snapshot, os.path.dirname(os.path.dirname(snapshot)), said
        shown = ", ".join(errors.quote(place) for place in looked)
        reason += f", and no model of this name is in the cache of downloads (looked for {shown})"
        hint += ", or fetch the model first: nothing is fetched here"
    raise errors.InputError(path, reason, hint=hint, rule="H12")


def _lines(path):
    if os.path.getsize(path) > MAX_LIST_BYTES:
        raise errors.InputError(path, "is too large for a list of paths", hint="one path a line", rule="H19")
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.strip() for line in file]
    lines = [line for line in lines if line and not line.startswith("#")]
    if any("\0" in line for line in lines):
        raise errors.InputError(path, "is no list of paths: it holds NUL", hint="one path a line", rule="H12")
    return lines


class _Walk:
    """One folder and all under it."""

    def __init__(self, root, allow_roots, found):
        self.root, self.found = root, found
        self.allowed = [os.path.realpath(r) for r in allow_roots]

    def folder(self, folder, depth=0):
        """Adds what is in a folder; returns how many candidates it holds."""
        count, with_models, without = 0, 0, []
        for entry in self._entries(folder):
            if formats.is_model(entry.path):
                self.found.candidates.append(self._candidate(entry.path))
                count, with_models = count + 1, with_models + entry.is_dir()
            elif entry.is_dir() and depth < MAX_DEPTH and self._may_enter(entry):
                inside = 0 if _is_bundle(entry.path) else self.folder(entry.path, depth + 1)
                count, with_models = count + inside, with_models + (inside > 0)
                without += [] if inside else [entry.path]
            elif not entry.is_dir():
                self.found.ignored.append(entry.path)
        for path in without:
            # With a single sibling it is a folder of logs beside a folder of weights; or it is the output of a run.
            if with_models >= 2 and not _is_output(path):
                self._refuse(path, "holds no model", "H12", "remove the folder, or put its weights back")
            else:
                self.found.ignored.append(path)
        return count

    def _entries(self, folder):
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda e: os.fsencode(e.name))
        except OSError as error:
            raise errors.InputError(folder, f"cannot be listed: {error.strerror}", rule="H12") from error
        passed_over = _CACHE_ONLY if any(e.name == "snapshots" for e in entries) else ()
        if any(e.name == _WORKDIR_LOCK for e in entries):
            passed_over = (*passed_over, *_WORKDIR_FOLDERS)  # a run wrote its output here
        passed_over = (*passed_over, formats.SHARED_BASIS)
        return [e for e in entries if not e.name.startswith(".") and e.name not in ("__pycache__", *passed_over)]

    def _may_enter(self, entry):
        if not entry.is_symlink():
            return True
        target = os.path.realpath(entry.path)
        if any(_is_inside(target, root) for root in self.allowed):
            return True
        if _is_inside(target, os.path.realpath(self.root)):
            self.found.ignored.append(entry.path)  # its models are found where they lie
        else:
            self._refuse(entry.path, "is a link that leads outside the collection", "H10", "allow it with --allow_root")
        return False

    def _refuse(self, path, reason, rule, hint):
        self.found.refused.append((self._candidate(path), errors.InputError(path, reason, hint=hint, rule=rule)))

    def _candidate(self, path):
        return Candidate(_identifier(path, self.root), path, self.root)


def _is_inside(path, root):
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _identifier(path, root):
    relative = os.path.relpath(path, root)
    stem, ending = os.path.splitext(relative)
    return stem if ending.lower() in formats.EXTENSIONS and not os.path.isdir(path) else relative


def _distinct_ids(candidates):
    """The same candidates with unique ids: endings where two differ in nothing else, then roots, then whole paths."""
    counts = collections.Counter((c.root, c.id) for c in candidates)
    candidates = [
        dataclasses.replace(c, id=os.path.relpath(c.path, c.root)) if counts[c.root, c.id] > 1 else c
        for c in candidates
    ]
    if _are_distinct(candidates):
        return candidates
    named = [dataclasses.replace(c, id=os.path.join(_name(c.root), c.id)) for c in candidates]
    if _are_distinct(named):
        return named
    return [dataclasses.replace(c, id=os.path.abspath(c.path)) for c in candidates]


def _is_output(folder):
    """Whether a folder is a bundle, or a run wrote its output in it."""
    return os.path.lexists(os.path.join(folder, _WORKDIR_LOCK)) or any(
        map(_is_bundle, (folder, os.path.join(folder, "bundle")))
    )


def _is_bundle(folder):
    return all(os.path.lexists(os.path.join(folder, name)) for name in _OF_BUNDLE)


def _are_distinct(candidates):
    return len({c.id: None for c in candidates}) == len(candidates)


def name_of(folders, most=3):
    """What to call a collection: the names of its folders, with their parents' where two are called alike.

    A folder called `models` says nothing by itself and goes with its parent's name.
    """
    folders = list(dict.fromkeys(os.path.abspath(folder) for folder in folders))
    names = [_name(folder) for folder in folders]
    counts = collections.Counter(names)
    for i, folder in enumerate(folders):
        if counts[names[i]] > 1 or names[i] in _GENERIC:
            names[i] = os.path.join(_name(os.path.dirname(folder)), names[i])
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _name(root):
    return os.path.basename(os.path.abspath(root))
