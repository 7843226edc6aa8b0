"""`jaxsub inspect`: models, formats, layers, ranks, scales and problems of a collection, from headers alone."""

import collections
import dataclasses
import math
import os

from jaxsub import collection as collections_of_models, descriptors, errors

SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of an inspection."""

    collection: tuple[str, ...] = ()  # folders, globs, or text files of paths
    layers: tuple[str, ...] = ()  # regular expressions; only layers that match one
    exclude_layers: tuple[str, ...] = ()
    match: str = "exact"  # exact names, or order (run-numbered names)
    strict: bool = False
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into


def run(config, workdir=None):
    """The page as text; with a workdir, its content as inspect.json too."""
    if not config.collection:
        raise errors.ConfigError("no collection: give --collection=FOLDER (or a glob, or a .txt file of paths)")
    opened = collections_of_models.open_collection(
        list(config.collection),
        layers=config.layers,
        exclude_layers=config.exclude_layers,
        match=config.match,
        allow_roots=config.allow_roots,
        max_quarantined=None if config.max_quarantined < 0 else config.max_quarantined,
        strict=config.strict,
    )
    found = record(opened)
    if workdir:
        from jaxsub.report import _write

        os.makedirs(workdir, exist_ok=True)
        _write.write_json(os.path.join(workdir, "inspect.json"), found)
    return page(found)


def record(opened):
    """What there is to say about a Collection, as plain data."""
    layers = []
    for group in opened.groups:
        entry = {
            "name": group.name,
            "shape": list(group.shape),
            "parametrisation": group.parametrisation,
            "num_models": len(group.members),
            "dtypes": sorted({t.dtype for e in group.entries for t in _tensors(e)}),
        }
        if group.parametrisation == "lora":
            entry["ranks"] = dict(collections.Counter(e.rank for e in group.entries))
            entry["scales"] = dict(collections.Counter(f"{e.scale:g}" for e in group.entries))
        layers.append(entry)
    return {
        "num_models": len(opened.refs),
        "formats": dict(collections.Counter(r.format for r in opened.refs)),
        "bytes": sum(t.num_bytes for g in opened.groups for e in g.entries for t in _tensors(e)),
        "layers": layers,
        "shapes": [
            {"shape": list(s), "parametrisation": p, "num_layers": n}
            for (s, p), n in collections.Counter((g.shape, g.parametrisation) for g in opened.groups).most_common()
        ],
        "skipped_layers": [dict(s) for s in opened.skipped_layers],
        "quarantined": [dict(q) for q in opened.quarantined],
        "ignored": len(opened.ignored),
        "warnings": [*opened.warnings, *(f"{m.path}: {w}" for m in opened.models for w in m.warnings)],
    }


def _tensors(entry):
    return (entry.a, entry.b) if isinstance(entry, descriptors.LoraPair) else (entry,)


def page(found):
    """The record as text of at most 100 columns, names escaped."""
    kinds = ", ".join(f"{n} {form}" for form, n in found["formats"].items())
    parameters = sum(math.prod(layer["shape"]) for layer in found["layers"])
    lines = [
        f"{found['num_models']} models ({kinds}), {len(found['layers'])} layers, {parameters:,} numbers a model, "
        f"{found['bytes'] / 2**20:,.1f} MiB to read",
        "",
        f"{'layer':50} {'shape':>16} {'models':>6}  dtype",
    ]
    for layer in found["layers"][:SHOWN]:
        shape = "x".join(map(str, layer["shape"])) or "scalar"
        detail = ",".join(layer["dtypes"])
        if "ranks" in layer:
            detail += " rank " + ",".join(map(str, list(layer["ranks"])[:4]))
            detail += " scale " + ",".join(list(layer["scales"])[:3])
        lines.append(f"{errors.quote(layer['name'], 50):50} {shape:>16} {layer['num_models']:>6}  {detail}"[:100])
    if len(found["layers"]) > SHOWN:
        lines.append(f"... and {len(found['layers']) - SHOWN} more")
    shapes = [f"{s['num_layers']} x {'x'.join(map(str, s['shape']))}" for s in found["shapes"][:8]]
    lines += ["", f"layers of equal shape: {'; '.join(shapes)}"[:100]]
    for title, key in (("set aside", "quarantined"), ("layers skipped", "skipped_layers"), ("warnings", "warnings")):
        rows = found[key]
        if rows:
            lines.append(f"{title} ({len(rows)}):")
            lines += [f"  {_sentence(row)}" for row in rows[:20]]
            if len(rows) > 20:
                lines.append(f"  and {len(rows) - 20} more")
    if found["ignored"]:
        lines.append(f"{found['ignored']} other files ignored")
    return "\n".join(lines)


def _sentence(row):
    if isinstance(row, str):
        return errors.quote(row, 300)
    if "num_models" in row:
        return f"{errors.quote(row['name'], 60)} {row['shape']}: {row['reason']} ({row['num_models']} models)"
    return f"{errors.quote(row['id'], 60)}: {errors.quote(row['reason'], 300)}"
