"""Networks trained on variations of one task from one pretrained base: what is merged, and trained further.

plain digits --> base --> eight variations (turned, mirrored, inverted, names permuted, ...), several models each

The base lies beside the models as base.safetensors. Layers are called as in the flax network, joined by slashes.
"""

import dataclasses
import os

import jax
import numpy as np

from jaxsub.formats import safetensors
from jaxsub.models import _trees
from jaxsub.tasks import digits
from jaxsub.tasks._data import Data
from jaxsub.worlds import _evaluation, _files, _synthetic, _training

BASE = "base.safetensors"
TASKS = (
    {"variant": "plain"},
    *({"variant": "turned", "draw": draw} for draw in range(3)),
    *({"variant": "mirrored", "draw": draw} for draw in range(2)),
    {"variant": "inverted"},
    {"variant": "names"},
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the worlds."""

    num_tasks: int = 8  # the first of them, 8 at most
    models_per_task: int = 4
    base_steps: int = 600
    steps: int = 200
    learning_rate: float = 5e-3
    batch_size: int = 32


def make(options, seed, folder, *, model):
    """Trains base and models of a flax module `model` and writes them to `folder`."""
    names = [f.name for f in dataclasses.fields(options)]
    _synthetic.require(options, positive=names, most={"num_tasks": len(TASKS)})
    base, params, own, reached = trained(options, seed, model)
    labels = [
        {"task": digits.name(task), "seed": str(seed), "start": "0", "accuracy": f"{accuracy:.4f}"}
        for task, accuracy in zip(own, reached, strict=True)
    ]
    safetensors.write(os.path.join(folder, BASE), {name: np.asarray(x) for name, x in _trees.flat(base).items()})
    _files.write_models(folder, _trees.flat(params), labels)


def evaluation(options, model):
    """The Evaluation of a world: classifiers answer differently named questions, so every task keeps its own head."""
    own = tasks(options)
    train, held_out = zip(*map(digits.load, own), strict=True)
    return _evaluation.Evaluation(model, digits, tuple(map(digits.name, own)), train, held_out, BASE, "^head/")


def tasks(options):
    """N digits.Options, one a model."""
    return [digits.Options(**task) for task in TASKS[: options.num_tasks] for _ in range(options.models_per_task)]


def trained(options, seed, model):
    """(base parameters, parameters (N, ...), N digits.Options, held-out accuracy (N,)) of one world."""
    own = tasks(options)
    start_key, base_key, batch_key = _training.numbered(seed, "start", "base batches", "batches")
    plain, _ = digits.load()
    start = _training.start(start_key[None], plain.inputs[:1], model=model)
    batch = digits.Options(batch_size=options.batch_size)
    alike = {"model": model, "task": digits, "options": batch}
    axes, rate = Data(0, 0, 0, 0), np.float32(options.learning_rate)
    once = jax.tree.map(lambda x: np.asarray(x)[None], plain)
    base = _training.train(start, {}, once, base_key[None], rate, axes=axes, steps=options.base_steps, **alike)
    data, held_out = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *splits) for splits in zip(*map(digits.load, own), strict=True)
    )
    params = jax.tree.map(lambda p: p.repeat(len(own), axis=0), base)
    keys = jax.random.split(batch_key, len(own))
    params = _training.train(params, {}, data, keys, rate, axes=axes, steps=options.steps, **alike)
    answers = _training.outputs(params, {}, held_out.inputs, model=model, axis=0)
    reached = _training.score(digits, answers, held_out.targets, held_out.rows, held_out.num_rows)
    base, params = jax.device_get((jax.tree.map(lambda p: p[0], base), params))
    return base, params, own, reached
