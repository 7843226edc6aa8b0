"""The digits zoo: networks 64-64-10 on handwritten digits, from one start or own starts, on one task or own ones.

The hidden units are odd functions (`soft_shrink`): turning a unit's sign is a symmetry of the network, of its start and
of Adam, so the weights of networks from separate starts have mean zero, whatever they learn. With ReLU all units drift
one way instead, and the mean of 200 unrelated networks holds 1.7 % (hidden) and 3 to 4.5 % (output) of the energy
where chance is 0.5 %.
"""

import dataclasses
import os

import numpy as np

from jaxsub import errors
from jaxsub.formats import safetensors
from jaxsub.models import _trees, mlp
from jaxsub.tasks import _data, digits
from jaxsub.worlds import _evaluation, _files, _training

BASE = "base.safetensors"  # the common start, beside the models
STREAMS = ("start", "batches")
KERNELS = ("hidden/kernel", "output/kernel")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the digits zoo."""

    num_models: int = 200
    steps: int = 400
    learning_rate: float = 3e-3
    batch_size: int = 64
    hidden: int = 64
    activation: str = "soft_shrink"


def require(options):
    """Refuses options that cannot be trained with.

    Raises:
        ConfigError: naming the option.
    """
    for name in ("num_models", "steps", "batch_size", "hidden"):
        if getattr(options, name) < 1:
            raise errors.ConfigError(f"{name}={getattr(options, name)}: expected 1 or more")
    if not options.learning_rate > 0:
        raise errors.ConfigError(f"learning_rate={options.learning_rate}: expected more than 0")
    if options.activation not in mlp.ACTIVATIONS:
        hint = errors.nearest(options.activation, mlp.ACTIVATIONS)
        known = ", ".join(sorted(mlp.ACTIVATIONS))
        raise errors.ConfigError(f"activation={errors.quote(options.activation)!r}: expected one of {known}{hint}")


def make(options, seed, folder, *, same_start, split_task):
    """Trains and writes one world.

    Args:
        options: Options.
        seed: of starts, tasks and batches.
        folder: an existing folder.
        same_start: whether all networks start from the same weights.
        split_task: whether each network sees its own random half of the classes only.
    """
    require(options)
    params, classes, reached = trained(options, seed, same_start=same_start, split_task=split_task)
    labels = [
        {
            "task": "digits " + "".join(str(c) for c in np.flatnonzero(classes[i])),
            "seed": str(seed),
            "start": "0" if same_start else str(i),
            "accuracy": f"{reached[i]:.4f}",
        }
        for i in range(options.num_models)
    ]
    _files.write_models(folder, _trees.flat(params), labels)
    if same_start:
        example, model = digits.load()[0].inputs[:1], network(options)
        key, _ = _training.numbered(seed, *STREAMS)
        first = _training.begun(key, example, options.num_models, same_start=True, model=model)
        arrays = {name: np.asarray(array)[0] for name, array in _trees.flat(first).items()}
        safetensors.write(os.path.join(folder, BASE), arrays)


def network(options):
    """The flax module of a world."""
    return mlp.MLP(hidden=options.hidden, activation=options.activation)


def evaluation(options, seed):
    """The Evaluation of a world of one start, in which each network sees its own half of the classes."""
    halves = random_halves(options.num_models, seed)
    train, held_out = (
        tuple(_data.of_classes(split.inputs, split.targets, np.flatnonzero(own)) for own in halves)
        for split in digits.load()
    )
    names = tuple("digits " + "".join(str(c) for c in np.flatnonzero(own)) for own in halves)
    return _evaluation.Evaluation(network(options), digits, names, train, held_out, BASE)


def trained(options, seed, *, same_start, split_task):
    """Parameters (N, ...) by layer and name, classes (N, 10) bool, held-out accuracy (N,) of one world."""
    model = network(options)
    classes = random_halves(options.num_models, seed) if split_task else np.ones((options.num_models, 10), bool)
    names = np.tile(np.arange(10, dtype=np.int32), (options.num_models, 1))
    params, reached = _training.collection(
        options, seed, STREAMS, classes, names, {}, same_start=same_start, model=model
    )
    return params, classes, reached


def random_halves(num_models, seed):
    """(N, 10) bool: five of the ten classes each, drawn apart from everything else."""
    rng = np.random.default_rng([seed, 1])
    return rng.permuted(np.tile(np.arange(10) < 5, (num_models, 1)), axis=1)
