"""A folder of models as one collection: which models, which layers, who is set aside. Headers only, no jax.

    paths --finding--> candidates --formats--> Models --lineup--> LayerGroups

The order of `refs` is the row order everywhere. Ids and names are data that anyone may have written: they are kept
as they are and escaped where they are shown.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Mapping

from jaxsub import descriptors, errors, finding, formats, lineup

MOST_LISTED = 20  # models in one error message
MOST_METADATA = 2**30  # characters beside the tensors of all models, which stay in memory
_MATCHES = ("exact", "order")


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Models that have a layer of one name and shape.

    Attributes:
        name: the layer.
        shape: of the weight; of Delta-W for low-rank updates.
        parametrisation: "dense" or "lora".
        members: positions in `Collection.models`, ascending.
        entries: a Tensor or LoraPair a member.
    """

    name: str
    shape: tuple[int, ...]
    parametrisation: str
    members: tuple[int, ...]
    entries: tuple

    @property
    def dtypes(self):
        """Storage dtypes that occur, sorted."""
        tensors = (t for e in self.entries for t in stored_tensors(e))
        return tuple(sorted({t.dtype: True for t in tensors}))

    @property
    def ranks(self):
        """LoRA rank of every member; empty for dense layers."""
        return tuple(e.rank for e in self.entries) if self.parametrisation == lineup.LORA else ()

    @property
    def num_bytes(self):
        """Stored bytes of all members."""
        return sum(t.num_bytes for e in self.entries for t in stored_tensors(e))


@dataclasses.dataclass(frozen=True)
class Collection:
    """Models in row order and the layers they share; made by `open_collection`.

    Attributes:
        refs: a ModelRef a model.
        models: a Model a model, same order.
        groups: LayerGroups of at least three models, by name (numbers as numbers), then shape.
        skipped_layers: {"name", "shape", "num_models", "reason"} of layers no group was made of.
        quarantined: {"id", "file", "layer" or None, "reason", "rule"} of models set aside.
        ignored: paths in the collection's folders that are no models.
        warnings: what a careful user should know, one sentence each.
        fingerprint: sha256 over ids, file sizes and times, names, shapes, dtypes and scales.
        num_candidates: models found, readable or not.
        refusal: the InputError that `open_collection` raises for this collection, or None.
        name: of the folder or folders, for people; data, as the ids are.
    """

    refs: tuple[descriptors.ModelRef, ...]
    models: tuple[descriptors.Model, ...]
    groups: tuple[LayerGroup, ...]
    skipped_layers: tuple[Mapping, ...]
    quarantined: tuple[Mapping, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    fingerprint: str
    num_candidates: int = 0
    refusal: errors.InputError | None = None
    layers: tuple[Mapping, ...] = dataclasses.field(default=(), repr=False)  # of every model, as selected and matched
    name: str = ""
    smallest: int = lineup.SMALLEST_GROUP  # models that a layer group must have

    def without(self, ids, reasons=None):
        """The collection without some models; layers left to fewer than three are skipped.

        Args:
            ids: ids to leave out.
            reasons: id -> why, for those that are faulty and so count as set aside; others are just left out.

        Raises:
            ConfigError: an id that is not in the collection.
        """
        known = {r.id: m.path for r, m in zip(self.refs, self.models, strict=True)}
        for identifier in ids:
            if identifier not in known:
                raise errors.ConfigError(
                    f"no model {identifier!r} in the collection{errors.nearest(identifier, known)}"
                )
        aside = [_record(i, known[i], None, r, "") for i, r in (reasons or {}).items() if i in known]
        keep = [position for position, ref in enumerate(self.refs) if ref.id not in ids]
        refs, models, layers = (tuple(x[p] for p in keep) for x in (self.refs, self.models, self.layers))
        groups, skipped = _grouped(models, layers, self.smallest)
        return dataclasses.replace(
            self,
            refs=refs,
            models=models,
            layers=layers,
            groups=groups,
            skipped_layers=skipped,
            quarantined=(*self.quarantined, *aside),
            fingerprint=_fingerprint(refs, models),
        )


def open_collection(
    paths,
    *,
    layers=None,
    exclude_layers=None,
    match="exact",
    allow_roots=(),
    max_quarantined=None,
    strict=False,
    check=True,
    odd=True,
    smallest=lineup.SMALLEST_GROUP,
):
    """A collection of models, from headers only.

    Args:
        paths: a folder (one model a file or a sub-folder, searched recursively), a glob, a .txt file of paths (one
            a line, relative to the file), org/name[@revision] in the local cache of downloads, or a list of these.
        layers: regular expressions, one or several; layers whose name none of them finds a place in are left out.
        exclude_layers: the same, for layers to leave out.
        match: "exact" names, or "order" for names that differ in run numbers only (Keras).
        allow_roots: folders outside the collection that links in it may lead into.
        max_quarantined: models that may be set aside; None for the larger of 1 and 5 %.
        strict: no model may be set aside.
        check: raise what is in `refusal`; without, a collection that cannot be analysed can be looked at.
        odd: set models aside that lack, or hold in another form, a layer that nearly all others agree on.
        smallest: models that make a collection, and a layer group; 1 for models that are only to be projected.

    Returns:
        Collection.

    Raises:
        ConfigError: a bad regular expression or `match`, or `layers` that select nothing.
        InputError: nothing there, too many models set aside, fewer than `smallest` left, or no layer in common.
    """
    if match not in _MATCHES:
        raise errors.ConfigError(f"match is {match!r}, known are exact and order{errors.nearest(match, _MATCHES)}")
    chosen = lineup.layer_filter(layers, exclude_layers)
    found = finding.find(paths, tuple(allow_roots))
    num_candidates = len(found.candidates) + len(found.refused)
    if not num_candidates:
        raise errors.InputError(_shown(paths), "holds no model", hint=_known_endings(), rule="N3")
    opened, aside = _open_all(found, tuple(allow_roots))
    every = [lineup.layers_of(model) for _, model in opened]
    hint = "" if match == "order" or not lineup.would_match_by_place(every) else _ORDER_HINT
    every = lineup.by_place(every) if match == "order" else every
    chosen_layers = [{key: entry for key, entry in own.items() if chosen(key[0])} for own in every]
    if every and not any(chosen_layers):
        raise errors.ConfigError(lineup.nothing_chosen(layers, exclude_layers, every))
    usual = max(1, num_candidates // 20)
    found_odd = lineup.odd_models(chosen_layers, usual) if odd else {}
    for position, (layer, what) in found_odd.items():
        candidate, model = opened[position]
        error = odd_error(model.path, layer, what)
        aside.append(_record(candidate.id, model.path, layer, str(error), error.rule))
    keep = [position for position in range(len(opened)) if position not in found_odd]
    pairs = [opened[p] for p in keep]
    refs = tuple(descriptors.ModelRef(id=c.id, path=m.path, format=m.format, labels=m.metadata) for c, m in pairs)
    models = tuple(m for _, m in pairs)
    kept_layers = tuple(chosen_layers[p] for p in keep)
    groups, skipped = _grouped(models, kept_layers, smallest)
    aside.sort(key=lambda record: os.fsencode(record["id"]))
    limit = 0 if strict else usual if max_quarantined is None else max_quarantined
    refusal = _refusal(paths, num_candidates, aside, limit, refs, smallest) or _no_layers(paths, groups, hint)
    if refusal and check:
        raise refusal
    return Collection(
        refs=refs,
        models=models,
        groups=groups,
        skipped_layers=skipped,
        quarantined=tuple(aside),
        ignored=tuple(found.ignored),
        warnings=(
            *((hint,) if hint else ()),
            *lineup.unmatched(layers, exclude_layers, every),
            *_kinds(refs, kept_layers, groups),
            *_repeated_warnings(refs, models),
        ),
        fingerprint=_fingerprint(refs, models),
        num_candidates=num_candidates,
        refusal=refusal,
        layers=kept_layers,
        name=finding.name_of(found.folders),
        smallest=smallest,
    )


_ORDER_HINT = "layer names differ from model to model in run numbers only: --match=order matches them by their place"
_ODD_HINT = "repair or remove the model, or leave the layer out with --exclude_layers"
_STRANGER_HINT = "if it is of another architecture, move it out of the collection"


def odd_error(path, layer, what):
    """The InputError of a model that `lineup.odd_models` names, with what it found."""
    return errors.InputError(path, what, key=layer, hint=_STRANGER_HINT if layer is None else _ODD_HINT, rule="N2")


def stored_tensors(entry):
    """The stored arrays of a layer: a Tensor itself, or the two factors of a LoraPair."""
    return (entry.a, entry.b) if isinstance(entry, descriptors.LoraPair) else (entry,)


def _open_all(found, allow_roots):
    """[(Candidate, Model)] and the records of what was refused."""
    opened, aside = [], [_record(c.id, e.file, e.key, str(e), e.rule) for c, e in found.refused]
    noted = 0
    for candidate in found.candidates:
        try:
            model = formats.open_model(candidate.path, root=candidate.root, allow_roots=allow_roots)
            noted += sum(len(key) + len(value) for key, value in model.metadata.items())
            if noted > MOST_METADATA:
                reason = f"is where the models' metadata pass {MOST_METADATA >> 20} MiB"
                raise errors.InputError(model.path, reason, hint="leave them out of the files", rule="H19")
        except errors.InputError as error:
            aside.append(_record(candidate.id, error.file, error.key, str(error), error.rule))
        else:
            opened.append((candidate, model))
    return opened, aside


def _record(identifier, file, layer, reason, rule):
    return {"id": identifier, "file": str(file), "layer": layer, "reason": reason, "rule": rule}


def _grouped(models, layers, smallest):
    groups, skipped = lineup.stacks(layers, smallest)
    counts = collections.Counter(item for m in models for item in m.skipped.items())
    for (name, reason), count in sorted(counts.items(), key=lambda item: lineup.natural(item[0][0])):
        skipped.append({"name": name, "shape": None, "num_models": count, "reason": reason})
    return tuple(LayerGroup(*group) for group in groups), tuple(skipped)


# What is refused --------------------------------------------------------------------------------------------------


def _refusal(paths, num_candidates, aside, limit, refs, smallest):
    listed = [f"\n  {errors.quote(a['id'])}: {a['reason']}" for a in aside[:MOST_LISTED]]
    if len(aside) > MOST_LISTED:
        listed.append(f"\n  and {len(aside) - MOST_LISTED} more")
    if len(aside) > limit:
        few = f"at most {limit} may be" if limit else "none may be"
        reason = f"{len(aside)} of {num_candidates} models had to be set aside, {few}"
        hint = f"repair or remove them, or allow it with --max_quarantined={len(aside)}:{''.join(listed)}"
        return errors.InputError(_shown(paths), reason, hint=hint, rule="N2")
    if len(refs) < smallest:
        models = "model" if len(refs) == 1 else "models"
        reason = f"{len(refs)} readable {models}, at least {smallest} are needed"
        hint = "a collection is a folder with one model a file, or one a sub-folder" + "".join(listed)
        return errors.InputError(_shown(paths), reason, hint=hint, rule="N3")
    return None


def _no_layers(paths, groups, hint):
    if groups:
        return None
    hint = hint or "are these models of one architecture? `jaxsub inspect` shows what they hold"
    return errors.InputError(
        _shown(paths), f"no layer is shared by {lineup.SMALLEST_GROUP} models", hint=hint, rule="N2"
    )


def _shown(paths):
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else [os.fspath(p) for p in paths]
    return os.fspath(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") if paths else "collection"


def _known_endings():
    return f"known endings: {', '.join(sorted(formats.EXTENSIONS))}"


# What is said about it --------------------------------------------------------------------------------------------


def _kinds(refs, layers, groups):
    """Who takes part in no layer that is analysed, and which models share no layer with which."""
    kinds = lineup.kinds(len(refs), [group.members for group in groups])
    large = [kind for kind in kinds if len(kind) > 1]
    apart = [kind[0] for kind in kinds if len(kind) == 1]
    said = []
    if len(large) > 1:
        each = ", ".join(f"{len(kind)} like {errors.quote(refs[kind[0]].id, 60)}" for kind in large[:5])
        more = f" and {len(large) - 5} more kinds" if len(large) > 5 else ""
        said.append(
            f"{len(large)} kinds of models share no layer with one another: {each}{more}; if they are other "
            "architectures, analyse each kind by itself, in a folder of its own"
        )
    if large and apart:
        who = lineup.listed([refs[i].id for i in apart])
        if any(layers[i] for i in apart):
            why = f"fewer than {lineup.SMALLEST_GROUP} models have their layers in these shapes"
            cure = "if they are of another architecture, move them out of the collection"
        else:
            why, cure = "they hold none of the layers chosen", "choose other --layers, or move them out"
        models = "model takes" if len(apart) == 1 else "models take"
        said.append(f"{len(apart)} of {len(refs)} {models} part in no layer that is analysed: {who} ({why}); {cure}")
    return said


def _repeated_warnings(refs, models):
    """One sentence for each distinct warning, with the models it is about."""
    about = collections.defaultdict(list)
    for ref, model in zip(refs, models, strict=True):
        for warning in model.warnings:
            about[warning].append(ref.id)
    return [
        f"{errors.quote(ids[0], 80)}{f' and {len(ids) - 1} more' if len(ids) > 1 else ''}: {warning}"
        for warning, ids in about.items()
    ]


def _fingerprint(refs, models):
    whole = hashlib.sha256()
    for ref, model in sorted(zip(refs, models, strict=True), key=lambda pair: os.fsencode(pair[0].id)):
        whole.update(ascii((ref.id, model.format, *_model_identity(model))).encode())
    return whole.hexdigest()


def digest(model):
    """What the fingerprint knows of one Model, as 16 hexadecimal digits: says which one it was that changed."""
    return hashlib.sha256(ascii((model.format, *_model_identity(model))).encode()).hexdigest()[:16]


def _model_identity(model):
    files, parts = {}, []
    for (name, kind), entry in sorted(lineup.layers_of(model).items()):
        tensors = stored_tensors(entry)
        how = (getattr(entry, "scale", None), getattr(entry, "transposed", None), entry.shape)
        parts.append((name, kind, how, [(t.shape, t.dtype) for t in tensors]))
        for file in (f for t in tensors for f in files_of(t, model)):
            files[file.path] = (file.size, file.mtime_ns)
    sizes = [(os.path.relpath(path, model.path), *files[path]) for path in sorted(files, key=os.fsencode)]
    return sizes, parts


def files_of(tensor, model):
    """FileIds of what a stored tensor is read from."""
    if tensor.extent is not None:
        return (tensor.extent.file,)
    return model.files
