"""Whether models share a start, from a sample of their weights: those that do not have no mean that is a model.

Cosines of up to a quarter of a million weights a model, the same places of all, tell kin from strangers: models of one
start keep a cosine of .19 and more, strangers have one of about 0 (`lineage`). Low-rank updates say nothing of their
start; there the names of their base models are compared.
"""

import dataclasses
import math

import numpy as np

from jaxsub import errors, lineage, lineup, reading
from jaxsub.rows import files

SAMPLED = 2**18  # weights of each model that are looked at, over all layers
LEAST = 4096  # of each layer
HELD = 2**23  # of a layer, all models together: 64 MiB
ALIGN = "models of different starts have their hidden units in another order: align them first, or merge kin"


@dataclasses.dataclass(frozen=True)
class Kin:
    """What was found: `figures` for the record, and sentences for the user."""

    figures: dict
    said: tuple[str, ...] = ()


def require(found, sources, config):
    """The Kin of the models of a `merge_layers.Lineup`.

    Raises:
        InputError: they do not share a start, and `config.force` does not say to merge them all the same.
    """
    kin, reason = look(found, sources)
    if reason and not config.force:
        path = sources.opened.models[found.template].path
        raise errors.InputError(path, reason, hint=f"{ALIGN}; --force merges them as they are", rule="N2")
    return dataclasses.replace(kin, said=(f"forced: {reason}",)) if reason else kin


def look(found, sources):
    """(Kin, why the models should not be merged or "")."""
    opened = sources.opened
    names = [ref.id for ref in opened.refs]
    bases = {model.metadata.get("base_model_name_or_path", "") for model in opened.models} - {""}
    dense = [layer for layer in found.layers if not layer.is_lora]
    if len(bases) > 1 and len(dense) < len(found.layers):
        return Kin({"bases": sorted(bases)}), f"adapters of different base models: {lineup.listed(sorted(bases), 3)}"
    layers = [layer for layer in dense if len(layer.group.shape) > 1] or dense
    has_updates = len(dense) < len(found.layers)
    if len(names) + (sources.base is not None) < 2 or not layers or has_updates:
        return Kin({}), ""
    return _dense(layers, sources, names)


def _dense(layers, sources, names):
    labels = [*names, *(["the base"] if sources.base is not None else [])]
    total, parts = 0, []
    for layer in layers:
        x = sample(layer, sources, max(LEAST, min(SAMPLED // len(layers), HELD // len(labels))))
        parts.append((np.arange(len(x)), x @ x.T, x.sum(axis=1), x.shape[1]))
        total += x.shape[1]
    cosine, _ = lineage.related(parts, len(labels))
    if lineage.chance_threshold(total) >= 1:
        said = f"{total} weights are too few to tell whether the models share a start: this was not looked at"
        return Kin({"sampled": total}, (said,)), ""
    groups = lineage.groups(cosine, total)
    upper = cosine[np.triu_indices(len(labels), 1)]
    figures = {
        "sampled": total,
        "cosine_min": float(upper.min()),
        "cosine_median": float(np.median(upper)),
        "lineages": [[labels[i] for i in group] for group in groups],
    }
    if groups and len(groups[0]) == len(labels):
        return Kin(figures), ""
    alone = [labels[i] for i in range(len(labels)) if not groups or i not in groups[0]]
    parts = f"{len(groups[0])} of {len(labels)} share one, " if groups else ""
    shown = lineup.listed(alone, 3)
    reason = (
        f"the models do not share a start: {parts}not {shown} (cosines from {upper.min():.2f} to {upper.max():.2f})"
    )
    return Kin(figures), reason


def sample(layer, sources, count):
    """(N, n) float64 entries of a dense layer from the same places of every model, the base last if there is one.

    Four pieces, spread over the layer; n is about `count`, or all there are.
    """
    group, size = layer.group, math.prod(layer.group.shape)
    models = [(sources.opened.models[m], e) for m, e in zip(group.members, group.entries, strict=True)]
    if sources.base is not None:
        models.append((sources.base, files.require_base(sources.base, group.name, group.shape)))
    pieces = 4 if size > count else 1
    length = min(size, count) // pieces
    starts = [i * (size - length) // max(pieces - 1, 1) for i in range(pieces)]
    x = np.empty((len(models), pieces * length))
    for row, (model, tensor) in zip(x, models, strict=True):
        source = reading.Source(model, tensor)
        for i, start in enumerate(starts):
            source.read(start, length, row[i * length : (i + 1) * length])
    np.nan_to_num(x, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return _within(x)


def _within(x):
    """Rows scaled by powers of two, in place, so that squares are finite."""
    largest = np.maximum(x.max(axis=1, initial=0.0), -x.min(axis=1, initial=0.0))
    return np.ldexp(x, -np.frexp(np.where(largest > 0, largest, 1.0))[1][:, None], out=x)
