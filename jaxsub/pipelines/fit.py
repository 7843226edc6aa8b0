"""`jaxsub fit`: a subspace for every layer of a collection, and its models as coefficients: a bundle.

open (headers) -> plan -> layer by layer: stack, decomposition, coefficients -> bundle folder
"""

import contextlib
import dataclasses
import logging
import os

import jax

from jaxsub import (
    bundle,
    collection as collections,
    config as configs,
    distributed,
    errors,
    formats,
    lineup,
    plugins,
)
from jaxsub.bundle import files, storage
from jaxsub.formats import _files, peft
from jaxsub.pipelines import (
    aside,
    dealt,
    fit_budget,
    fit_layer,
    fit_plan,
    parts,
    plan,
    progress,
    tracing,
    workdir as workdirs,
)
from jaxsub.report import words

log = logging.getLogger("jaxsub")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a fit; each can be set as --config.<field>=."""

    collection: tuple[str, ...] = ()  # folders, globs, text files of paths, or org/name of the hub cache
    layers: tuple[str, ...] = ()  # regular expressions; only layers that match one; the others are kept whole
    exclude_layers: tuple[str, ...] = ()  # layers to keep whole
    view: str = "weights"  # weights, or lora_factors (A and B apart)
    decomposition: str = ""  # gram (the default of dense layers), hooi (of LoRA), randomized, hosvd, row_pca, ...
    rank: int = 0  # components a layer; 0: as many as `energy` asks for
    energy: float = 0.9  # share of each layer's centred energy
    budget_bytes: int = 0  # of the whole bundle: chooses ranks across layers by energy a byte; reads weights twice
    max_error: float = -1.0  # of every model in every layer: what is missed most is kept exactly; negative: no bound
    basis_dtype: str = ""  # stored dtype of bases: bfloat16, int8 (the mean then bfloat16); empty: as computed
    coefficient_dtype: str = ""  # stored dtype of coefficients: bfloat16, int8; empty: as computed
    strict: bool = False  # any model set aside is fatal
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    max_host_bytes: int = 0  # bound on the plan's peak; 0: what is free
    max_device_bytes: int = 0  # bound on the plan's peak of the device; 0: what it has
    coordinator: str = ""  # host:port of process 0, in a run of several processes; empty: as the launcher says, if any
    num_processes: int = 0  # of the run
    process_id: int = -1  # which of them this is
    stall_timeout: int = 0  # seconds without a finished layer that end a run of several processes; 0: half an hour
    seed: int = 0
    dry_run: bool = False
    profile: bool = False  # write a trace for xprof and Perfetto to WORKDIR/profile
    restart: bool = False  # start over in a workdir that is in use by other options; its bundle is replaced
    break_lock: bool = False  # take over a workdir that a run on another host left; make sure that it has ended


def run(config, path=None, *, workdir=None, stream=None):
    """Fits a bundle and saves it in the new folder `path`, or as `workdir`/bundle (without either nothing is written).

    With a workdir every layer is kept as it is finished: the same call goes on where it was killed and gives the same
    bundle to the bit; where it had finished already, the bundle that is there. Several processes fit layers of their
    own, and need the workdir, or the folder of `path`, on a file system that all of them see.

    Returns:
        Bundle; with `dry_run`, the plan as text. Of several processes the first alone: others get None.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError, PeerError: see `jaxsub.errors`.
    """
    if not config.collection:
        raise errors.ConfigError("no collection: give --collection=FOLDER (or a glob, or a .txt file of paths)")
    validate(config)
    distributed.start(config.coordinator, config.num_processes, config.process_id)
    if workdir is not None and not config.dry_run:
        distributed.together(lambda: workdirs.require_free(workdir) if distributed.is_main() else None)
    return fit(
        distributed.together(lambda: aside.open_collection(config)), config, path, workdir=workdir, stream=stream
    )


def validate(config):
    """Raises ConfigError for values that no run could use, before anything is read."""
    if config.rank < 0 or not 0 < config.energy <= 1:
        raise errors.ConfigError(f"rank={config.rank}, energy={config.energy}: a rank of 1 or more, or 0 < energy <= 1")
    if min(config.max_host_bytes, config.max_device_bytes, config.stall_timeout) < 0:
        raise errors.ConfigError("max_host_bytes, max_device_bytes, stall_timeout: must be at least 0")
    if config.budget_bytes < 0 or (config.budget_bytes and config.rank):
        raise errors.ConfigError(f"budget_bytes={config.budget_bytes}, rank={config.rank}: a budget chooses the ranks")
    if not 0 <= config.seed < 2**63:
        raise errors.ConfigError(f"seed={config.seed}: must lie in 0 .. 2**63 - 1")
    if not config.max_error < 1 or (config.max_error >= 0 and config.budget_bytes):
        raise errors.ConfigError(
            f"max_error={config.max_error}: below 1, and not with budget_bytes, which it may break"
        )
    for name in ("basis_dtype", "coefficient_dtype"):
        errors.require_known(name, getattr(config, name), storage.DTYPES)
    if config.decomposition:
        plugins.load("decompositions", config.decomposition)
    known = plugins.available("views")
    if config.view in known and _needs_base(config.view):
        raise errors.ConfigError(
            f"view={config.view}: use weights or lora_factors; a fit subtracts the mean, and a base with it"
        )
    errors.require_known("view", config.view, [view for view in known if not _needs_base(view)])


def _needs_base(view):
    return plugins.load("views", view).NEEDS_BASE


def fit(opened, config, path=None, *, workdir=None, stream=None):
    """`run` on a Collection that is open already."""
    validate(config)
    place = os.path.dirname(os.path.abspath(path)) if path is not None else workdir
    is_main, is_alone = distributed.is_main(), jax.process_count() == 1
    distributed.require_same("collection", opened.fingerprint)
    distributed.require_same("set of options", _shared_options(config), "start all with the same command")
    trace = None if config.dry_run else tracing.folder_of(config, place)
    if not (is_alone or config.dry_run or place):
        raise errors.ConfigError(
            "several processes meet in the workdir: give --workdir=FOLDER (jaxsub.fit: a path), on a file system that "
            "all of them see"
        )
    stream, trace = (stream, trace) if is_main else (None, None)
    if workdir is not None and not config.dry_run:
        return _in_workdir(opened, config, workdir, stream, trace)
    distributed.together(lambda: _files.require_new(path) if is_main and path is not None else None)
    kept = parts.Parts(None, config) if is_alone else dealt.Parts(f"{path}.parts", config)
    if not config.dry_run:
        kept.require_shared()
    with tracing.traced(trace):
        result = aside.going_on(lambda left: _fit(left, config, kept, stream), opened, config)
    if path is not None and not config.dry_run:
        distributed.together(lambda: result.save(path) if is_main else None, is_long=True)
        if is_main and not is_alone:
            kept.remove()
    return result


def _shared_options(config):
    return configs.to_dict(dataclasses.replace(config, coordinator="", num_processes=0, process_id=-1))


def _in_workdir(opened, config, workdir, stream, trace):
    _groups(opened, config)  # what no run could do leaves no trace
    path, is_main = os.path.join(workdir, "bundle"), distributed.is_main()
    kind = parts.Parts if jax.process_count() == 1 else dealt.Parts
    kept = kind(os.path.join(workdir, "parts"), config)
    with contextlib.ExitStack() as stack:

        def hold():
            identity = workdirs.identity("fit", config, opened)
            stack.enter_context(workdirs.hold(workdir, identity, restart=config.restart, break_lock=config.break_lock))

        distributed.together(lambda: hold() if is_main else None)
        found = distributed.together(lambda: _committed(path, opened, config) if is_main else None, is_long=True)
        if distributed.gather_objects(found is None)[0]:  # process 0 alone looks for it
            kept.require_shared()
            with tracing.traced(trace):
                found = aside.going_on(lambda left: _fit(left, config, kept, stream), opened, config)
            distributed.together(lambda: parts.commit(found, path) if is_main else None, is_long=True)
        elif stream is not None:
            stream.write(f"{errors.quote(path)}: there already, of the same run\n")
        if is_main:
            kept.remove()
    return found


def _committed(path, opened, config):
    """The bundle that this run has written before, or None where there is none, or one that is to be replaced.

    Raises:
        WorkdirError: something else is there.
    """
    if not os.path.lexists(path):
        return None
    if config.restart:
        if os.path.exists(os.path.join(path, files.MANIFEST)):
            return None
        raise errors.WorkdirError(f"{errors.quote(path)}: is no bundle; remove it, or give another --workdir")
    try:
        found = None if files.verify(path) else files.load(path)
    except errors.InputError:
        found = None
    if found is not None and "updates" not in found.provenance:
        gone = [q["id"] for q in found.provenance["quarantined"]]
        wanted = _provenance(opened.without([ref.id for ref in opened.refs if ref.id in gone]), config)
        if all(found.provenance[k] == wanted[k] for k in ("config_digest", "collection_fingerprint", "jaxsub_version")):
            return found
    raise errors.WorkdirError(
        f"{errors.quote(path)}: exists already and is not what this run writes; remove it, replace it with --restart, "
        "or give another --workdir"
    )


def _fit(opened, config, kept, stream):
    for ref in opened.refs:
        if any("\ud800" <= c <= "\udfff" for c in ref.id + ref.path):  # bytes that are no UTF-8: manifests hold text
            raise errors.ConfigError(f"{errors.quote(ref.path)}: its name is no UTF-8; rename it")
    groups = _groups(opened, config)
    modules, is_main = [fit_layer.module(g, config) for g in groups], distributed.is_main()
    fit_plan.require_rank(groups, modules, config)
    plans = fit_plan.of(groups, modules, config)
    if config.dry_run:
        return fit_plan.text(plans, groups, opened, config) if is_main else None
    if stream is not None:
        stream.write(fit_plan.text(plans, groups, opened, config, most=plan.LISTED) + "\n")
    distributed.together(lambda: fit_plan.require_memory(plans, config))
    distributed.together(lambda: fit_plan.require_disk(plans, opened, config, kept.folder) if is_main else None)
    empty = distributed.together(lambda: _empty(opened, groups, config) if is_main else None, is_long=True)
    own, passes = kept.own(groups), 2 if config.budget_bytes else 1
    size, foreseen = (sum(g.num_bytes for g in own), len(own)), iter(range(passes))
    with progress.Progress(passes * size[0], passes * size[1], stream=stream) as bar:

        def done(group, is_known):
            text = f"N={len(group.members)}{' as saved' if is_known else ''}"
            bar.layer(group.name, group.num_bytes, text, read=0 if is_known else group.num_bytes)

        def fitted(ranks):
            if next(foreseen, None) is None:  # a bundle that came out over its budget is made again
                bar.more(*size)
            found = kept.fit_all(groups, ranks, opened, done)
            return dataclasses.replace(empty, layers=found) if is_main else None

        if config.budget_bytes:
            result = fit_budget.within(config.budget_bytes, fitted, len(groups))
        else:
            result = fitted([config.rank] * len(groups))
    if not is_main:
        return None
    count = result.accounting()
    if count["total"] > count["originals"]:
        log.warning(
            "the bundle takes %s, more than the files' %s: take fewer components or more models",
            plan.size(count["total"]),
            plan.size(count["originals"]),
        )
    return result


def _empty(opened, groups, config):
    """The Bundle without its layers."""
    return bundle.Bundle(
        model_ids=tuple(r.id for r in opened.refs),
        layers=(),
        passthrough=passthrough(opened, groups),
        originals={r.id: file_bytes(r.path) for r in opened.refs},
        provenance=_provenance(opened, config),
    )


def _groups(opened, config):
    """Layer groups to fit.

    Raises:
        ConfigError: low-rank updates that the decomposition does not take, or nothing is left.
    """
    is_chosen = lineup.layer_filter(config.layers or None, config.exclude_layers or None)
    groups = [g for g in plugins.load("views", config.view).groups(opened) if is_chosen(g.name)]
    groups = [g for g in groups if len(g.members) >= lineup.SMALLEST_GROUP]
    vectors = {g.name for g in groups if g.shape == (1,)}  # numbers of the same name are kept whole: one layer a shape
    groups = [g for g in groups if g.shape or g.name not in vectors]
    for group in groups:
        if group.parametrisation == lineup.LORA and not hasattr(fit_layer.module(group, config), "TAKES_LORA"):
            raise errors.ConfigError(
                f"decomposition={config.decomposition} takes no low-rank updates such as {errors.quote(group.name)}: "
                "hooi and hosvd do, --view=lora_factors gives it A and B, --exclude_layers leaves such layers whole"
            )
    if not groups:
        raise errors.ConfigError("no layer to fit: none that at least 3 models have matches --layers, --exclude_layers")
    return groups


def passthrough(opened, groups):
    """Model id -> {tensor name: array} of all that no group covers."""
    covered = [set() for _ in opened.models]
    for group in groups:
        for member, entry in zip(group.members, group.entries, strict=True):
            covered[member].update(t.name for t in collections.stored_tensors(entry))
    found = {}
    for ref, model, names in zip(opened.refs, opened.models, covered, strict=True):
        pairs = [t for pair in model.adapters.values() for t in (pair.a, pair.b)]
        kept = [t for t in (*model.tensors.values(), *pairs) if t.name not in names]
        found[ref.id] = {t.name: formats.read(model, t) for t in kept}
    return found


def file_bytes(path):
    """Bytes of a model's file, or of all files in its folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


def table(result):
    """The layers of a Bundle and its bytes, as text of at most 100 columns."""
    lines = [f"{'layer':39} {'shape':>16} {'models':>6} {'rank':>9} {'kept':>7} {'held out':>9} {'error':>8}"]
    for name, layer in zip(words.columns([one.name for one in result.layers], 39), result.layers, strict=True):
        rank = layer.subspace.rank
        rank = "x".join(map(str, rank.values())) if isinstance(rank, dict) else str(rank)
        rank += f"/{layer.halves[0].shape[2]}" if layer.halves else ""
        held, figures = layer.figures["held_out"], layer.figures
        held = "" if held is None else f"{held:.3f}"
        lines.append(
            f"{name} {'x'.join(map(str, layer.shape)):>16} {len(layer.model_ids):>6} "
            f"{rank:>9} {figures['energy_kept']:>7.3f} {held:>9} {figures['error_max']:>8.2e}"
        )
    lines.append("kept: share of the centred energy; held out: share missed on a model left out; error: of the worst")
    if any(layer.figures.get("held_out_by") == "half of the models" for layer in result.layers):
        lines.append("held out, of weight axes: by a fit to half of the models, on the others, at the same ranks")
    if any("error_unrounded" in layer.figures for layer in result.layers):
        means = [(layer.figures["error_unrounded"], layer.figures["error_mean"]) for layer in result.layers]
        before, after = (sum(column) / len(means) for column in zip(*means, strict=True))
        lines.append(f"narrow storage: mean error {after:.3e}, {before:.3e} before rounding")
    if any(layer.halves for layer in result.layers):
        lines.append("rank: of the axes, and of the models' cores where these are kept as products of two halves")
    count = result.accounting()
    sizes = {name: plan.size(value) for name, value in count.items() if name not in ("ratio", "break_even")}
    lines.append(f"bundle {sizes['total']}, files {sizes['originals']}: {count['ratio']:.2f} times the bundle")
    names = ("mean", "basis", "coefficients", "corrections", "passthrough")
    lines.append(", ".join(f"{name} {sizes[name]}" for name in names))
    number = f"{count['break_even']} models" if count["break_even"] else "no number of models"
    lines.append(f"smaller than the files from {number} on, at these ranks")
    return "\n".join(lines)


def _provenance(opened, config):
    from jaxsub import __version__

    # The bundle is the same whatever these are.
    neutral = dict.fromkeys(("restart", "break_lock", "profile"), False)
    neutral |= {"coordinator": "", "num_processes": 0, "process_id": -1, "stall_timeout": 0}
    plain = dataclasses.replace(config, **neutral, max_host_bytes=0, max_device_bytes=0)
    return {
        "program": "fit",
        "config": configs.to_dict(plain),
        "config_digest": configs.digest(plain),
        "collection_fingerprint": opened.fingerprint,
        "jaxsub_version": __version__,
        "quarantined": [dict(q) for q in opened.quarantined],
        "models": [named(r, m) for r, m in zip(opened.refs, opened.models, strict=True)],
    }


def named(ref, model):
    """What the manifest says of a member: where it was, and what an adapter is for."""
    return {"id": ref.id, "path": ref.path, "format": ref.format, **peft.fields_of(model)}
