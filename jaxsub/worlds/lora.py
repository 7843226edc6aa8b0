"""Adapters of one small digits network, each for its own task, from own A starts or a common one.

Task: the ten digits under other names, a random permutation of the output units for each adapter; all of them have the
base's answers to unlearn. The adapters are LoRA folders; the base lies beside them as base.safetensors, kernels (o, i).
"""

import dataclasses
import os

import jax
import numpy as np

from jaxsub.formats import safetensors
from jaxsub.models import mlp
from jaxsub.tasks import digits
from jaxsub.tasks._data import whole
from jaxsub.worlds import _digits, _evaluation, _files, _synthetic, _training

LAYERS = ("hidden", "output")
BASE = "base.safetensors"
DESCRIPTION = "LoRA adapters of one digits network that learn other names for the ten digits."
TRUTH = {"verdict": "shared", "flags": [], "layers": list(LAYERS)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world."""

    num_models: int = 100
    rank: int = 4
    alpha: int = 8
    shared_start: bool = False  # one A start for all adapters
    steps: int = 300
    base_steps: int = 400
    learning_rate: float = 3e-3
    batch_size: int = 64


def make(options, seed, folder):
    """Trains base and adapters and writes them to `folder`."""
    _synthetic.require(options, positive=("num_models", "alpha", "steps", "base_steps", "learning_rate", "batch_size"))
    _synthetic.require(options, positive=("rank",))
    base, factors, names, reached = trained(options, seed)
    labels = [
        {
            "task": "digits names " + "".join(str(n) for n in names[i]),
            "seed": str(seed),
            "start": "0" if options.shared_start else str(i),
            "accuracy": f"{reached[i]:.4f}",
        }
        for i in range(options.num_models)
    ]
    stored = {}
    for layer in LAYERS:
        stored[f"{layer}.weight"] = base[layer]["kernel"].T
        stored[f"{layer}.bias"] = base[layer]["bias"]
    safetensors.write(os.path.join(folder, BASE), stored)
    _files.write_adapters(folder, factors, labels, alpha=options.alpha, base_model="digits-mlp")


def trained(options, seed):
    """Base parameters by layer, factors (a (N, r, i), b (N, o, r)) by layer, names (N, 10), held-out accuracy (N,)."""
    batch = {"learning_rate": options.learning_rate, "batch_size": options.batch_size}
    alone = _digits.Options(num_models=1, steps=options.base_steps, **batch)
    base = jax.tree.map(lambda p: p[0], _digits.trained(alone, seed, same_start=True, split_task=False)[0])
    model = mlp.LoraMLP(rank=options.rank, scale=options.alpha / options.rank)
    classes, names = np.ones((options.num_models, 10), bool), permutations(options.num_models, seed)
    params, reached = _training.collection(
        options, seed, ("adapters", "adapter batches"), classes, names, {"base": base},
        same_start=options.shared_start, model=model,
    )  # fmt: skip
    factors = {layer: (params[layer]["lora_a"], params[layer]["lora_b"]) for layer in LAYERS}
    return base, factors, names, reached


def permutations(num_models, seed):
    """(N, 10) int32: the output unit that stands for each class."""
    rng = np.random.default_rng([seed, 2])
    return rng.permuted(np.tile(np.arange(digits.NUM_CLASSES, dtype=np.int32), (num_models, 1)), axis=1)


def evaluation(options, seed):
    """How its adapters are scored: tasks differ in the names of classes, so each keeps its own output adapter."""
    names = permutations(options.num_models, seed)
    train, held_out = (tuple(whole(split.inputs, own[split.targets]) for own in names) for split in digits.load())
    called = tuple("digits names " + "".join(map(str, own)) for own in names)
    return _evaluation.Evaluation(mlp.MLP(), digits, called, train, held_out, BASE, "^output$", parameters)


def parameters(weights, base):
    """Parameters of the plain network from {layer: update (o, i)} and the tensors of the base."""
    found = {}
    for layer in LAYERS:
        kernel = base[f"{layer}.weight"]
        found[f"{layer}/kernel"] = (kernel + weights[layer] if layer in weights else kernel).T
        found[f"{layer}/bias"] = base[f"{layer}.bias"]
    return found
