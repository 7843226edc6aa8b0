"""Concrete subspace merging: task arithmetic of updates under one mask that all share, learned on a loss of yours.

    m = sigmoid((l + log u - log(1 - u)) / T),  u uniform;   w = w_0 + sum_n c_n m o (w_n - w_0) / mean(m)

l is one logit a weight, or with `--bundle` one a coefficient, the same for all models, 0 at first; means are of layers.
Adam on l minimises the loss of the merged model; the last mask has no noise, sigmoid(l / T). `inner=task_arithmetic`
keeps c at `scaling`; `layer` and `model` also learn c as AdaMerging does, a step for every step of the mask. Published:
T 0.5, 2,000 steps at 1e-3, scaling 0.3, entropy of predictions on unlabelled test inputs as the loss, which makes the
result transductive. `--loss=` as in `adamerging`. Low-rank updates have no entries to mask: fit a bundle to them. All
models are in memory at once: N + 3 times a model, the mask and Adam's moments included.

Fails where the loss says little of the task: a mask has as many numbers as the model, and fits what it is given.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.merges import _descent

REFERENCE = "Tang et al. 2023, concrete subspace learning (arXiv 2312.06173), algorithm 1"
NEEDS_UPDATES = True
NEEDS_LOSS = True
INNER = ("task_arithmetic", "layer", "model")


@dataclasses.dataclass(frozen=True)
class Options:
    """The mask, and how it is learned."""

    temperature: float = 0.5  # T
    scaling: float = 0.3  # of the sum of the masked updates, or where their coefficients start
    inner: str = "task_arithmetic"  # task_arithmetic, layer or model: which coefficients are learned beside
    steps: int = 2000  # of Adam
    rate: float = 1e-3  # of Adam


def relaxed(logits, uniforms, temperature):
    """A binary concrete mask from logits and uniform numbers of their shape."""
    noise = jnp.log(uniforms) - jnp.log1p(-uniforms)
    return jax.nn.sigmoid((logits + noise) / temperature)


def merge_models(whole, loss, options, key):
    """{layer: result} and {"kept", "losses"}; see `_whole.Whole`.

    Raises:
        ConfigError: low-rank updates, or an option that is none.
    """
    errors.require_known("inner", options.inner, INNER)
    if not options.temperature > 0:
        raise errors.ConfigError(f"temperature={options.temperature}: must be above 0")
    for name, rows in whole.layers.items():
        if rows.factors() is not None:
            raise errors.ConfigError(
                f"layer {errors.quote(name)}: concrete masks entries, which low-rank updates do not have; fit a bundle "
                "and give --bundle="
            )
    count = len(whole.layers)

    def merged(logits, c, draw):
        found = {}
        for number, name in enumerate(whole.layers):
            if draw is None:
                mask = jax.nn.sigmoid(logits[name] / options.temperature)
            else:
                uniforms = _descent.uniforms(jax.random.fold_in(draw, number), logits[name].shape)
                mask = relaxed(logits[name], uniforms, options.temperature)
            found[name] = whole.combined(name, c[number], mask / jnp.mean(mask))
        return found

    def build(parameters, draw):
        return whole.weights(merged(parameters["logits"], coefficients(parameters), draw))

    def coefficients(parameters):
        c = parameters["coefficients"]
        c = jnp.clip(c, 0, 1) if options.inner != "task_arithmetic" else jax.lax.stop_gradient(c)
        return jnp.broadcast_to(c, (count, whole.num_models))

    start = {
        "logits": {name: jnp.zeros(rows.shape, jnp.float32) for name, rows in whole.layers.items()},
        "coefficients": jnp.full((count if options.inner == "layer" else 1, whole.num_models), options.scaling),
    }
    alike = {"programs": whole.programs, "name": (__name__, dataclasses.replace(options, scaling=0.0))}
    found, losses = _descent.minimise(build, start, loss, steps=options.steps, rate=options.rate, key=key, **alike)
    last = merged(found["logits"], coefficients(found), None)
    results = {name: whole.result(name, np.asarray(value)) for name, value in last.items()}
    kept = {n: float(jnp.mean(jax.nn.sigmoid(v / options.temperature))) for n, v in found["logits"].items()}
    return results, {"kept": kept, "losses": losses.tolist()}
