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
from jaxsub.worlds import _digits, _files, _synthetic, _training

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
            "task": "names " + "".join(str(n) for n in names[i]),
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
    train, held_out = digits.load()
    model = mlp.LoraMLP(rank=options.rank, scale=options.alpha / options.rank)
    start_key, batch_key = _training.numbered(seed, "adapters", "adapter batches")
    starts = jax.random.split(start_key, options.num_models)
    params = _training.start(starts[:1] if options.shared_start else starts, model=model)
    if options.shared_start:
        params = jax.tree.map(lambda p: p.repeat(options.num_models, axis=0), params)
    classes, names = np.ones((options.num_models, 10), bool), permutations(options.num_models, seed)
    rows, num_rows = _training.rows_of(train.labels, classes)
    params = _training.train(
        params,
        {"base": base},
        rows,
        num_rows,
        names,
        jax.random.split(batch_key, options.num_models),
        train.images,
        train.labels,
        np.float32(options.learning_rate),
        model=model,
        batch=digits.Options(batch_size=options.batch_size),
        steps=options.steps,
    )
    answers = _training.logits(params, {"base": base}, held_out.images, model=model)
    params = jax.device_get(params)
    factors = {layer: (params[layer]["lora_a"], params[layer]["lora_b"]) for layer in LAYERS}
    return base, factors, names, _training.accuracy(answers, names, classes, held_out)


def permutations(num_models, seed):
    """(N, 10) int32: the output unit that stands for each class."""
    rng = np.random.default_rng([seed, 2])
    return rng.permuted(np.tile(np.arange(digits.NUM_CLASSES, dtype=np.int32), (num_models, 1)), axis=1)
