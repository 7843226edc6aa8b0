"""`jaxsub train`: new tasks by coefficients of a bundle's subspaces alone, beside baselines that give them a meaning.

bundle, task --> runs (tasks x seeds x learning rates) of each method --> held-out scores with intervals
"""

import contextlib
import dataclasses
import json
import math
import os

import numpy as np

from jaxsub import collection, errors, formats, hostmemory
from jaxsub.formats import _files
from jaxsub.pipelines import plan, workdir as workdirs
from jaxsub.report import _write

WRITTEN = "written.json"  # the models that a run wrote, for the run that goes on from it
RECORD, SCHEMA = "train.json", "jaxsub.train/1"
SHARDS = ("batch", "runs", "features")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a training; each can be set as --config.<field>=."""

    bundle: str = ""  # folder that fit wrote; its subspaces are trained in
    base: str = ""  # a model that has the layers which the bundle has no mean of
    task: str = "digits"  # digits, mnist1d, words, or module:name of your own
    task_options: tuple[str, ...] = ()  # of the task, as name=value
    model: str = ""  # mlp, cnn, vit, transformer, or module:name of your own; empty: the task's
    model_options: tuple[str, ...] = ()  # of the model, as name=value
    parametrisation: str = "scalar"  # scalar, core, factor, moving_basis, lora, tucker, sparse_low_rank, full, ...
    options: tuple[str, ...] = ()  # of the parametrisation, as name=value
    rank: int = 0  # components a layer; 0: all that the bundle holds
    initial: str = "mean"  # where all begin: mean, base, fresh, nearest (member), ridge, posterior
    examples: int = 64  # training rows that ridge, posterior and nearest look at
    baselines: tuple[str, ...] = ("random", "random_matched", "lora", "last_layer", "full")  # trained beside it
    lora_rank: int = 4  # of the baseline; its scale is 2
    last_layer: str = ""  # regular expression; empty: layers called head, output, classifier or lm_head
    labels: str = ""  # labels.json of the bundle's members, whose tasks are left out; empty: the one beside them
    tasks: int = 1  # variations of the task, by `draw`
    seeds: int = 5  # runs of each, with seeds from `seed` on
    seed: int = 0
    steps: int = 400
    batch_size: int = 64
    same_batches: bool = False  # for all runs: cheaper by far, and seeds no longer differ by their batches
    accumulate: int = 1  # parts a batch is computed in
    optimizer: str = "adam"  # of optax (adam, adamw, sgd, lion, ...), dct_adamw or riemannian_sgd
    optimizer_options: tuple[str, ...] = ()  # as name=value
    learning_rates: tuple[float, ...] = ()  # tried for every run, one is chosen a method; empty: .001 to .1
    schedule: str = "constant"  # or cosine
    warmup: int = 0  # steps
    compute: str = "float32"  # or bfloat16, of weights and inputs; what is trained is float32
    evaluate_every: int = 50  # steps between evaluations on the validation rows, and checkpoints
    patience: int = 0  # evaluations without a better one after which a run stops; 0: never
    validation: float = 0.15  # share of the training rows that rates and stops are decided by
    devices: int = 1  # 0: all
    shard: str = "batch"  # what devices share: batch, runs or features
    posterior: bool = False  # infer a sparse posterior of the coefficients on each task too
    density: float = 0.5  # share of the coefficients that it keeps
    posterior_steps: int = 2000
    sweep: tuple[int, ...] = ()  # numbers to train, few to many: intrinsic dimension instead of the comparison
    write_models: str = ""  # new folder for the trained models, one a task and seed
    peft_layout: str = "portable"  # of trained low-rank updates: portable or tinylora
    allow_roots: tuple[str, ...] = ()  # folders that links may lead into
    tensorboard: bool = False  # write the metrics for TensorBoard too, to WORKDIR/tensorboard
    restart: bool = False  # start over in a workdir that is in use by other options
    break_lock: bool = False  # take over a workdir that a run on another host left; make sure that it has ended
    dry_run: bool = False


def validate(config):
    """Raises ConfigError for values that no training could use, before anything is read."""
    from jaxsub.training import initial

    for name in ("tasks", "seeds", "steps", "batch_size", "accumulate", "evaluate_every", "examples", "lora_rank"):
        if getattr(config, name) < 1:
            raise errors.ConfigError(f"{name}={getattr(config, name)}: expected 1 or more")
    for name in ("rank", "warmup", "patience", "devices", "seed"):
        if getattr(config, name) < 0:
            raise errors.ConfigError(f"{name}={getattr(config, name)}: expected 0 or more")
    if config.batch_size % config.accumulate:
        raise errors.ConfigError(f"accumulate={config.accumulate}: does not divide batch_size={config.batch_size}")
    if not 0 < config.validation < 1:
        raise errors.ConfigError(f"validation={config.validation}: a share between 0 and 1")
    if any(not 0 < rate < math.inf for rate in config.learning_rates):
        raise errors.ConfigError("learning_rates: expected finite numbers above 0")
    errors.require_known("initial", config.initial, initial.KINDS)
    errors.require_known("compute", config.compute, ("float32", "bfloat16"))
    errors.require_known("shard", config.shard, SHARDS)
    errors.require_known("peft_layout", config.peft_layout, ("portable", "tinylora"))
    if config.initial == "base" and not config.base:
        raise errors.ConfigError("initial=base: give --base=MODEL")
    if config.sweep and (min(config.sweep) < 1 or list(config.sweep) != sorted({*config.sweep})):
        raise errors.ConfigError("sweep: increasing numbers of 1 and more expected")
    if config.sweep and (config.write_models or config.posterior):
        raise errors.ConfigError("sweep: measures dimensions alone; leave out write_models and posterior")


def run(config, workdir=None, *, stream=None):
    """Trains; writes the record, metrics and checkpoints to `workdir`, if there is one.

    A run that was killed goes on with the same call, and ends as one in one piece, to the bit.

    Returns:
        dict as train.json: "methods", each with its scores (tasks, seeds), and "comparisons" with random subspaces.

    Raises:
        ConfigError, InputError, WorkdirError, ResourceError: see `jaxsub.errors`.
    """
    from jaxsub.pipelines import train_setup

    validate(config)
    setup = train_setup.of(config)
    if config.write_models and _written(config, workdir) is None:
        _files.require_new(config.write_models)
    with contextlib.ExitStack() as stack:
        if workdir is not None and not config.dry_run:
            held = workdirs.hold(workdir, identity(config, setup), restart=config.restart, break_lock=config.break_lock)
            stack.enter_context(held)
            if config.restart:
                _forget(workdir)
        stack.enter_context(hostmemory.one_blas_thread())
        return _train(config, setup, workdir, stream)


def identity(config, setup):
    """What a training is; see `workdir.identity`."""
    from jaxsub import __version__

    manifest = os.path.join(config.bundle, "manifest.json") if config.bundle else None
    models = {v.name: v.name for v in setup.variations}
    if manifest:
        from jaxsub.bundle import files

        models["bundle"] = files.identity(manifest)["sha256"]
    if config.base:
        models["base"] = collection.digest(formats.open_model(config.base, allow_roots=config.allow_roots))
    found = {f"config.{name}": value for name, value in workdirs.options(config).items() if name != "write_models"}
    return {"program": "train", "jaxsub_version": __version__, **workdirs.machine(), **found, "models": models}


def _written(config, workdir):
    """Paths of the models that this training wrote before it was killed; None if it did not, or they are gone."""
    path = os.path.join(workdir or "", WRITTEN)
    if workdir is None or config.restart or not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            found = [str(one) for one in json.load(file)]
    except (OSError, ValueError, TypeError) as error:
        raise errors.WorkdirError(f"{errors.quote(path)}: holds no list of models; --restart") from error
    place = os.path.normpath(config.write_models)
    is_ours = all(os.path.dirname(os.path.normpath(one)) == place and os.path.lexists(one) for one in found)
    return found if found and is_ours else None


def _forget(workdir):
    import shutil

    from jaxsub.pipelines import train_sweep

    for name in ("checkpoints", "metrics"):
        shutil.rmtree(os.path.join(workdir, name), ignore_errors=True)
    for name in (WRITTEN, train_sweep.PARTS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(workdir, name))


def _train(config, setup, workdir, stream):
    from jaxsub.parametrisations import _spaces
    from jaxsub.pipelines import train_posterior, train_runs, train_table, train_write

    mesh = _mesh(config)
    found = {
        "schema": SCHEMA,
        "tasks": [v.name for v in setup.variations],
        "skipped": setup.skipped,
        "blind": setup.is_blind,
    }
    found["fixed"] = list(setup.fixed)
    found["saturated"] = [[*one] for one in _spaces.saturated(setup.spaces)]
    found |= {"seeds": config.seeds, "steps": config.steps, "initial": config.initial, "methods": []}
    if config.sweep and not config.dry_run:
        return _swept(config, setup, found, workdir, stream)
    methods = train_runs.methods(config, setup)
    if config.dry_run:
        found["plan"] = [_planned(train_runs.Training(m, setup, config), is_compiled=True) for m in methods]
        return found
    for method in methods:
        training = train_runs.Training(method, setup, config, mesh)
        if stream is not None:
            one = _planned(training)
            stream.write(
                f"{method.name}: {one['runs']} runs of {one['numbers']} numbers, arrays of {plan.size(one['bytes'])}\n"
            )
        state, metrics = training.train(workdir, _bar(stream))
        record, chosen = _record(training, state, metrics)
        found["methods"].append(record)
        if workdir is not None:
            train_write.coefficients(training, state.best, chosen, os.path.join(workdir, "trained"))
        if method is methods[0] and config.posterior:
            found["posterior"] = train_posterior.run(training, config)
        if method is methods[0] and config.write_models:
            found["written"] = _written(config, workdir)
            if found["written"] is None:
                place = config.write_models
                found["written"] = train_write.models(training, state.best, chosen, place, config.peft_layout)
                if workdir is not None:
                    _write.write_json(os.path.join(workdir, WRITTEN), found["written"])
        if config.tensorboard and workdir is not None:
            train_write.events(metrics, os.path.join(workdir, "tensorboard", method.name))
    found["comparisons"] = train_table.comparisons(found["methods"])
    if workdir is not None:
        _write.write_json(os.path.join(workdir, RECORD), found)
    return found


def _swept(config, setup, found, workdir, stream):
    from jaxsub.pipelines import train_sweep

    found["sweep"] = train_sweep.run(config, setup, stream, workdir)
    if workdir is not None:
        _write.write_json(os.path.join(workdir, RECORD), found)
        _write.write_text(os.path.join(workdir, "sweep.html"), train_sweep.page(found["sweep"]))
    return found


def _mesh(config):
    from jaxsub import placement

    if config.devices == 1:
        return None
    mesh = placement.make_mesh(config.devices, axis="features" if config.shard == "features" else "models")
    if config.shard == "batch" and (config.batch_size // config.accumulate) % mesh.size:
        raise errors.ConfigError(
            f"batch_size={config.batch_size}: {mesh.size} devices cannot share a part of it evenly"
        )
    return mesh


def _planned(training, *, is_compiled=False):
    """What a method trains, and its bytes: arrays that stay, and with `is_compiled` what its kernels take beside them.

    Activations and the scores of all runs on all rows at once can be many times the arrays; only the compiler knows.
    """
    import jax

    leaves = jax.tree.leaves((training.trainable, training.runs.frozen, training.runs.data))
    size = sum(x.nbytes for x in leaves) + 5 * sum(x.nbytes for x in jax.tree.leaves(training.trainable))
    size += training.kernel_bytes() if is_compiled else 0
    return {"method": training.method.name, "runs": len(training.runs.rates), "numbers": training.count, "bytes": size}


def _bar(stream):
    """Called with each record of metrics: one line on the stream, over itself on a terminal."""
    if stream is None:
        return None
    end = "\r" if stream.isatty() else "\n"

    def show(record):
        loss, score = ("not finite" if record[n] is None else format(record[n], ".4f") for n in ("loss", "validation"))
        stream.write(f"  step {record['step']:6}  loss {loss}  validation {score}{end}")
        stream.flush()

    return show


def _record(training, state, metrics):
    """(record of a method, number of the learning rate that was chosen by the validation rows)."""
    from jaxsub.pipelines import train_table

    choose = np.asarray(state.best_score, np.float64).reshape(training.scores_shape)
    chosen = train_table.chosen(choose)
    begun = training.scores(training.trainable)[:, :, chosen]
    reached = training.scores(state.best)[:, :, chosen]
    return {
        "name": training.method.name,
        "numbers": training.count,
        "learning_rate": float(training.rates[chosen]),
        "start": begun.tolist(),
        "scores": reached.tolist(),
        "validation": np.where(np.isfinite(own := choose[:, :, chosen]), own, None).tolist(),
        "loss": metrics[-1]["loss"] if metrics else None,
        "stopped": int(np.asarray(state.is_stopped).sum()),
        "not_finite": max((m.get("not_finite", 0) for m in metrics), default=0),
    }, chosen
