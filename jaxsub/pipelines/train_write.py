"""What a training leaves: coefficients of the bundle, models in its members' layers, or adapters for PEFT.

trained/<method>.safetensors    what was trained, (tasks, seeds, ...) an array, at the chosen learning rate
<write_models>/<task>-<seed>    models: .safetensors with the bundle's names and axes, or a PEFT folder of updates
"""

import itertools
import os
import re

import jax
import numpy as np

from jaxsub import errors
from jaxsub.formats import _files, _portable, _tinylora, peft, safetensors
from jaxsub.parametrisations import _spaces


def coefficients(training, trainable, chosen, folder):
    """Writes what was trained: name -> (tasks, seeds, ...) at the chosen rate."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(trainable)):
        name = ".".join(str(part.key) for part in path)
        found[name] = np.ascontiguousarray(leaf.reshape(*training.scores_shape, *leaf.shape[1:])[:, :, chosen])
    _files.make_folder(folder)
    safetensors.write(os.path.join(folder, f"{training.method.name}.safetensors"), found)


def labels(training):
    """What the runs of a method are called: task and seed, safe as file names; like names of tasks get a number."""
    found, known = [], set()
    for variation in training.setup.variations:
        word = re.sub(r"[^A-Za-z0-9]+", "_", variation.name).strip("_")[:100] or "task"
        more = (f"{word}_{n}" for n in itertools.count(2))
        while word.lower() in known:  # some disks do not tell upper from lower case
            word = next(more)
        known.add(word.lower())
        found += [f"{word}-{seed}" for seed in training.seeds]
    return found


def runs_of(training, chosen):
    """Places of the runs at the chosen rate, in the order of `labels`."""
    count = len(training.rates)
    return [n * count + chosen for n in range(len(training.setup.variations) * len(training.seeds))]


def models(training, trainable, chosen, folder, layout):
    """Writes each task and seed as a model in the new folder; returns their paths.

    Raises:
        WorkdirError: the folder exists.
        ConfigError: updates that the layout does not hold.
    """
    names, runs, found = labels(training), runs_of(training, chosen), []
    is_adapter = any(space.is_update for space in training.setup.spaces.values())
    with _files.new_folder(folder) as made:
        if is_adapter:
            _adapters(training, trainable, runs, [os.path.join(made, name) for name in names], layout)
            return [os.path.join(folder, name) for name in names]
        for name, run in zip(names, runs, strict=True):
            weights = training.weights(trainable, run)
            stored = {training.setup.names[n]: _back(w, training.setup.names[n]) for n, w in weights.items()}
            safetensors.write(os.path.join(made, f"{name}.safetensors"), stored)
            found.append(os.path.join(folder, f"{name}.safetensors"))
    return found


def _back(w, name):
    """A layer's weights with the axes that its file has."""
    _, is_turned = _spaces.flax_name(name)
    if not is_turned or w.ndim not in _spaces.ORDERS:
        return np.ascontiguousarray(w)
    return np.ascontiguousarray(w.transpose(np.argsort(_spaces.ORDERS[w.ndim])))


def _adapters(training, trainable, runs, places, layout):
    """Writes updates of a base as PEFT folders, from their factors."""
    setup = training.setup
    if layout == "tinylora":
        config, tensors, vectors = _tinylora.build(_tinylora_spaces(training, trainable, runs))
        for place, vector in zip(places, vectors, strict=True):
            _tinylora.write(place, config, tensors, vector)
        return
    for place, run in zip(places, runs, strict=True):
        updates = {}
        for name, (left, right) in training.factors(trainable, run).items():
            # x @ (left @ right) of the network is (right.T @ left.T) of a module with weights (o, i)
            updates[_module(setup, name)] = peft.Update(left.T, right.T)
        peft.write_portable(place, updates)


def _module(setup, name):
    """What the base calls the module of a kernel."""
    layer = next((x.name for x in setup.bundle.layers if _spaces.flax_name(x.name, True)[0] == name), None)
    return layer or name.removesuffix("/kernel").replace("/", ".")


def _tinylora_spaces(training, trainable, runs):
    """Layer -> Space of runs whose cores were trained.

    Raises:
        ConfigError: another parametrisation than cores in the bundle's factors.
    """
    found, known = {}, training.frozen_of(runs[0]).get("factors", {})
    for name, cores in trainable.items():
        factors = known.get(name, {})
        if sorted(factors) != ["0", "1"]:
            raise errors.ConfigError(
                f"peft_layout=tinylora holds cores in the bundle's factors, not {training.method.name}; train "
                "--parametrisation=core, or write the portable layout"
            )
        inner, outer = (np.asarray(factors[axis], np.float64) for axis in ("0", "1"))
        own = np.asarray(cores, np.float64)[runs].transpose(0, 2, 1)
        found[_module(training.setup, name)] = _tinylora.Space(outer, inner, own, _portable.LINEAR)
    return found


def events(metrics, folder):
    """Writes records of metrics as an event file that TensorBoard shows."""
    from jaxsub.training import events as writer

    scalars = [
        (record["step"], name, record[name])
        for record in metrics
        for name in ("loss", "validation")
        if record[name] is not None
    ]
    writer.write(folder, scalars)
