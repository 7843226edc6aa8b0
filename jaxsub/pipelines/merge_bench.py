"""`jaxsub merge --bench=CONFIG`: merge methods side by side, each tuned with the same number of scored candidates.

zoos (worlds x seeds), or a collection of yours --> every method's candidates --tuning rows--> one chosen
                                                --test rows--> scores --> differences with intervals, table, plot

    --score=module:function     function(weights, model_id, part) -> number, higher is better

scores a collection of yours: `weights` has every tensor of a merged model, {layer: array} in the stored dtype, low-rank
updates as (a, b) with the update b @ a; layers that are not merged are the model's own. `part` is "tuning" or "test":
score other examples for the one than for the other. A model's score on its own task must be above 0. Only the module
that is named is run.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import tempfile
import time

import jax
import numpy as np

from jaxsub import config as configuration, errors, hostmemory
from jaxsub.formats import _files
from jaxsub.pipelines import (
    merge_bench_case as cases,
    merge_bench_processes as processes,
    merge_bench_sources as sources,
    merge_bench_space as space,
    merge_bench_table,
    workdir as workdirs,
)
from jaxsub.report import _write

SCHEMA, PARTS = "jaxsub.merge_bench/1", "bench"
RECORD, PAGE, TABLE = "merge_bench.json", "merge_bench.html", "merge_bench.md"
BASELINES = "baselines"
NOT_TAKEN = ("method", "options", "out", "weights", "bundle", "mergekit_yaml")
WORLDS = (
    "same_start_split_task num_models=8",
    "lora num_models=8",
    "cnn_variants models_per_task=1",
    "vit_variants models_per_task=1",
)
METHODS = (
    "mean",
    "subspace_mean",
    "lora_factors",
    "spherical",
    "model_stock",
    "task_arithmetic scaling=0..1",
    "magnitude scaling=0..1 density=.05..1",
    "breadcrumbs scaling=0..1 density=.05..1 gamma=.002..0.05",
    "ties scaling=0..4 density=.05..1",
    "dare_linear scaling=0..1 density=.2..1",
    "dare_ties scaling=0..4 density=.2..1",
    "pcb scaling=0..3 ratio=.02..1",
    "knots_ties scaling=0..4 density=.05..1",
    "knots_dare scaling=0..4 density=.2..1",
    "tsv scaling=0..2",
    "iso_c scaling=0..3",
    "iso_cts scaling=0..3 common=.2..1",
    "wudi scaling=0..1.5 solver=exact",
    "subspace_sum scaling=0..1 energy=.7|.9|.99",
    "subspace_rescaled scaling=0..2 energy=.7|.9|.99",
    "subspace_iso scaling=0..3 energy=.7|.9|.99",
    "subspace_ties scaling=0..4 energy=.7|.9|.99 density=.05..1",
    "subspace_dare scaling=0..4 energy=.7|.9|.99 density=.2..1",
    "fisher floor=1e-10|1e-8|1e-6|1e-4|1e-2",
    "adamerging start=0..0.6 rate=.03 steps=100",
    "concrete scaling=0..1 rate=.1 steps=100",
    "concrete_layer:concrete inner=layer scaling=0..0.6 rate=.1 steps=100",
    "joint_training rate=.001|.003|.03|.1|.3 steps=100",
)
PAIRS = (
    "concrete task_arithmetic",
    "concrete_layer adamerging",
    "concrete joint_training",
    "subspace_iso iso_c",
    "subspace_ties ties",
    "subspace_dare dare_ties",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a bench, in the file that --bench names."""

    worlds: tuple[str, ...] = WORLDS  # zoos to train and merge, "world option=value ..."; a collection of yours instead
    seeds: int = 5  # zoos of each world
    seed: int = 0  # of the first zoo, of candidates and of methods that draw
    methods: tuple[str, ...] = METHODS  # "[label:]method option=value option=low..high option=a|b|c"
    evaluations: int = 6  # candidates of each method that are scored on tuning rows
    tuning: float = 0.4  # share of the held-out rows by which candidates are chosen; the others are for the test
    loss_rows: int = 16  # training rows of every task in a step of methods with a loss
    against: tuple[str, ...] = ("mean", "task_arithmetic")  # labels that all methods are compared with
    pairs: tuple[str, ...] = PAIRS  # more comparisons
    processes: int = 0  # zoos of worlds that are scored at a time; 0: one a core, within memory; 1 on accelerators


def load(spec, forbidden=()):
    """(Config, [Method]) of the file that --bench names.

    Args:
        spec: path, for Python files with an argument behind a colon.
        forbidden: folders whose files are data; a Python file in them is never run.

    Raises:
        ConfigError: no such file, or values that no bench could use.
    """
    config = configuration.freeze(Config, configuration.load_file(spec, forbidden=forbidden))
    for name in ("seeds", "evaluations", "loss_rows"):
        if getattr(config, name) < 1:
            raise errors.ConfigError(f"{name}={getattr(config, name)}: expected 1 or more")
    if config.processes < 0:
        raise errors.ConfigError(f"processes={config.processes}: expected 0 or more")
    if not 0 < config.tuning < 1 or config.seed < 0:
        raise errors.ConfigError(f"tuning={config.tuning}, seed={config.seed}: a share between 0 and 1, a seed from 0")
    methods = space.parse_all(config.methods)
    labels = [m.label for m in methods]
    for label in (*config.against, *(label for pair in config.pairs for label in pair.split())):
        errors.require_known("against or pairs", label, labels)
    if any(len(pair.split()) != 2 for pair in config.pairs):
        raise errors.ConfigError("pairs: two labels each, such as 'concrete task_arithmetic'")
    return config, methods


def run(config, workdir=None, *, stream=None):
    """Merges and scores; writes the record, a table and a page to `workdir`, if there is one.

    A run that was killed goes on with the same call: zoos, and methods that were scored, are kept.

    Args:
        config: `merge.Config` with `bench`; with a collection, that one is merged instead of the bench's worlds.
        workdir: folder, or None.
        stream: for progress, or None.

    Returns:
        dict as in merge_bench.json; with `dry_run` only the plan.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError: see `jaxsub.errors`.
    """
    own, methods = load(config.bench, [path for path in config.collection if os.path.isdir(path)])
    given = [name for name in NOT_TAKEN if getattr(config, name)]
    if given:
        raise errors.ConfigError(f"{given[0]}: --bench has no use for it; methods and their options are in its file")
    worlds = [sources.parse(text) for text in own.worlds] if not config.collection else []
    if not (worlds or config.collection):
        raise errors.ConfigError("worlds: none, and no --collection")
    if config.collection and not config.score:
        raise errors.ConfigError("no evaluator: give --score=module:function, a function of yours that scores weights")
    if config.dry_run:
        return _plan(own, methods, worlds)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory()) if workdir is None else workdir
        opened = sources.User.open(config) if config.collection else None
        identity = _identity(config, own, opened)
        stack.enter_context(workdirs.hold(place, identity, restart=config.restart, break_lock=config.break_lock))
        stack.enter_context(hostmemory.one_blas_thread())
        started = time.perf_counter()
        found = {"schema": SCHEMA, "config": configuration.to_dict(own), "collections": []}
        if opened is not None:
            found["collections"].append(_collection([opened], own, methods, place, stream))
        sources.sweep(place)
        zoos = itertools.product(range(len(worlds)), range(own.seeds))
        zoos = [(w, n) for w, n in zoos if not _is_scored(worlds[w], n, own, methods, place)]
        several = processes.count(own.processes, len(zoos))
        if several > 1:
            for world, number in processes.run(config.bench, place, zoos, several, stream):
                score_zoo(own, methods, place, world, number, stream)
        for world in worlds:
            zoos = [sources.World(world, own, place, own.seed + n, stream) for n in range(own.seeds)]
            found["collections"].append(_collection(zoos, own, methods, place, stream, several > 1))
            jax.clear_caches()  # compiled for the shapes of this world
        found["notes"] = merge_bench_table.notes(found)
        found["seconds"] = round(time.perf_counter() - started, 1)
        _write.write_json(os.path.join(place, RECORD), found)
        _write.write_text(os.path.join(place, PAGE), merge_bench_table.page(found))
        _write.write_text(os.path.join(place, TABLE), merge_bench_table.markdown(found))
    return found


def _identity(config, own, opened):
    from jaxsub import __version__

    given = {f"config.{name}": value for name, value in workdirs.options(config).items()}
    given |= {f"bench.{name}": value for name, value in configuration.to_dict(own).items() if name != "processes"}
    models = {} if opened is None else opened.digests
    found = {"program": "merge_bench", "jaxsub_version": __version__, **workdirs.machine(), **given}
    return found | {"models": models}


def _plan(own, methods, worlds):
    counts = {m.label: own.evaluations if m.tuned else 1 for m in methods}
    return {
        "plan": counts,
        "collections": [text for text, *_ in worlds] or ["yours"],
        "zoos": own.seeds if worlds else 1,
    }


def score_zoo(own, methods, place, world, number, stream):
    """Scores one zoo of the bench's worlds: the one with index `world`, its zoo `number`; what is there is kept."""
    one = sources.World(sources.parse(own.worlds[world]), own, place, own.seed + number, stream)
    with hostmemory.one_blas_thread():
        _zoo(one, number, own.seeds, own, methods, place, stream)


def _collection(zoos, own, methods, place, stream, quiet=False):
    """The record of one world or collection: baselines, and every method on every zoo."""
    each = [_zoo(one, number, len(zoos), own, methods, place, stream, quiet) for number, one in enumerate(zoos)]
    return merge_bench_table.collected(zoos[0].title, each, methods, own)


def _is_scored(world, number, own, methods, place):
    """Whether all of a zoo is there."""
    parts = _Parts(place, sources.World(world, own, place, own.seed + number, None))
    return parts.kept(BASELINES, []) is not None and all(
        parts.kept(m.label, _what(m, own)) is not None for m in methods
    )


def _what(method, own):
    """What a part of a method is of, beside the zoo."""
    return [method.text, own.evaluations, own.seed]


def _zoo(one, number, total, own, methods, place, stream, quiet=False):
    """{"baselines", "methods": {label: what `tried` found}} of one zoo of `total`; `quiet` of what was there."""
    parts = _Parts(place, one)
    case = functools.cache(one.case)  # made when it is first needed
    base = parts.get(BASELINES, [], lambda: baselines(case()))
    found = {}
    for method in methods:
        begun = time.perf_counter()
        individual = base["individual"][cases.TUNING]
        work = functools.partial(_tried, case, method, own.evaluations, one.seed, individual)
        found[method.label] = parts.get(method.label, _what(method, own), work)
        if stream is not None and (parts.made or not quiet):
            stream.write(_line(one, number, total, method, found[method.label], base, begun) + "\n")
    return {"baselines": base, "methods": found}


def _line(one, number, total, method, found, base, begun):
    where = f"{errors.quote(one.title.split()[0], 40)} {number + 1}/{total}: {errors.quote(method.label, 40)}"
    if "refused" in found:
        return f"{where} not run: {errors.quote(found['refused'], 120)}"
    share = np.mean(np.divide(found["scores"], base["individual"][cases.TEST]))
    seconds = time.perf_counter() - begun
    return f"{where} {share:.3f} of the individual models ({len(found['tuning'])} tried, {seconds:.1f} s)"


class _Parts:
    """What was found of a zoo before, one sealed file a method."""

    def __init__(self, place, one):
        from jaxsub import __version__

        name = hashlib.sha256(one.key.encode()).hexdigest()[:12]
        self.folder, self.whose = os.path.join(place, PARTS, name), [__version__, workdirs.machine(), one.identity]
        self.made = False  # whether the last part was
        _files.make_folder(self.folder)

    def kept(self, label, what):
        """The part called `label`, as it was found before; None where it was not."""
        try:
            found = _write.read_sealed(self._path(label))
            return found["part"] if found["digest"] == self._digest(label, what) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def get(self, label, what, work):
        """The part called `label`, kept or made now by `work()`."""
        part = self.kept(label, what)
        self.made = part is None
        if self.made:
            part = json.loads(json.dumps(work(), sort_keys=True))
            _write.write_sealed(self._path(label), {"digest": self._digest(label, what), "part": part})
        return part

    def _path(self, label):
        return os.path.join(self.folder, f"{hashlib.sha256(label.encode()).hexdigest()[:12]}.json")

    def _digest(self, label, what):
        return hashlib.sha256(json.dumps([self.whose, label, what], sort_keys=True).encode()).hexdigest()


def baselines(case):
    """Scores of what is no merge: each model on every task, the base, and the ensemble of all models.

    Returns:
        {"tasks", "individual": {part: (T,)}, "models": {part: (N, T)}, "base": (T,) or None, "ensemble": (T,) or None,
        "kept": names of layers that are not merged}; base and ensemble on test rows.

    Raises:
        InputError: a model scores 0 or less on its own task.
    """
    ones = np.eye(len(case.ids))
    models = {p: np.array([case.scores(case.combined(c), p) for c in ones]) for p in (cases.TUNING, cases.TEST)}
    individual = {part: np.diag(found).tolist() for part, found in models.items()}
    for part, scores in individual.items():
        for name, score in zip(case.ids, scores, strict=True):
            if not score > 0:
                hint = "scores are divided by it: let higher be better, and 0 the worst"
                raise errors.InputError(name, f"scores {score:g} on {part} data of its own task", hint=hint)
    found = {"tasks": list(case.tasks), "individual": individual}
    found["models"] = {part: scores.tolist() for part, scores in models.items()}
    nothing = np.zeros(len(case.ids))
    found["base"] = case.scores(case.combined(nothing), cases.TEST).tolist() if case.has_base else None
    found["ensemble"] = _ensemble(case).tolist() if case.can_vote else None
    found["kept"] = case.kept
    return found


def _ensemble(case):
    votes = 0.0
    for c in np.eye(len(case.ids)):
        votes = votes + np.asarray(jax.nn.softmax(case.outputs(case.combined(c), cases.TEST)), np.float64)
    return case.score_outputs(votes, cases.TEST)


def _tried(case, method, count, seed, individual):
    """`tried` of `case()`, or why the method cannot merge these models."""
    made = case()
    try:
        return tried(made, method, count, seed, individual)
    except errors.ConfigError as error:
        return {"refused": str(error)}


def tried(case, method, count, seed, individual):
    """A method's candidates on tuning rows, and the test scores of the best of them alone.

    Args:
        case: Case.
        method: `merge_bench_space.Method`.
        count: candidates, where the method has something to tune.
        seed: of candidates and draws.
        individual: (T,) the models' tuning scores on their own tasks.

    Returns:
        {"tuning": mean normalised scores of the candidates, "candidates": their options, "chosen", "scores": (T,)}.
    """
    values, best, chosen = [], None, 0
    candidates = method.candidates(count, seed)
    for number, options in enumerate(candidates):
        weights = case.merge(method.name, method.module, options, seed)
        values.append(float(np.mean(case.scores(weights, cases.TUNING) / np.asarray(individual))))
        if best is None or values[-1] > values[chosen]:
            best, chosen = weights, number
    return {
        "tuning": values,
        "candidates": [dataclasses.asdict(options) for options in candidates],
        "chosen": chosen,
        "scores": case.scores(best, cases.TEST).tolist(),
    }
