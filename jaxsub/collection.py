"""A folder of models as one collection: which models, which layers, who is set aside. Headers only, no jax.

    paths --find--> candidates --open_model--> Models --group by (name, shape)--> LayerGroups

The order of `refs` is the row order everywhere. Layers are never matched by anything but name and shape, unless
`match="order"` asks for run-numbered names to be matched by their place.
"""

import collections
import dataclasses
import glob
import hashlib
import math
import os
import re
from collections.abc import Mapping

from jaxsub import descriptors, errors, formats

SMALLEST_GROUP = 3
_PATH_LIST = ".txt"


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Models that have a layer of one name and shape; `entries` are Tensors or LoraPairs, one a member."""

    name: str
    shape: tuple[int, ...]
    parametrisation: str
    members: tuple[int, ...]
    entries: tuple


@dataclasses.dataclass(frozen=True)
class Collection:
    """See `open_collection`; `members` of the groups index into `refs` and `models`."""

    refs: tuple[descriptors.ModelRef, ...]
    models: tuple[descriptors.Model, ...]
    groups: tuple[LayerGroup, ...]
    skipped_layers: tuple[Mapping, ...]
    quarantined: tuple[Mapping, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    fingerprint: str


def open_collection(
    paths, *, layers=None, exclude_layers=None, match="exact", allow_roots=(), max_quarantined=None, strict=False
):
    """A collection of models, from headers only.

    Args:
        paths: a folder (one model a file or a sub-folder, searched recursively), a glob, a .txt file of paths, or a
            list of these.
        layers, exclude_layers: regular expressions (or lists of them) searched for in layer names.
        match: "exact" names, or "order" for names that differ in run numbers only.
        allow_roots: folders that links may lead into.
        max_quarantined: models that may be set aside; None for max(1, 5 %).
        strict: no model may be set aside.

    Raises:
        ConfigError: no such path, a bad regular expression, an unknown `match`.
        InputError: too many models set aside, or fewer than three left.
    """
    if match not in ("exact", "order"):
        raise errors.ConfigError(f"match is {match!r}; it is exact or order{errors.nearest(match, ('exact', 'order'))}")
    keep = _layer_filter(layers, exclude_layers)
    candidates, ignored, aside = _candidates([paths] if isinstance(paths, (str, os.PathLike)) else list(paths))
    opened = []
    for identifier, path, root in candidates:
        try:
            model = formats.open_model(path, root=root, allow_roots=tuple(allow_roots))
        except errors.InputError as error:
            aside.append(_set_aside(identifier, error.file, error.key, str(error), error.rule))
            continue
        opened.append((identifier, model))
    limit = 0 if strict else max_quarantined
    total = len(candidates) + len(aside) - sum(1 for a in aside if any(a["id"] == c[0] for c in candidates))
    limit = max(1, total // 20) if limit is None else limit
    if match == "order":
        opened = _named_by_place(opened)
    opened, odd = _without_odd(opened, max(1, total // 20), keep)
    aside += odd
    _require_enough(opened, aside, total, limit)
    groups, skipped = _group([m for _, m in opened], keep)
    warnings = []
    hint = "" if match == "order" else order_hint([m for _, m in opened])
    if hint:
        warnings.append(hint)
    if not groups:
        raise errors.InputError(
            candidates[0][2], "no layer is shared by three models", hint=hint or "are these models of one architecture?"
        )
    refs = tuple(descriptors.ModelRef(id=i, path=m.path, format=m.format, labels=m.metadata) for i, m in opened)
    return Collection(
        refs=refs,
        models=tuple(m for _, m in opened),
        groups=groups,
        skipped_layers=skipped,
        quarantined=tuple(aside),
        ignored=tuple(ignored),
        warnings=tuple(warnings),
        fingerprint=_fingerprint(opened),
    )


def natural(name):
    """Sort key of a name: numbers compare as numbers."""
    return [(1, int(part), part) if part.isdigit() else (0, 0, part) for part in re.split(r"(\d{1,18})", name)]


def _layer_filter(layers, exclude):
    def compiled(patterns):
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
        try:
            return [re.compile(p) for p in patterns]
        except re.error as error:
            raise errors.ConfigError(f"bad regular expression in {patterns}: {error}") from error

    wanted, unwanted = compiled(layers), compiled(exclude)
    return lambda name: (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)


# Finding models ---------------------------------------------------------------------------------------------------


def _candidates(paths):
    """[(id, path, root)], ignored paths, records of sub-folders without a model."""
    found, ignored, aside = [], [], []
    roots = [r for p in paths for r in _expand(os.fspath(p))]
    for root in roots:
        if os.path.isdir(root) and not formats.is_model(root):
            here, skipped, empty = _walk(root)
            found += [(_identifier(p, root), p, root) for p in here]
            ignored += skipped
            aside += [
                _set_aside(_identifier(p, root), p, None, f"{errors.quote(p)}: holds no model", "H12") for p in empty
            ]
        else:
            found.append((_identifier(root, os.path.dirname(root)), root, os.path.dirname(os.path.abspath(root))))
    if len(roots) > 1:
        found = _distinct_ids(found)
    found.sort(key=lambda c: os.fsencode(c[0]))
    return found, ignored, aside


def _expand(path):
    if path.endswith(_PATH_LIST) and os.path.isfile(path):
        base = os.path.dirname(os.path.abspath(path))
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.strip() for line in file]
        return [os.path.join(base, line) for line in lines if line and not line.startswith("#")]
    if os.path.lexists(path):
        return [path.rstrip("/") or "/"]
    matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
    if not matches:
        raise errors.ConfigError(f"{errors.quote(path)}: no such file or folder, and no glob that matches one")
    return matches


def _walk(folder, depth=0):
    models, ignored, empty = [], [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        raise errors.InputError(folder, f"cannot be listed: {error.strerror}", rule="H12") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if formats.is_model(entry.path):
            models.append(entry.path)
        elif entry.is_dir(follow_symlinks=False) and depth < 8:
            inner, skipped, _ = _walk(entry.path, depth + 1)
            ignored += skipped
            if inner:
                models += inner
            elif depth == 0:
                empty.append(entry.path)
        else:
            ignored.append(entry.path)
    return models, ignored, empty if models else []


def _identifier(path, root):
    relative = os.path.relpath(path, root)
    stem, ending = os.path.splitext(relative)
    return stem if ending.lower() in formats.EXTENSIONS and not os.path.isdir(path) else relative


def _distinct_ids(found):
    counts = collections.Counter(i for i, _, _ in found)
    if max(counts.values(), default=0) < 2:
        return found
    shared = os.path.commonpath([os.path.abspath(p) for _, p, _ in found])
    return [(_identifier(os.path.abspath(p), shared), p, r) for _, p, r in found]


# Who is set aside -------------------------------------------------------------------------------------------------


def _set_aside(identifier, file, layer, reason, rule):
    return {"id": identifier, "file": str(file), "layer": layer, "reason": reason, "rule": rule}


def _kind(entry):
    if isinstance(entry, descriptors.LoraPair):
        return "lora"
    return "float" if entry.is_float else "other"


def _layers_of(model):
    return {**model.tensors, **model.adapters}


def _without_odd(opened, allowed, keep):
    """Sets aside models that lack, or hold otherwise, a layer that all but a few hold in one shape.

    A deviation of one or two models is a fault (a truncated export, a transposed matrix); one that more share is how
    the collection is made, and then the layer is grouped by shape. If more than `allowed` models deviate, nobody is
    set aside for it.
    """
    count = len(opened)
    holders = collections.defaultdict(collections.Counter)  # name -> (shape, kind) -> models
    for _, model in opened:
        for name, entry in _layers_of(model).items():
            holders[name][entry.shape, _kind(entry)] += 1
    odd = {}
    for name, forms in holders.items():
        (shape, kind), most = forms.most_common(1)[0]
        if kind == "other" or not keep(name) or most == count or most < SMALLEST_GROUP or count - most > min(allowed, 2):
            continue
        for position, (identifier, model) in enumerate(opened):
            entry = _layers_of(model).get(name)
            if entry is not None and (entry.shape, _kind(entry)) == (shape, kind):
                continue
            if entry is None:
                found = "is missing"
            elif _kind(entry) != kind:
                found = f"is {getattr(entry, 'dtype', 'a low-rank update')}, a weight"
            else:
                found = f"has shape {list(entry.shape)}, shape {list(shape)}"
            reason = f"{found} in the {most} other models" if entry is not None else f"{found}, {most} other models have it"
            message = errors.InputError(
                model.path, reason, key=name, hint="remove the model, or leave the layer out with --exclude_layers"
            )
            odd.setdefault(position, _set_aside(identifier, model.path, name, str(message), "H6"))
    if len(odd) > allowed:
        return opened, []
    return [o for p, o in enumerate(opened) if p not in odd], list(odd.values())


def _require_enough(opened, aside, total, limit):
    shown = "\n".join(f"  {a['reason']}" for a in aside[:20]) + (f"\n  and {len(aside) - 20} more" if len(aside) > 20 else "")
    if len(aside) > limit:
        raise errors.InputError(
            aside[0]["file"],
            f"{len(aside)} of {total} models had to be set aside, {limit} may be",
            hint=f"repair or remove them, or allow it with --max_quarantined={len(aside)}\n{shown}",
            rule="N2",
        )
    if len(opened) < SMALLEST_GROUP:
        file = aside[0]["file"] if aside else (opened[0][1].path if opened else "collection")
        raise errors.InputError(
            file,
            f"{len(opened)} readable models, at least {SMALLEST_GROUP} are needed",
            hint="a collection is a folder with one model a file or one a sub-folder" + (f"\n{shown}" if shown else ""),
            rule="N3",
        )


# Layers -----------------------------------------------------------------------------------------------------------


def _group(models, keep):
    found = {}
    for member, model in enumerate(models):
        for name, entry in _layers_of(model).items():
            if keep(name):
                found.setdefault((name, tuple(entry.shape), _kind(entry)), []).append((member, entry))
    groups, skipped = [], []
    for (name, shape, kind), pairs in sorted(found.items(), key=lambda item: (natural(item[0][0]), item[0][1:])):
        reason = None
        if kind == "other":
            reason = f"not a weight: {pairs[0][1].dtype}"
        elif len(pairs) < SMALLEST_GROUP:
            reason = f"fewer than {SMALLEST_GROUP} models have it in this shape"
        elif math.prod(shape) == 0:
            reason = "it has no entries"
        if reason:
            skipped.append({"name": name, "shape": list(shape), "num_models": len(pairs), "reason": reason})
            continue
        members, entries = zip(*pairs, strict=True)
        groups.append(LayerGroup(name, shape, "lora" if kind == "lora" else "dense", members, entries))
    return tuple(groups), tuple(skipped)


def _stem(name):
    """A layer name without its numbers: dense_31/kernel -> dense/kernel."""
    return re.sub(r"(?:[_-]?\d+)+", "", name)


def _places(model):
    """(stem, shape, how many of that stem and shape came before) -> name; names in natural order."""
    seen, places = collections.Counter(), {}
    for name in sorted(model.tensors, key=natural):
        key = (_stem(name), model.tensors[name].shape)
        places[(*key, seen[key])] = name
        seen[key] += 1
    return places


def _named_by_place(opened):
    """Models whose tensors bear the names that the first model gives to the same places."""
    if not opened:
        return opened
    reference = _places(opened[0][1])
    named = []
    for identifier, model in opened:
        tensors = {reference.get(place, name): model.tensors[name] for place, name in _places(model).items()}
        whole = len(tensors) == len(model.tensors)
        named.append((identifier, dataclasses.replace(model, tensors=tensors) if whole else model))
    return named


def order_hint(models):
    """A sentence where names differ in run numbers only, so that `--match=order` would match the layers; or ''."""
    names = collections.Counter(n for m in models for n in m.tensors)
    if not names or sum(c == len(models) for c in names.values()) >= len(models[0].tensors) / 2:
        return ""
    if len({frozenset(_places(m)) for m in models}) > 1:
        return ""
    return "layer names differ between models in their numbers only; --match=order matches them by their place"


def _fingerprint(opened):
    digest = hashlib.sha256()
    for identifier, model in opened:
        digest.update(repr((identifier, model.format)).encode("utf-8", "surrogateescape"))
        for name, entry in sorted(_layers_of(model).items()):
            tensors = (entry.a, entry.b) if isinstance(entry, descriptors.LoraPair) else (entry,)
            scale = getattr(entry, "scale", None)
            for t in tensors:
                file = (t.extent.file.size, t.extent.file.mtime_ns, t.extent.offset) if t.extent else None
                digest.update(repr((name, t.shape, t.dtype, scale, file)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
