"""`jaxsub merge`: many models become one, in their own format, layer by layer.

open (headers) -> line-up of layers -> plan -> are they kin? -> layer by layer: rows, method, result -> new model

What is read of a layer is a block of columns of all models, or one model after the other; what is finished is kept.
"""

import dataclasses
import hashlib
import json
import os
import shutil

from jaxsub import bundle as bundles, config as configs, errors, formats, hostmemory, lineup, plugins, rows, solvers
from jaxsub.bundle import files as bundle_files
from jaxsub.formats import _files
from jaxsub.pipelines import (
    aside,
    layers as layer_loop,
    merge_branched,
    merge_kin,
    merge_layers,
    merge_options,
    merge_plan,
    merge_rows,
    merge_store,
    merge_whole,
    merge_words,
    mergekit,
    plan,
    progress,
    tracing,
    workdir as workdirs,
    zoo,
)
from jaxsub.report import _write
from jaxsub.rows import lora

SCHEMA, RECORD, PART = "jaxsub.merge/1", "merge.json", ".part"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a merge; each can be set as --config.<field>=."""

    collection: tuple[str, ...] = ()  # the models: folders, globs, text files of paths, or org/name
    method: str = ""  # name of a module of jaxsub.merges: mean, task_arithmetic, ties, ...
    options: tuple[str, ...] = ()  # of the method, as name=value
    base: str = ""  # the model that they were trained from; updates are differences to it
    out: str = ""  # new folder for the merged model; WORKDIR/merged by default
    weights: tuple[str, ...] = ()  # of the models: one each in the order of their ids, or id=weight
    statistics: str = ""  # folder of statistics of your evaluator, for fisher and regmean: <model id>.safetensors
    bundle: str = ""  # folder that fit wrote: its layers are merged as coefficients
    loss: str = ""  # module:function of yours, f(weights) -> number, traceable by JAX; for adamerging and concrete
    bench: str = ""  # configuration file of a comparison of methods, in place of a merge; see merge_bench
    score: str = ""  # module:function of yours for bench, f(weights, model_id, part) -> number, higher is better
    mergekit_yaml: str = ""  # a recipe of mergekit, in place of collection, method, options, base and weights
    layers: tuple[str, ...] = ()  # regular expressions; only layers that match one; the others are the first model's
    exclude_layers: tuple[str, ...] = ()  # layers that stay the first model's
    mismatched: str = "fail"  # layers that do not fit: fail, copy (the first model's), crop (to common rows, else copy)
    rank: int = 0  # of merged low-rank updates, at most; 0: that of all models together
    energy: float = 0.0  # share of a merged low-rank update that its rank must hold; 0: all
    peft_layout: str = ""  # of merged PEFT adapters: portable (for servers too), or exact (by default of saved modules)
    seed: int = 0  # of methods that draw
    force: bool = False  # merge models that do not share a start
    dry_run: bool = False  # read the models once and say whether merging them can work; writes nothing
    strict: bool = False  # as max_quarantined=0
    max_quarantined: int = 0  # models that may be set aside; -1: max(1, 5 %)
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    max_host_bytes: int = 0  # bound on the plan's peak; 0: what is free
    restart: bool = False  # start over where another merge was begun
    break_lock: bool = False  # take over what a run on another host left; make sure that it has ended


def run(config, workdir=None, *, stream=None):
    """Merges the models of a collection into the new folder `config.out`, or `workdir`/merged.

    Killed, the same call goes on behind the last finished layer and gives the same bytes.

    Returns:
        dict, as in OUT/merge.json: "method", "models", "layers", "copied", "said"; with `dry_run` the diagnosis.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError: see `jaxsub.errors`.
    """
    dtype = ""
    if config.mergekit_yaml:
        config, dtype = mergekit.apply(config)
    module, options = validate(config)
    opened = _open(config)
    if dtype:
        mergekit.require_dtype(opened, dtype)
    out = config.out or (os.path.join(workdir, "merged") if workdir else "")
    if config.dry_run:
        return aside.going_on(lambda left: _diagnosis(left, config, module, stream), opened, config, least=1)
    if not out:
        raise errors.ConfigError("no place for the merged model: give --out=FOLDER")
    workdirs.require_outside(out, config.collection, "--out")
    prepared = _prepare(opened, config, module)  # what no run could do leaves no trace
    identity = workdirs.identity("merge", config, opened, base=prepared.sources.base) | prepared.sources.identity()
    known = _finished(out, identity)
    if known is not None:
        if stream is not None:
            stream.write(f"{errors.quote(out)}: there already, of the same run\n")
        return known
    part = os.path.abspath(out) + PART
    hostmemory.free_at_once()
    with workdirs.hold(part, identity, restart=config.restart, break_lock=config.break_lock, flag="--out"):

        def work(left):
            ready = prepared if left is opened else _prepare(left, config, module)
            # BLAS threads spin against XLA's and the readers': an SVD of 1024 x 1024 took 17 s instead of 0.9.
            with hostmemory.one_blas_thread():
                return _merge(ready, config, module, options, part, identity, stream)

        place, record = aside.going_on(work, opened, config, least=1)
        _files.require_new(out, "remove it or give another --out")
        merge_store.install(place, out)
    shutil.rmtree(part, ignore_errors=True)
    return record


def _open(config):
    opened = aside.open_collection(config, smallest=1, odd=False)
    if config.max_quarantined == 0 or config.strict or config.mismatched != "fail":
        return opened
    return merge_layers.without_odd(opened, _base(config), _chosen(config), config)


def _base(config):
    return formats.open_model(config.base, allow_roots=config.allow_roots) if config.base else None


def _bundle(config, found):
    """The Bundle that layers are merged in, or None; one that would change nothing is refused."""
    if not config.bundle:
        return None
    bundle, groups = bundle_files.load(config.bundle), [layer.group for layer in found.layers]
    if bundle.is_of_factors:
        raise errors.ConfigError(
            f"{errors.quote(config.bundle)}: holds LoRA's A and B apart (--view=lora_factors), whose means are not "
            "those of the updates; give a bundle that was fitted without it"
        )
    if not any(bundle.layer(group.name, group.shape, group.parametrisation) for group in groups):
        raise errors.ConfigError(f"{errors.quote(config.bundle)}: {bundles.NOTHING_SHARED}")
    return bundle


def _chosen(config):
    return lineup.layer_filter(config.layers or None, config.exclude_layers or None)


def validate(config):
    """(method's module, its Options); raises ConfigError for values that no run could use, before anything is read."""
    if not config.collection:
        raise errors.ConfigError("no models: give --collection=FOLDER (or a glob, or a .txt file of paths)")
    if not config.method:
        raise errors.ConfigError(f"no method: give --method=, one of {', '.join(plugins.available('merges'))}")
    module = plugins.load("merges", config.method)
    options = zoo.parse_options(module.Options, config.options, f"method {config.method}")
    merge_options.require(module, options)
    errors.require_known("mismatched", config.mismatched, merge_layers.POLICIES)
    errors.require_known("peft_layout", config.peft_layout or "exact", merge_store.LAYOUTS)
    if config.rank < 0 or not 0 <= config.energy <= 1 or config.max_host_bytes < 0:
        raise errors.ConfigError(
            f"rank={config.rank}, energy={config.energy}, max_host_bytes={config.max_host_bytes}: a rank of 0 or more, "
            "0 <= energy <= 1, bytes of 0 or more"
        )
    if not 0 <= config.seed < 2**63:
        raise errors.ConfigError(f"seed={config.seed}: must lie in 0 .. 2**63 - 1")
    merge_whole.load_loss(config, module)
    if config.score:
        raise errors.ConfigError("score: a merge is not scored; --bench compares methods with it")
    if config.statistics and not hasattr(module, "TAKES_STATISTICS"):
        raise errors.ConfigError(f"statistics: method {config.method} takes none; fisher and regmean do")
    return module, options


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What is known of a merge before weights are read, but for a sample."""

    found: merge_layers.Lineup
    sources: merge_rows.Sources
    plans: list
    kin: merge_kin.Kin | None = None

    @property
    def template(self):
        """The Model whose files are written again."""
        return self.sources.opened.models[self.found.template]


def _prepare(opened, config, module, *, is_checked=True):
    base = _base(config)
    found = merge_layers.line_up(opened, base, config.mismatched, _chosen(config))
    sources = merge_rows.Sources(
        opened=opened,
        base=base,
        bundle=_bundle(config, found),
        weights=merge_rows.weights_of(config.weights, opened),
        statistics=merge_rows.open_statistics(config.statistics, opened, config.allow_roots),
        cut=lora.Cut(config.rank, config.energy),
        past_cache=plan.outgrows_cache(sum(layer.group.num_bytes for layer in found.layers)),
    )
    plans = merge_plan.of(found, sources, module, has_loss=bool(config.loss))
    if not is_checked:
        return _Prepared(found, sources, plans)
    _require_fit(found, sources, config, module)
    formats.ending(opened.models[found.template])
    merge_plan.require_memory(plans, config)
    return _Prepared(found, sources, plans, merge_kin.require(found, sources, config))


def _diagnosis(opened, config, module, stream):
    from jaxsub.pipelines import merge_diagnosis

    ready = _prepare(opened, config, module, is_checked=False)
    text, unfit = merge_plan.text(ready.plans, ready.found, ready.sources), ""
    try:
        _require_fit(ready.found, ready.sources, config, module)
    except errors.ConfigError as error:
        unfit = str(error)
    return merge_diagnosis.run(ready.found, ready.sources, config, text, stream, unfit=unfit)


def _merge(ready, config, module, options, part, identity, stream):
    """(folder of the merged model in `part`, its record)."""
    found, sources, plans = ready.found, ready.sources, ready.plans
    solvers.retries()  # of a run before this one
    if stream is not None:
        stream.write(merge_plan.text(plans, found, sources, most=plan.LISTED) + "\n")
    merge_plan.require_disk(part, plans, found, sources)
    own = _digest([identity, [ref.id for ref in sources.opened.refs]])
    of_kind = merge_branched.run if getattr(module, "MANY", False) else _one
    place, records, figures = of_kind(ready, config, module, options, part, own, stream)
    record = _record(records, found, sources, config, options, ready.kin, identity) | {"fit": figures}
    _write.write_json(os.path.join(place, RECORD), record)
    return place, record


def _one(ready, config, module, options, part, of, stream):
    """See `merge_branched.run`; of methods that give one model."""
    found, sources = ready.found, ready.sources
    store = merge_store.open_store(part, ready.template, found.layers, of, config.peft_layout)
    try:
        if hasattr(module, "merge_models"):
            records, figures = _whole(found, sources, config, module, options, store)
        else:
            records, figures = _layers(found, sources, config, module, options, store, stream), {}
        return store.finish(), records, figures
    finally:
        store.close()


def _require_fit(found, sources, config, module):
    """Raises ConfigError where the method cannot merge what there is."""
    dense = [layer for layer in found.layers if not layer.is_lora]
    are_weights = dense and not merge_rows.is_delta(sources.opened.models[found.template])
    if module.NEEDS_UPDATES and are_weights and sources.base is None and sources.bundle is None:
        if len(dense) == len(found.layers):
            raise errors.ConfigError(
                f"method {config.method} merges updates, differences to the model that all were trained from: give "
                "--base=MODEL"
            )
    template = sources.opened.models[found.template]
    missing = [layer.name for layer in found.layers if layer.is_lora and layer.name not in template.adapters]
    if missing and not (template.format == "peft" and config.peft_layout != "exact"):
        raise errors.ConfigError(
            f"layer {errors.quote(missing[0])}: no single adapter has all updates, and this format needs one that has; "
            "--peft_layout=portable can, or leave it out with --exclude_layers"
        )


def _layers(found, sources, config, module, options, store, stream):
    """The records of all layers, merged now or kept from before."""
    records = []
    total = sum(layer.group.num_bytes for layer in found.layers)
    with progress.Progress(total, len(found.layers), stream=stream) as bar:
        for layer in found.layers:
            record = store.kept(layer)
            is_known = record is not None
            if not is_known:
                with tracing.stage(layer.name), solvers.of_layer(layer.name):
                    record = _layer(layer, sources, config, module, options, store)
                hostmemory.trim()
            records.append(record)
            text = f"N={len(layer.group.members)}{' as saved' if is_known else ''}"
            bar.layer(layer.name, layer.group.num_bytes, text, read=0 if is_known else None)
    return records


def _whole(found, sources, config, module, options, store):
    """(records of all layers, what the method says of its fit) of a method that takes all layers at once."""
    kept = [store.kept(layer) for layer in found.layers]
    if None not in kept:
        return [{k: v for k, v in one.items() if k != "fit"} for one in kept], kept[0]["fit"]
    key = layer_loop.layer_key("", config.seed)
    models = merge_whole.read(found, sources)
    results, figures = merge_whole.merge(models, module, merge_whole.load_loss(config, module), options, key)
    records = []
    for number, layer in enumerate(found.layers):
        own = models.whole.layers.get(layer.name) or models.means[layer.name]
        method = "mean" if layer.name in models.means else config.method
        result = results[layer.name]
        record = _described(layer, method, own, models.spaces.get(layer.name), result)
        store.put(layer, result, record | ({} if number else {"fit": figures}))
        records.append(record)
    return records, figures


def _described(layer, method, own, space, result):
    """The record of a merged layer."""
    group = layer.group
    record = {"name": layer.name, "shape": list(group.shape), "parametrisation": group.parametrisation}
    record |= {"method": method, "row": _kind(own, space), "num_models": len(group.members)}
    if space is not None:
        record["sum_of_coefficients_is_zero"] = bool(space.is_centred)
    if isinstance(result, rows.Factors):
        record |= {"rank": len(result.a), "truncation_error": result.error}
    return record


def _layer(layer, sources, config, module, options, store):
    """Merges one layer, puts it into the store and gives its record."""
    key = layer_loop.layer_key(layer.name, config.seed)
    space = merge_rows.coefficients(sources, layer)
    own = sources.of(layer) if space is None else space
    result, is_mean = merge_rows.merged(own, module, options, key)
    result = result if space is None else space.rebuilt(result)
    record = _described(layer, "mean" if is_mean else config.method, own, space, result)
    again = solvers.retries()
    record |= {"solved_again": again} if again else {}
    store.put(layer, result, record)
    return record


def _kind(own, space):
    """What a row was."""
    if space is not None:
        return "coefficients" if space.origin is None else "coefficients of differences to the base"
    if own.factors() is not None:
        return "low-rank update"
    return "difference to the base" if own.is_update else "weights"


def _record(records, found, sources, config, options, kin, identity):
    from jaxsub import __version__

    opened = sources.opened
    return {
        "schema": SCHEMA,
        "method": config.method,
        "options": dataclasses.asdict(options),
        "base": config.base,
        "bundle": config.bundle,
        "weights": None if sources.weights is None else sources.weights.tolist(),
        "models": [{"id": r.id, "path": r.path, "format": r.format} for r in opened.refs],
        "template": opened.refs[found.template].id,
        "layers": records,
        "copied": found.copied,
        "said": [
            *found.said,
            *kin.said,
            *(said for one in records for said in one.get("solved_again", ())),
            *merge_words.notes(records, config.method, sources.weights, has_statistics=bool(sources.statistics)),
            *merge_words.beside(opened.models[found.template], found.layers, config.peft_layout),
        ],
        "kinship": kin.figures,
        "quarantined": [dict(q) for q in opened.quarantined],
        "provenance": {
            "config": configs.to_dict(dataclasses.replace(config, restart=False, break_lock=False, max_host_bytes=0)),
            "collection_fingerprint": opened.fingerprint,
            "jaxsub_version": __version__,
            "identity": _digest(identity),
        },
    }


def _digest(identity):
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _finished(out, identity):
    """The record of the same run that has finished; None where nothing is at `out`.

    Raises:
        WorkdirError: something else is there.
    """
    if not os.path.lexists(out):
        return None
    try:
        with open(os.path.join(out, RECORD), encoding="utf-8") as file:
            found = json.load(file)
        if found["schema"] == SCHEMA and found["provenance"]["identity"] == _digest(identity):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    _files.require_new(out, "remove it or give another --out")
    return None
