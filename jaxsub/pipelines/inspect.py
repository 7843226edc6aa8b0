"""`jaxsub inspect`: what a collection holds and what is wrong with it, from headers alone.

A collection that `analyze` would refuse is described all the same, and the refusal is raised after that.
"""

import collections
import dataclasses
import math
import os
import textwrap

from jaxsub import collection as model_collections, errors
from jaxsub.lineup import SMALLEST_GROUP
from jaxsub.report import words

WIDTH = 100  # columns of the page
MOST_LAYERS = 60
MOST_ROWS = 20


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of an inspection."""

    collection: tuple[str, ...] = ()  # folders, globs, text files of paths, or org/name of the hub cache
    layers: tuple[str, ...] = ()  # regular expressions; only layers that match one
    exclude_layers: tuple[str, ...] = ()  # regular expressions; no layers that match one
    match: str = "exact"  # exact names, or order (run-numbered names)
    strict: bool = False  # any model set aside is fatal
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into


def run(config, workdir=None, *, write=None):
    """Describes a collection; with a workdir, in inspect.json there too.

    Args:
        config: Config.
        workdir: output folder, or None.
        write: takes the page as text, or None.

    Returns:
        dict, as inspect.json.

    Raises:
        ConfigError: no collection is named, or options select no layer.
        InputError: nothing there, or too many models set aside, or too few left; after the page was written.
    """
    if not config.collection:
        raise errors.ConfigError("no collection: give --collection=FOLDER (or a glob, or a .txt file of paths)")
    opened = model_collections.open_collection(
        config.collection,
        layers=config.layers,
        exclude_layers=config.exclude_layers,
        match=config.match,
        allow_roots=config.allow_roots,
        max_quarantined=None if config.max_quarantined < 0 else config.max_quarantined,
        strict=config.strict,
        check=False,
    )
    found = record(opened)
    if workdir:
        from jaxsub.formats import _files
        from jaxsub.report import _write

        _files.make_folder(workdir)
        _write.write_json(os.path.join(workdir, "inspect.json"), found)
    if write is not None:
        write(page(found))
    # Layers that do not match are what this program explains; models that cannot be used are refused as elsewhere.
    if opened.refusal is not None and (opened.groups or opened.quarantined or len(opened.refs) < SMALLEST_GROUP):
        refusal = opened.refusal
        if write is None:
            raise refusal
        advice = refusal.hint.partition("\n")[0].rstrip(":")  # whom it is about is on the page
        raise errors.InputError(refusal.file, refusal.reason, key=refusal.key, hint=advice, rule=refusal.rule)
    return found


def record(opened):
    """What there is to say about a Collection, as plain data."""
    alike = collections.Counter((g.shape, g.parametrisation) for g in opened.groups)
    several = collections.Counter(g.name for g in opened.groups)
    return {
        "schema": "jaxsub.inspect/1",
        "num_candidates": opened.num_candidates,
        "num_models": len(opened.refs),
        "formats": dict(sorted(collections.Counter(r.format for r in opened.refs).items())),
        "num_bytes": sum(g.num_bytes for g in opened.groups),
        "fingerprint": opened.fingerprint,
        "models": [{"id": r.id, "path": r.path, "format": r.format} for r in opened.refs],
        "layers": [_layer(group) for group in opened.groups],
        "equal_shapes": [
            {"shape": list(shape), "parametrisation": kind, "num_layers": count}
            for (shape, kind), count in sorted(alike.items(), key=lambda item: (-item[1], item[0]))
        ],
        "several_shapes": [name for name, count in several.items() if count > 1],
        "skipped_layers": [dict(s) for s in opened.skipped_layers],
        "quarantined": [dict(q) for q in opened.quarantined],
        "ignored": list(opened.ignored),
        "warnings": list(opened.warnings),
        "refusal": str(opened.refusal) if opened.refusal is not None else None,
    }


def _layer(group):
    found = {
        "name": group.name,
        "shape": list(group.shape),
        "parametrisation": group.parametrisation,
        "num_models": len(group.members),
        "num_bytes": group.num_bytes,
        "dtypes": list(group.dtypes),
    }
    if group.ranks:
        found["ranks"] = {str(r): n for r, n in sorted(collections.Counter(group.ranks).items())}
        scales = collections.Counter(f"{e.scale:g}" for e in group.entries)
        found["scales"] = dict(sorted(scales.items(), key=lambda item: float(item[0])))
    return found


# The page ---------------------------------------------------------------------------------------------------------


def page(found):
    """The record as text of at most 100 columns, names escaped."""
    lines = [*_head(found), *_layers(found["layers"]), *_shapes(found)]
    lines += _list("set aside", [f"{errors.quote(q['id'], 60)}: {_safe(q['reason'])}" for q in found["quarantined"]])
    lines += _list("layers skipped", _skipped(found["skipped_layers"]))
    lines += _list("warnings", [_safe(w) for w in found["warnings"]])
    lines += _list("no models, ignored", [errors.quote(path) for path in found["ignored"]], most=5)
    if found["refusal"]:
        first = found["refusal"].splitlines()[0].rstrip(":")
        lines += ["", *_wrapped(f"`jaxsub analyze` would refuse this collection: {first}", "", "  ")]
    return "\n".join(lines) + "\n"


def _head(found):
    kinds = ", ".join(f"{count} {form}" for form, count in found["formats"].items())
    models = f"{words.plural(found['num_models'], 'model')}" + (f" ({kinds})" if kinds else "")
    if found["num_candidates"] > found["num_models"]:
        models += f" of {found['num_candidates']} found"
    numbers = sum(math.prod(layer["shape"]) for layer in found["layers"])
    text = f"{models}, {words.plural(len(found['layers']), 'layer')}, {numbers:,} weights in all layers, "
    return _wrapped(text + f"{_size(found['num_bytes'])} to read", "", "  ")


def _layers(layers):
    if not layers:
        return []
    rows = [("layer", "shape", "models", "stored as"), *(_row(layer) for layer in layers[:MOST_LAYERS])]
    shape, models = (max(len(row[c]) for row in rows) for c in (1, 2))
    stored = min(max(len(row[3]) for row in rows), 52)
    name = min(max(len(row[0]) for row in rows), WIDTH - shape - models - stored - 6)
    lines = [""]
    for label, row in zip(words.distinct([row[0] for row in rows], name), rows, strict=True):
        lines.append(f"{label:{name}}  {row[1]:>{shape}}  {row[2]:>{models}}  {words.cut(row[3], stored)}".rstrip())
    if len(layers) > MOST_LAYERS:
        lines.append(f"and {len(layers) - MOST_LAYERS} more layers")
    return lines


def _row(layer):
    stored = ",".join(layer["dtypes"])
    if layer["parametrisation"] == "lora":
        stored += f" LoRA r={_several(layer['ranks'])} scale={_several(layer['scales'])}"
    return (errors.quote(layer["name"]), _shape(layer["shape"]), str(layer["num_models"]), stored)


def _several(counts):
    values = list(counts)
    return values[0] if len(values) == 1 else f"{values[0]}..{values[-1]}"


def _shapes(found):
    if not found["equal_shapes"]:
        return []
    texts = [
        f"{s['num_layers']} of {_shape(s['shape'])}" + (" (LoRA)" if s["parametrisation"] == "lora" else "")
        for s in found["equal_shapes"][:12]
    ]
    more = f", and {len(found['equal_shapes']) - 12} more shapes" if len(found["equal_shapes"]) > 12 else ""
    lines = ["", *_wrapped("layers of equal shape: " + ", ".join(texts) + more, "", "  ")]
    if found["several_shapes"]:
        names = ", ".join(errors.quote(n, 60) for n in found["several_shapes"][:5])
        lines += _wrapped(f"in more than one shape, each its own group of models: {names}", "", "  ")
    return lines


def _skipped(layers):
    """One row a reason, with the first few layers it is about."""
    by_reason = collections.defaultdict(list)
    for layer in layers:
        by_reason[layer["reason"]].append(layer)
    rows = []
    for reason, same in by_reason.items():
        named = ", ".join(_named(layer) for layer in same[:3])
        more = f", and {len(same) - 3} more" if len(same) > 3 else ""
        rows.append(f"{_safe(reason)}: {named}{more}")
    return rows


def _named(layer):
    shape = f" {_shape(layer['shape'])}" if layer["shape"] is not None else ""
    return f"{errors.quote(layer['name'], 60)}{shape} ({words.plural(layer['num_models'], 'model')})"


def _list(title, rows, most=MOST_ROWS):
    if not rows:
        return []
    lines = ["", f"{title}:"]
    for row in rows[:most]:
        lines += _wrapped(row, "  ", "    ")
    return lines + ([f"  and {len(rows) - most} more"] if len(rows) > most else [])


def _safe(text):
    """Text that is printed as it is unless a character in it could do harm; errors have quoted their names before."""
    return text if text.isascii() and text.isprintable() and len(text) <= 600 else errors.quote(text, 600)


def _wrapped(text, first, rest):
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _shape(shape):
    return "x".join(map(str, shape)) or "scalar"


def _size(num_bytes):
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
