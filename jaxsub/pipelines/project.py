"""`jaxsub project`: any models as coefficients in a bundle, what that loses, and their reconstructions as files."""

import dataclasses
import math
import os

import numpy as np

from jaxsub import bundle as bundles, collection as collections, errors, formats, subspace
from jaxsub.bundle import files
from jaxsub.formats import safetensors
from jaxsub.pipelines import aside, progress, scoring
from jaxsub.report import _write

COEFFICIENTS, RECORD = "coefficients.safetensors", "project.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a projection; each can be set as --config.<field>=."""

    bundle: str = ""  # folder that fit wrote
    collection: tuple[str, ...] = ()  # the models: folders, globs, or text files of paths
    write_models: str = ""  # new folder for the reconstructions, in the models' own format
    score: str = ""  # module:function of yours, f(weights, model_id) -> float; run on originals and rebuilt models
    seed: int = 0  # of the random subspace that scores are set beside
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    strict: bool = False  # any model set aside is fatal
    max_quarantined: int = -1  # models that may be set aside; -1: max(1, 5 %)


def run(config, workdir=None, *, stream=None):
    """Projects the models of a collection; writes coefficients and errors to `workdir`, if there is one.

    Returns:
        dict: "models" and "layers", each with its name, rank and errors a model, relative to the norm of its weights:
        of the reconstruction, of the mean alone, and expected in a random subspace of the same size about that mean;
        with `score`, "scores": see `scoring`.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError: see `jaxsub.errors`.
    """
    if not config.bundle or not config.collection:
        raise errors.ConfigError("give --bundle=FOLDER and --collection=FOLDER")
    if not 0 <= config.seed < 2**63:
        raise errors.ConfigError(f"seed={config.seed}: must lie in 0 .. 2**63 - 1")
    score = scoring.load(config.score) if config.score else None  # a mistake in it shows before anything is read
    bundle = files.load(config.bundle)
    opened = collections.open_collection(
        list(config.collection),
        allow_roots=config.allow_roots,
        max_quarantined=None if config.max_quarantined < 0 else config.max_quarantined,
        strict=config.strict,
        smallest=1,
    )
    if config.write_models:
        if os.path.lexists(config.write_models):
            raise errors.WorkdirError(f"{errors.quote(config.write_models)}: exists already; give another folder")
        for model in opened.models:
            formats.ending(model)  # before anything is read
    return aside.going_on(lambda left: _project(left, bundle, config, score, workdir, stream), opened, config, least=1)


def _project(opened, bundle, config, score, workdir, stream):
    pairs = bundle.pairs(opened)
    if not pairs:
        raise errors.ConfigError(bundles.NOTHING_SHARED)
    records, values, rebuilt = [], {}, [{} for _ in opened.models]
    with progress.Progress(sum(g.num_bytes for g, _ in pairs), len(pairs), stream=stream) as bar:
        for group, layer in pairs:
            key = bundle.key(layer)
            record, values[key], again = _layer(group, layer, opened)
            records.append({"key": key, **record})
            if config.write_models:
                for position, member in enumerate(group.members):
                    rebuilt[member][group.name] = again(position)
            bar.layer(group.name, group.num_bytes, f"N={len(group.members)}")
    found = {"schema": "jaxsub.project/1", "bundle": config.bundle, "models": [r.id for r in opened.refs]}
    found |= {"layers": records, "quarantined": [dict(q) for q in opened.quarantined]}
    if score:
        found["scores"] = scoring.scores(score, config.score, opened, bundle, pairs, config.seed)
    if workdir is not None:
        os.makedirs(workdir, exist_ok=True)
        safetensors.write(os.path.join(workdir, COEFFICIENTS), values)
        _write.write_json(os.path.join(workdir, RECORD), found)
    if config.write_models:
        for ref, model, layers in zip(opened.refs, opened.models, rebuilt, strict=True):
            formats.rewrite(model, _place(config.write_models, ref.id) + formats.ending(model), layers)
    return found


def _layer(group, layer, opened):
    """(record, coefficients (n, k...), function position -> what `formats.rewrite` takes) of one layer."""
    space, x = layer.subspace, bundles.read(group, opened)
    values = layer.project(x)
    energies, left = subspace.missed(space, x, values)
    alone = energies  # low-rank updates have no mean
    if group.parametrisation != "lora":
        mean = np.asarray(space.mean, np.float64)
        mean = mean.reshape(layer.shape) if mean.size == math.prod(layer.shape) else mean  # or one that broadcasts
        alone = np.array([np.square(row.astype(np.float64) - mean).sum() for row in x])

    def again(position):
        c = values[position : position + 1]
        if group.parametrisation == "lora":
            return tuple(np.asarray(part)[0] for part in space.reconstruct_factors(c, x[0].shape[1]))
        return np.asarray(space.reconstruct(c))[0]

    share = math.prod(values.shape[1:]) / math.prod(
        layer.shape
    )  # of its energy that any model has in a random subspace
    size = np.where(energies > 0, energies, 1.0)
    record = {
        "name": layer.name,
        "shape": list(layer.shape),
        "rank": list(values.shape[1:]),
        "models": [opened.refs[m].id for m in group.members],
        "error": np.sqrt(left / size).tolist(),
        "error_of_mean": np.sqrt(alone / size).tolist(),
        "error_of_random": np.sqrt(alone * (1 - share) / size).tolist(),
    }
    return record, values, again


def _place(folder, identifier):
    """Where a model of this id goes inside `folder`; ids that lead out of it are refused."""
    folder = os.path.abspath(folder)
    place = os.path.normpath(os.path.join(folder, identifier))
    if os.path.commonpath([folder, place]) != folder or place == folder:
        raise errors.InputError(identifier, "is no place inside the folder of reconstructions", rule="H10")
    return place


def table(found):
    """The errors of a projection, layer by layer, as text of at most 100 columns."""
    heads = "".join(f" {name:>8}" for name in ("error", "worst", "mean", "random"))
    lines = [f"{'layer':30} {'shape':>16} {'models':>6} {'rank':>9}{heads}"]
    for one in found["layers"]:
        rank, shape = ("x".join(map(str, one[k])) for k in ("rank", "shape"))
        middle = [float(np.median(one[k])) for k in ("error", "error_of_mean", "error_of_random")]
        lines.append(
            f"{errors.quote(one['name'], 30):30} {shape:>16} {len(one['models']):>6} {rank:>9} "
            f"{middle[0]:>8.2e} {max(one['error']):>8.2e} {middle[1]:>8.2e} {middle[2]:>8.2e}"
        )
    lines.append("error: median over the models, of the norm of their weights; mean: with the mean alone; random: in a")
    lines.append("random subspace of the same size about it")
    if "scores" in found:
        lines += ["", scoring.table(found["scores"])]
    return "\n".join(lines)
