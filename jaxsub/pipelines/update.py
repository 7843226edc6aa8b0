"""`jaxsub update`: models added to a bundle, or removed from it, without the models that are in it already."""

import dataclasses
import os

from jaxsub import bundle as bundles, collection as collections, config as configs, errors
from jaxsub.bundle import files, refit
from jaxsub.formats import _files
from jaxsub.pipelines import aside, fit, fit_layer, layers, progress, project_plan, workdir as workdirs
from jaxsub.report import words

SMALLEST = 3  # models of a layer that is fitted


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of an update; each can be set as --config.<field>=."""

    bundle: str = ""  # folder that fit wrote; it is left as it is
    collection: tuple[str, ...] = ()  # the models to add: folders, globs, or text files of paths
    remove: tuple[str, ...] = ()  # ids of members to remove
    captured: float = 0.9  # a layer's basis is kept where it holds this share of every new model, else fitted again
    rank: int = 0  # components of a basis fitted again; 0: as many as it has
    exact: bool = False  # fit everything again from the members' files too, as if all had been there from the start
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    strict: bool = False  # any model set aside is fatal
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)
    max_host_bytes: int = 0  # bound on the plan's peak; 0: what is free


def run(config, path=None, *, stream=None):
    """The Bundle with models added and removed; saved in the new folder `path`, if there is one.

    Returns:
        Bundle; its provenance["updates"] says for every layer how it was made and whether that is exact.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError: see `jaxsub.errors`.
    """
    if not config.bundle or not (config.collection or config.remove):
        raise errors.ConfigError("give --bundle=FOLDER, and --collection=FOLDER to add or --remove=ID to take away")
    if not 0 <= config.captured <= 1 or config.rank < 0:
        raise errors.ConfigError(
            f"captured={config.captured}, rank={config.rank}: a share in 0 .. 1, a rank of 0 or more"
        )
    workdirs.require_outside(path, config.collection)
    if path is not None:
        _files.require_new(path)
    bundle = files.load(config.bundle)
    bundle.coefficients(config.remove)  # refuses ids that are none
    if config.exact:
        return _again(bundle, config, path, stream)
    opened = _opened(bundle, config) if config.collection else None
    if opened is None:
        result = _update(None, bundle, config, stream)
    else:
        result = aside.going_on(lambda left: _update(left, bundle, config, stream), opened, config, least=1)
    if path is not None:
        result.save(path)
    return result


def _opened(bundle, config):
    opened = aside.sharing(aside.open_collection(config, smallest=1), bundle, config)
    stay = set(bundle.model_ids) - set(config.remove)
    for ref in opened.refs:
        if ref.id in stay:
            raise errors.ConfigError(f"{errors.quote(ref.id)} is a member already; remove that one, or rename this one")
    return opened


def _again(bundle, config, path, stream):
    """A fit of all models from their files."""
    known = bundle.provenance["config"]
    every = collections.open_collection([*known["collection"], *config.collection], allow_roots=config.allow_roots)
    present = {r.id for r in every.refs}
    for member in bundle.model_ids:
        if member not in present and member not in config.remove:
            raise errors.ConfigError(f"exact: {errors.quote(member)} is not found in {', '.join(known['collection'])}")
    gone = {m for one in bundle.provenance.get("updates", ()) for m in one["removed"]} - {*bundle.model_ids}
    gone -= {ref.id for ref in every.refs if _is_in(ref.path, config.collection)}  # they were given again
    left = every.without([m for m in present if m in config.remove or m in gone])
    fields = {f.name for f in dataclasses.fields(fit.Config)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items() if k in fields}
    given["collection"] = (*given["collection"], *config.collection)
    result = fit.fit(left, fit.Config(**given), None, stream=stream)
    result = _recorded(result, bundle, config, left, {result.key(one): ("fitted", True) for one in result.layers})
    if path is not None:
        result.save(path)
    return result


def _is_in(path, given):
    """Whether a model's path lies in one of the folders, or is one of the files, that were given."""
    path = os.path.abspath(path)
    return any(path == top or path.startswith(top + os.sep) for top in map(os.path.abspath, given))


def _update(opened, bundle, config, stream):
    both = [] if opened is None else bundle.pairs(opened)
    pairs = {bundle.key(layer): group for group, layer in both}
    if both:
        planned = [(group.name, project_plan.refit(group, layer)) for group, layer in both]
        project_plan.require_memory(planned, config)
        if stream is not None:
            stream.write(project_plan.text(planned, pairs.values()))
    found, how = [], {}
    total = sum(g.num_bytes for g in pairs.values())
    with progress.Progress(total, len(bundle.layers), stream=stream) as bar:
        for layer in bundle.layers:
            key = bundle.key(layer)
            made, how[key] = _layer(layer, pairs.get(key), opened, config, bundle.provenance["config"])
            if made is not None:
                found.append(made)
            bar.layer(layer.name, pairs[key].num_bytes if key in pairs else 0, f"N={len(layer.model_ids)}")
    stay = [m for m in bundle.model_ids if m not in config.remove]
    passthrough = {m: bundle.passthrough[m] for m in stay}
    originals = {m: bundle.originals[m] for m in stay}
    if opened is not None:
        passthrough |= fit.passthrough(opened, list(pairs.values()))
        originals |= {r.id: fit.file_bytes(r.path) for r in opened.refs}
    ids = tuple(stay) + (() if opened is None else tuple(r.id for r in opened.refs))
    result = dataclasses.replace(
        bundle, model_ids=ids, layers=tuple(found), passthrough=passthrough, originals=originals
    )
    return _recorded(result, bundle, config, opened, how)


def _layer(layer, group, opened, config, fitted):
    """(Layer, (how, exact)) with the new models of its group, without the removed ones."""
    keep = [p for p, m in enumerate(layer.model_ids) if m not in config.remove]
    x = None if group is None else bundles.read(group, opened)
    if len(keep) == len(layer.model_ids) and x is None:
        return layer, ("kept", True)
    if layer.is_constant and len(keep) >= SMALLEST:
        layer, keep = refit.without(layer, keep), list(range(len(keep)))
        if x is None:
            return layer, ("kept", True)
    is_held = x is not None and float(refit.captured(layer, x).min()) >= config.captured
    bound = fitted.get("max_error", -1.0)
    if bound >= 0 and not (is_held and len(keep) == len(layer.model_ids)):
        raise errors.ConfigError(
            f"{errors.quote(layer.name)}: max_error={bound} cannot be promised for a basis fitted again without the "
            "members' files; use --exact, or fit again"
        )
    ids, dtypes = (), ()
    if group is not None:
        ids = tuple(opened.refs[m].id for m in group.members)
        dtypes = fit_layer.stored_dtypes(group)
        if layer.orientation and fit_layer.orientation(group) != layer.orientation:
            layer = dataclasses.replace(layer, orientation="")
    if len(keep) == len(layer.model_ids) and is_held:
        made = refit.appended(layer, x, ids, dtypes, max_error=bound)
        return made, ("projected", False)
    if len(keep) + len(ids) < SMALLEST:
        raise errors.ConfigError(
            f"{errors.quote(layer.name)}: {len(keep) + len(ids)} models would be left, {SMALLEST} are needed"
        )
    key = layers.layer_key(layer.name, fitted.get("seed", 0))
    made = refit.refitted(layer, keep, x, ids, dtypes, rank=config.rank, key=key)
    return made, ("refitted", refit.is_lossless(layer))


def _recorded(result, bundle, config, opened, how):
    stay = {*bundle.model_ids} - {*config.remove}
    update = {
        "added": [] if opened is None else [r.id for r in opened.refs if r.id not in stay],
        "removed": list(config.remove),
        "quarantined": [] if opened is None else [dict(q) for q in opened.quarantined],
        "config": configs.to_dict(dataclasses.replace(config, max_host_bytes=0)),
        "collection_fingerprint": None if opened is None else opened.fingerprint,
        "layers": {key: {"how": word, "exact": exact} for key, (word, exact) in how.items()},
    }
    known = [m for m in bundle.provenance.get("models", []) if m["id"] not in config.remove]
    have = {m["id"] for m in known}
    if opened is not None:
        known += [fit.named(r, m) for r, m in zip(opened.refs, opened.models, strict=True) if r.id not in have]
    earlier = bundle.provenance.get("updates", [])
    provenance = {**bundle.provenance, "models": known, "updates": [*earlier, update]}
    if config.exact:
        provenance |= {k: result.provenance[k] for k in ("config", "config_digest", "collection_fingerprint")}
    return dataclasses.replace(result, provenance=provenance)


HOW = {
    "kept": "as it was",
    "projected": "new models projected, basis as it was",
    "refitted": "mean and basis fitted again",
    "fitted": "fitted again from all files",
}


def table(result):
    """What the last update did to each layer, as text of at most 100 columns."""
    update = result.provenance["updates"][-1]
    lines = [f"{len(update['added'])} added, {len(update['removed'])} removed, {len(result.model_ids)} members"]
    for name, layer in zip(words.columns([one.name for one in result.layers], 36), result.layers, strict=True):
        done = update["layers"][result.key(layer)]
        exact = "exact" if done["exact"] else "bounds" if done["how"] == "refitted" else ""
        worst = layer.figures["error_max"]
        lines.append(f"{name} {HOW[done['how']]:38} {worst:>8.2e} {exact}".rstrip())
    lines.append("third column: error of the worst model. exact: as a fit of all models. bounds: fitted again from the")
    lines.append("coefficients of the members, whose errors are at most these; --exact reads their files instead")
    return "\n".join(lines)
