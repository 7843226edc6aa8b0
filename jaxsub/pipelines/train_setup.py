"""What a training is about: network, tasks, the bundle's subspaces in the network's layers, and where it starts.

bundle, base --> spaces {layer: Space}, start {layer: array}
task         --> variations that no member of the bundle was trained on: rows to fit, to choose by, and held out
"""

import dataclasses
import inspect
import json
import os

import numpy as np

from jaxsub import errors, formats, plugins
from jaxsub.bundle import files
from jaxsub.parametrisations import _spaces
from jaxsub.pipelines import hooks
from jaxsub.pipelines.zoo import parse_options
from jaxsub.tasks import _data
from jaxsub.training import network as networks

MOST_LABELS = 1 << 26  # bytes of a file of labels


@dataclasses.dataclass(frozen=True)
class Variation:
    """One task: its name and its rows, `fit` for gradients, `choose` for what is decided by, `held_out` for scores."""

    name: str
    options: object
    fit: _data.Data
    choose: _data.Data
    held_out: _data.Data


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all methods of a training have in common."""

    task: object
    network: networks.Network
    variations: tuple[Variation, ...]
    spaces: dict
    start: dict
    names: dict  # of the network's layers -> what the bundle, or the base, calls them
    bundle: object = None
    skipped: int = 0  # variations left out: members were trained on them
    is_blind: bool = False  # no labels say what members were trained on
    fixed: tuple[str, ...] | list[str] = ()  # layers in which the bundle's models are equal: no subspace to train in


def of(config):
    """The Setup of a train.Config.

    Raises:
        ConfigError, InputError: what is missing or does not fit.
    """
    task = task_of(config.task)
    options = parse_options(task.Options, (*config.task_options, f"batch_size={config.batch_size}"))
    bundle = files.load(config.bundle) if config.bundle else None
    seen = _seen(config, bundle)
    variations, skipped = _variations(task, options, config, seen or {})
    module, example = module_of(config.model, task, config.model_options), variations[0].fit.inputs[:2]
    network, shapes = networks.of(module, example, config.compute)
    spaces = _spaces.of_bundle(bundle, shapes) if bundle is not None else {}
    start, names = _start(config, bundle, spaces, shapes, module, example)
    varied = _spaces.with_directions(spaces)
    fixed, is_blind = sorted({*spaces} - {*varied}), bundle is not None and seen is None
    return Setup(task, network, variations, varied, start, names, bundle, skipped, is_blind, fixed)


PARTS = ("Options", "load", "batches", "loss", "score", "OUTPUTS")  # of a task, to be trained on


def task_of(spec, option="task", parts=PARTS):
    """The task that an option names: a module of `tasks`, or the user's own `module:name` with these parts.

    Raises:
        ConfigError: no such task, or one that lacks a part.
    """
    if ":" not in spec:
        return plugins.load("tasks", spec)
    found = hooks.load(option, spec)
    lacks = [n for n in parts if not hasattr(found, n)]
    if lacks:
        raise errors.ConfigError(
            f"{option}={errors.quote(spec)}: has no {', '.join(lacks)}; see jaxsub/tasks/__init__.py"
        )
    return found


def module_of(spec, task, texts=(), option="model"):
    """The flax module that an option names: of `models`, or the user's own `module:name`; the task's for an empty one.

    Raises:
        ConfigError: no such model, or options `texts` that it does not have.
    """
    spec = spec or getattr(task, "MODEL", "")
    if not spec:
        raise errors.ConfigError(
            f"{option}: the task names none; give --config.{option}=mlp, or module:name of your own"
        )
    made = hooks.load(option, spec) if ":" in spec else plugins.load("models", spec).Model
    given = dict(text.partition("=")[::2] for text in texts)
    try:
        known = {f.name: f.type for f in dataclasses.fields(made) if f.init and f.name not in ("parent", "name")}
    except TypeError:
        known = {}
    values = {"outputs": task.OUTPUTS} if _takes_outputs(made) else {}
    for name, text in given.items():
        if name not in known:
            raise errors.ConfigError(f"model_options: no {errors.quote(name)!r}{errors.nearest(name, known)}")
        try:
            values[name] = text if known[name] in (str, "str") else int(text)
        except ValueError:
            raise errors.ConfigError(f"model_options: {errors.quote(name)}={errors.quote(text)}, a number") from None
    return made(**values) if callable(made) else made


def _takes_outputs(made):
    """Whether what makes a model, a class or a function, is one of `outputs` and does not have them yet."""
    try:
        return "outputs" in inspect.signature(made).parameters and "outputs" not in getattr(made, "keywords", ())
    except (TypeError, ValueError):
        return False


def weights_of(model, shapes):
    """({layer: array}, {layer: what the file calls it}) of the network's layers that a model has, as they are stored.

    Raises:
        ConfigError: another shape than the network's.
    """
    found, names = {}, {}
    for tensor in model.tensors.values():
        name, _ = _spaces.flax_name(tensor.name)
        if name in shapes:
            found[name] = _spaces.turned(formats.read(model, tensor), shapes[name], tensor.name)
            names[name] = tensor.name
    return found, names


def _seen(config, bundle):
    """Names of the tasks that the bundle's members were trained on, as their labels say; None without any."""
    path = config.labels
    if not path and bundle is not None:
        members = bundle.provenance.get("models", ())
        path = os.path.join(os.path.dirname(os.path.dirname(members[0]["path"])), "labels.json") if members else ""
        if not os.path.isfile(path):
            return None
    if not path:
        return None
    try:
        if os.path.getsize(path) > MOST_LABELS:
            raise ValueError("too large")
        with open(path, encoding="utf-8") as file:
            labels = json.load(file)
        return {str(one["task"]): None for one in labels.values() if "task" in one} or None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise errors.InputError(path, f"holds no labels of models: {errors.quote(error, 80)}") from error


def _variations(task, options, config, seen):
    """(Variations, how many were skipped): those of draw, draw + 1, ... that no member was trained on."""
    found, draw, skipped = {}, options.draw if hasattr(options, "draw") else 0, 0
    limit = draw + config.tasks + 1000
    while len(found) < config.tasks and draw < limit:
        own = dataclasses.replace(options, draw=draw) if hasattr(options, "draw") else options
        name = task.name(own) if hasattr(task, "name") else config.task
        draw += 1
        if name in seen:
            skipped += 1
        elif name not in found:
            found[name] = own
    if len(found) < config.tasks:
        more = f"; {len(seen)} tasks that the bundle's members were trained on are left out" if seen else ""
        raise errors.ConfigError(
            f"tasks={config.tasks}: the task has {len(found)} variations with these options{more}; ask for fewer, "
            "or set another variant with --config.task_options"
        )
    return tuple(_variation(task, name, own, config.validation) for name, own in found.items()), skipped


def _variation(task, name, options, share):
    train, held_out = task.load(options)
    require_apart(train, held_out, name)
    rows, count = np.asarray(train.rows), int(train.num_rows)
    order = np.concatenate([np.random.RandomState(0).permutation(rows[:count]), rows[count:]]).astype(np.int32)
    kept = max(round(share * count), 1)
    if kept >= count:
        raise errors.ConfigError(f"task {errors.quote(name)}: {count} rows, too few to choose by a share of {share}")
    choose = train._replace(rows=order, num_rows=np.int32(kept))
    fit = train._replace(rows=np.roll(order, -kept), num_rows=np.int32(count - kept))
    return Variation(name, options, fit, choose, held_out)


def require_apart(train, held_out, name):
    """Refuses a task that scores on rows it trains on.

    Raises:
        ConfigError: naming the task and how many rows are in both.
    """
    inputs, asked = ([np.ascontiguousarray(x).tobytes() for x in data.used()[0]] for data in (train, held_out))
    if not asked:
        raise errors.ConfigError(f"task {errors.quote(name)}: no held-out rows")
    known = dict.fromkeys(inputs)
    both = sum(one in known for one in asked)
    if both:
        raise errors.ConfigError(
            f"task {errors.quote(name)}: {both} of {len(asked)} held-out rows are training rows too; a score on "
            "them says nothing: hold other rows out"
        )


def _mean_of_whole(bundle, shapes, names):
    """{layer: mean over the members} of layers that the bundle keeps whole of all of them."""
    sums, counts = {}, {}
    for tensors in bundle.passthrough.values():
        for stored, array in tensors.items():
            name, _ = _spaces.flax_name(stored)
            if name in shapes:
                names[name] = stored
                sums[name] = sums.get(name, 0) + _spaces.turned(array, shapes[name], stored).astype(np.float64)
                counts[name] = counts.get(name, 0) + 1
    return {n: total / counts[n] for n, total in sums.items() if counts[n] == len(bundle.model_ids)}


def _start(config, bundle, spaces, shapes, module, example):
    """({layer: array} where training begins, {layer: its name in the bundle or the base})."""
    import jax
    import jax.numpy as jnp

    names = {name: name for name in shapes}
    found = {}
    if config.base:
        found, own = weights_of(formats.open_model(config.base, allow_roots=config.allow_roots), shapes)
        names |= own
    if bundle is not None:
        if config.initial not in ("base", "fresh"):
            found |= _mean_of_whole(bundle, {n: s for n, s in shapes.items() if n not in found}, names)
        for layer in bundle.layers:
            name, _ = _spaces.flax_name(layer.name, layer.parametrisation == "lora")
            if name in spaces and not spaces[name].is_update:
                names[name] = layer.name
                if config.initial not in ("base", "fresh"):
                    found[name] = spaces[name].mean
    if config.initial == "fresh" or (not config.base and bundle is None):
        found = networks.fresh(module, example, jax.random.key(config.seed))
    missing = [name for name in shapes if name not in found]
    if missing:
        what = "the bundle has no mean of" if bundle is not None else "the base lacks"
        raise errors.ConfigError(
            f"{what} {errors.quote(missing[0])}{f' and {len(missing) - 1} more layers' if len(missing) > 1 else ''}: "
            "give --base=MODEL that has them"
        )
    return {name: jnp.asarray(found[name], jnp.float32) for name in shapes}, names
