"""`jaxsub project`: any models as coefficients in a bundle, what that loses, and their reconstructions as files."""

import dataclasses
import functools
import math
import os

import numpy as np

from jaxsub import bundle as bundles, errors, formats, precision, subspace
from jaxsub.bundle import export, files
from jaxsub.formats import _files, _rewrite, peft, safetensors
from jaxsub.pipelines import aside, plan, progress, project_kept, project_plan, scoring, sharing, workdir as workdirs
from jaxsub.report import _write, words

COEFFICIENTS, RECORD = "coefficients.safetensors", "project.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a projection; each can be set as --config.<field>=."""

    bundle: str = ""  # folder that fit wrote
    collection: tuple[str, ...] = ()  # the models: folders, globs, text files of paths, or org/name
    members: bool = False  # the bundle's own models, from their coefficients: --write_models without a collection
    base: str = ""  # a model whose error as a stand-in for each is set beside: what the models were trained from
    write_models: str = ""  # new folder for the reconstructions, in the models' own format
    peft_layout: str = ""  # exact (default), portable (for servers; default of --members), tinylora, tinylora_shared
    score: str = ""  # module:function of yours, f(weights, model_id) -> float; run on originals and rebuilt models
    calibrate: str = ""  # a task (digits, ..., module:name): steps on coefficients towards the originals' answers on it
    calibrate_options: tuple[str, ...] = ()  # of the task, as name=value
    calibrate_model: str = ""  # the models' network; empty: the task's
    calibrate_rows: int = 2048  # training rows of it that are used, at most
    calibrate_steps: int = 50
    calibrate_rate: float = 0.03  # learning rate
    seed: int = 0  # of the random subspace that scores are set beside, and of calibration's batches
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    strict: bool = False  # any model set aside is fatal
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)
    max_host_bytes: int = 0  # bound on the plan's peak; 0: what is free


def run(config, workdir=None, *, stream=None):
    """Projects the models of a collection; writes coefficients and errors to `workdir`, if there is one.

    Returns:
        dict: "models" and "layers", each with its name, rank and errors a model, relative to the norm of its weights:
        of the reconstruction, of the mean alone, and expected in a random subspace of the same size about that mean;
        with `score`, "scores": see `scoring`.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError: see `jaxsub.errors`.
    """
    layout = _layout(config)
    if not 0 <= config.seed < 2**63:
        raise errors.ConfigError(f"seed={config.seed}: must lie in 0 .. 2**63 - 1")
    if min(config.calibrate_rows, config.calibrate_steps) < 1 or not config.calibrate_rate > 0:
        raise errors.ConfigError("calibrate_rows, calibrate_steps, calibrate_rate: expected more than 0")
    score = scoring.load(config.score) if config.score else None  # a mistake in it shows before anything is read
    if config.members:
        return _members(config, layout)
    workdirs.require_outside(workdir, config.collection)
    workdirs.require_outside(config.write_models, config.collection, "--write_models")
    bundle = files.load(config.bundle)
    opened = aside.open_collection(config, smallest=1)
    if config.write_models:
        _files.require_new(config.write_models)
        for model in opened.models:  # before anything is read
            if layout == "exact":
                formats.ending(model)
            elif model.format != "peft":
                raise errors.ConfigError(
                    f"{errors.quote(model.path)}: peft_layout={layout} is one of PEFT folders, not of {model.format}"
                )

    def work(left):
        return _project(left, bundle, config, layout, score, workdir, stream)

    return aside.going_on(work, opened, config, least=1)


def _layout(config):
    """The layout to write adapters in.

    Raises:
        ConfigError: options that do not go together.
    """
    if not config.bundle or bool(config.collection) == config.members:
        raise errors.ConfigError("give --bundle=FOLDER and --collection=FOLDER, or --bundle=FOLDER and --members")
    known = export.LAYOUTS if config.members else ("exact", "portable")
    if config.peft_layout in {*export.LAYOUTS, "exact"} - {*known}:
        other = "--collection: it is the models' own" if config.members else "--members: it holds coefficients alone"
        raise errors.ConfigError(f"peft_layout={config.peft_layout} is written with {other}")
    layout = errors.require_known("peft_layout", config.peft_layout or known[0], known)
    if not config.write_models and (config.members or config.peft_layout):
        raise errors.ConfigError("give --write_models=FOLDER: nothing else is made of --members and --peft_layout")
    return layout


def _members(config, layout):
    """`run` for the models that a bundle holds: no collection is opened, and nothing is measured."""
    written = files.load(config.bundle).export(config.write_models, layout=layout)
    return {
        "schema": "jaxsub.project/1",
        "bundle": config.bundle,
        "models": [one["model"] for one in written],
        "layers": [],
        "quarantined": [],
        "written": written,
    }


def _project(opened, bundle, config, layout, score, workdir, stream):
    pairs = bundle.pairs(opened)
    if bundle.is_of_factors and (score or config.calibrate):
        raise errors.ConfigError("score, calibrate: not for a bundle of --view=lora_factors, which holds no updates")
    if not pairs:
        raise errors.ConfigError(bundles.NOTHING_SHARED)
    planned = [(group.name, project_plan.projection(group)) for group, _ in pairs]
    project_plan.require_memory(planned, config)
    if stream is not None:
        stream.write(project_plan.text(planned, [group for group, _ in pairs]))
    base = formats.open_model(config.base, allow_roots=config.allow_roots) if config.base else None
    records, values, again = [], {}, []
    with progress.Progress(sum(g.num_bytes for g, _ in pairs), len(pairs), stream=stream) as bar:
        for group, layer in pairs:
            key = bundle.key(layer)
            record, values[key], rebuild = _layer(group, layer, opened, base, is_kept=not config.calibrate)
            records.append({"key": key, **record})
            again.append(functools.partial(rebuild, values, key))
            bar.layer(group.name, group.num_bytes, f"N={len(group.members)}")
    found = {"schema": "jaxsub.project/1", "bundle": config.bundle, "models": [r.id for r in opened.refs]}
    found |= {"layers": records, "quarantined": [dict(q) for q in opened.quarantined]}
    if config.calibrate:
        from jaxsub.pipelines import calibrate

        calibrated, found["calibration"] = calibrate.run(config, opened, bundle, pairs, values)
        values.update(calibrated)  # what is written below is rebuilt from these
    if score:
        found["scores"] = scoring.scores(score, config.score, opened, bundle, pairs, config.seed)
    if workdir is not None:
        _files.make_folder(workdir)
        safetensors.write(os.path.join(workdir, COEFFICIENTS), values)
        _write.write_json(os.path.join(workdir, RECORD), found)
    if config.write_models:
        wanted = sum(group.num_bytes for group, _ in pairs) if layout == "exact" else 0
        plan.require_disk(os.path.dirname(os.path.abspath(config.write_models)), wanted)
        with _files.new_folder(config.write_models) as folder:
            found["written"] = _write_models(opened, bundle, pairs, again, layout, folder)
        for one in found["written"]:
            for key in ("folder", "other_tensors"):
                one[key] = one[key] and one[key].replace(folder, os.path.abspath(config.write_models), 1)
    return found


def _write_models(opened, bundle, pairs, again, layout, folder):
    """Writes the models, one at a time; what is said of those whose layout is not the input's own."""
    found = []
    for member, (ref, model) in enumerate(zip(opened.refs, opened.models, strict=True)):
        layers = {
            group.name: rebuild(group.members.index(member))
            for (group, _), rebuild in zip(pairs, again, strict=True)
            if member in group.members
        }
        if bundle.is_of_factors:
            layers = _joined(layers, model)
        place = _rewrite.place(folder, ref.id)
        if layout == "exact":
            formats.rewrite(model, place + formats.ending(model), layers)
        else:
            done = peft.rewrite_portable(model, place, layers)
            found.append({"model": ref.id, "folder": place, **done})
    return found


def _joined(layers, model):
    """Values of layers, where factors A and B of an update are layers by themselves joined to its (a, b)."""
    found = dict(layers)
    for name, pair in model.adapters.items():
        own = [found.pop(f"{name}.lora_{side}", None) for side in "AB"]
        if all(one is None for one in own):
            continue
        a, b = (
            (formats.read(model, tensor) if one is None else one).reshape(tensor.shape)
            for one, tensor in zip(own, (pair.a, pair.b), strict=True)
        )
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        found[name] = (b.T, a.T, pair.scale) if pair.transposed else (a, b, pair.scale)
    return found


def _layer(group, layer, opened, base, *, is_kept):
    """(record, coefficients (n, k...), function (coefficients by key, key, position) -> array or factors)."""
    space, ids = layer.subspace, [opened.refs[m].id for m in group.members]
    values, energies, left, alone, x, exponent = _measured(space, bundles.read(group, opened))
    kept = project_kept.members(layer, ids, x, left, exponent) if is_kept else {}
    if kept:
        values, left = np.array(values), np.array(left)
    for position, (own, _, error) in kept.items():
        values[position], left[position] = own, error
    kept = {position: own for position, (_, own, _) in kept.items()}  # `again` outlives the stack
    ranks = [e.rank for e in group.entries] if group.parametrisation == "lora" else []

    def again(values, key, position):
        c, own = values[key][position : position + 1], kept.get(position)
        if ranks and own is not None:
            return own.own()
        if ranks:
            rank = ranks[position] if is_kept else max(ranks)  # steps on coefficients may raise it
            a, b = space.reconstruct_factors(c, rank)
            return a[0, :rank], b[0, :, :rank]
        rebuilt = np.array(space.reconstruct(c))
        return (rebuilt if own is None else own.applied(rebuilt))[0]

    # Of its energy, any model has this share in a random subspace.
    share = math.prod(values.shape[1:]) / math.prod(layer.shape)
    record = {
        "name": layer.name,
        "shape": list(layer.shape),
        "rank": list(values.shape[1:]),
        "models": ids,
        "kept": [ids[position] for position in kept],
        "error": subspace.relative(left, energies).tolist(),
        "error_of_mean": subspace.relative(alone, energies).tolist(),
        "error_of_random": subspace.relative(alone * (1 - share), energies).tolist(),
    }
    if base is not None:
        record["error_of_base"] = subspace.relative(_from_base(group, x, energies, base, exponent), energies).tolist()
    return record, values, again


def _measured(space, x):
    """Models as coefficients, and what that loses; large stacks are shared by the devices.

    Returns:
        (coefficients, squared norms, squared errors, squared distances to the mean, models, exponent): norms, errors,
        distances and models times 2**-exponent, which brings them near 1.
    """
    if isinstance(x, tuple):  # low-rank updates have no mean
        values = sharing.projected(space, *x)
        energies, left = subspace.missed(space, x, values)
        return values, energies, left, energies, x, 0
    space, x, _, exponent = subspace.unit(space, x, np.zeros(0))
    by_rows = isinstance(space, subspace.LinearSubspace)
    mesh = sharing.mesh(len(x), x.shape[1:], x.nbytes, by_rows=by_rows)
    space, there = sharing.spread(space, mesh), sharing.placed(x, mesh, by_rows=by_rows)
    values = subspace.project(space, there)[: len(x)]
    energies, left = subspace.missed(space, there, values)
    alone = subspace.from_mean(space, there)[: len(x)]
    return precision.scaled(np.asarray(values), exponent), energies, left, alone, x, exponent


def _from_base(group, x, energies, base, exponent):
    """(n,) squared distances of models x, times 2**-exponent, to the base; a low-rank update is all of its distance."""
    if group.parametrisation == "lora":
        return energies
    tensor = base.tensors.get(group.name)
    if tensor is None or (tensor.shape or (1,)) != x.shape[1:]:
        found = "lacks it" if tensor is None else f"has shape {tensor.shape}"
        raise errors.InputError(base.path, f"the base {found}, the models have shape {x.shape[1:]}", key=group.name)
    own = np.ldexp(formats.read(base, tensor).astype(np.float64).reshape(x.shape[1:]), -exponent)
    return np.array([np.square(row.astype(np.float64) - own).sum() for row in x])


def written(found):
    """What was written of adapters whose layout is not the input's own, as text; nothing otherwise."""
    made = found.get("written", ())
    lines = [f"{len(made)} adapters of rank {_span(one['r'] for one in made)}"] if made else []
    beside = [one["other_tensors"] for one in made if one["other_tensors"]]
    if beside:
        lines.append(f"tensors that are no updates (saved modules, biases) are in {len(beside)} files beside them,")
        lines.append(f"which programs do not load: {errors.quote(beside[0])}{', ...' if len(beside) > 1 else ''}")
    return "".join(line + "\n" for line in lines)


def _span(numbers):
    least, most = min(numbers := [*numbers]), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def table(found):
    """The errors of a projection, layer by layer, as text of at most 100 columns."""
    has_base = any("error_of_base" in one for one in found["layers"])
    heads = "".join(f" {name:>8}" for name in ("error", "worst", "mean", "random", "base")[: 4 + has_base])
    lines = [f"{'layer':21} {'shape':>16} {'models':>6} {'rank':>9}{heads}"]
    names = words.columns([one["name"] for one in found["layers"]], 21)
    for name, one in zip(names, found["layers"], strict=True):
        rank, shape = ("x".join(map(str, one[k])) for k in ("rank", "shape"))
        rest = ("error_of_mean", "error_of_random", "error_of_base")[: 2 + has_base]
        shown = [np.median(one["error"]), max(one["error"]), *(np.median(one[k]) for k in rest)]
        lines.append(
            f"{name} {shape:>16} {len(one['models']):>6} {rank:>9}" + "".join(f" {value:>8.2e}" for value in shown)
        )
    lines.append("error: median over the models, of the norm of their weights; mean: with the mean alone; random:")
    lines.append("in a random subspace of the same size about it" + "; base: with the base in their place" * has_base)
    kept = {model for one in found["layers"] for model in one["kept"]}
    if kept:
        lines.append(f"{words.plural(len(kept), 'member')} of the bundle with what it keeps of them (--max_error)")
    if "calibration" in found:
        from jaxsub.pipelines import calibrate

        lines += ["", calibrate.table(found["calibration"])]
    if "scores" in found:
        lines += ["", scoring.table(found["scores"])]
    return "\n".join(lines)
