"""Branched merges: a model for every model, some layers shared, in OUT/<model id>/; OUT/merge.json says which."""

import os

import jax
import numpy as np

from jaxsub import errors, formats, lineup, rows
from jaxsub.formats import _files, _rewrite
from jaxsub.merges import _branches, _partitions
from jaxsub.pipelines import layers as layer_loop, merge_store, merge_whole, progress, tracing
from jaxsub.rows import lora


def run(ready, config, module, options, part, of, stream):
    """(folder of the new models in `part`, records of the layers, what the models take together).

    Args:
        ready: what `merge.py` knows of the models before weights are read.
        config, module, options: of the merge.
        part: folder, held by this run.
        of: see `merge_store.Journal`.
        stream: of progress, or None.
    """
    found, sources = ready.found, ready.sources
    opened = sources.opened
    if any(layer.rest for layer in found.layers):
        raise errors.ConfigError("branched: models of one shape are needed; --config.mismatched=copy")
    grams, sizes = [], []
    with progress.Progress(
        sum(layer.group.num_bytes for layer in found.layers), len(found.layers), stream=stream
    ) as bar:
        for layer in found.layers:
            with tracing.stage(layer.name), jax.enable_x64(True):
                grams.append(sources.of(layer).gram())
            sizes.append(size_of(layer))
            bar.layer(layer.name, layer.group.num_bytes, "inner products")
    learner = _learner(found, sources, config, module, options, sizes)
    groups = module.partition(grams, sizes, options, learner, layer_loop.layer_key("", config.seed))
    place, stores = os.path.join(part, "models"), []
    try:
        for number, (ref, model) in enumerate(zip(opened.refs, opened.models, strict=True)):
            formats.ending(model)
            own = os.path.join(part, f"{number:05d}")
            _files.make_folder(own)
            stores.append(merge_store.open_store(own, model, found.layers, f"{of} {ref.id}", config.peft_layout))
        records = [
            _layer(layer, parts, sources, stores, gram)
            for layer, parts, gram in zip(found.layers, groups, grams, strict=True)
        ]
        if os.path.lexists(place):
            _files.remove(place)
        _files.make_folder(place)
        for ref, store in zip(opened.refs, stores, strict=True):
            target = _rewrite.place(place, ref.id)
            _files.make_folder(os.path.dirname(target))
            merge_store.install(store.finish(), target)
    finally:
        for store in stores:
            store.close()
    return place, records, _figures(records, sizes)


def size_of(layer):
    """Numbers of one version of a layer; of low-rank updates those of its factors at the models' largest rank."""
    shape = layer.group.shape
    if not layer.is_lora:
        return int(np.prod(shape))
    return max(e.rank for e in layer.group.entries) * sum(lineup.flat_shape(shape))


def _learner(found, sources, config, module, options, sizes):
    """The Learner of the user's loss, or None without one."""
    if not config.loss:
        return None
    models = merge_whole.read(found, sources)
    if models.means or models.spaces:
        raise errors.ConfigError("branched with a loss takes weights less a base (--base), or low-rank updates, alone")
    return _branches.Learner(models.whole, sources.ids, sizes, merge_whole.load_loss(config, module), options)


def _layer(layer, groups, sources, stores, gram):
    """Gives every model the mean of its group and returns the layer's record."""
    own, lost = sources.of(layer), 0.0
    if layer.is_lora and not sources.cut.rank:
        own.cut = lora.Cut(max(int(own.ranks.max()), 1), sources.cut.energy)
    for members in groups:
        waiting = [n for n in members if stores[n].kept(layer) is None]
        lost += _partitions.within(gram, members)
        if waiting:
            c = np.zeros(own.num_models)
            c[list(members)] = 1 / len(members)
            result = own.combination(c)
            if not layer.is_lora:
                result = rows.Values.of_array(result.array(own.shape))
            for n in waiting:
                stores[n].put(layer, result, {})
    ids = [[sources.ids[n] for n in members] for members in groups]
    shape = list(layer.group.shape)
    return {"name": layer.name, "shape": shape, "method": "branched", "groups": ids, "distance": float(np.sqrt(lost))}


def _figures(records, sizes):
    """What the new models take together."""
    one = float(np.sum(sizes))
    used = float(sum(len(r["groups"]) * size for r, size in zip(records, sizes, strict=True)))
    alone = [r["name"] for r in records if all(len(g) == 1 for g in r["groups"])]
    shared = [r["name"] for r in records if len(r["groups"]) == 1]
    return {"models_worth_of_weights": used / one, "kept_apart": alone, "shared_by_all": shared}
