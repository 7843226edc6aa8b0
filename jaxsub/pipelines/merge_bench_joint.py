"""No merge but what a merge with a loss has to be measured by: the mean of the models, trained on the same loss.

    w = mean - Adam's steps on all merged weights (both factors of low-rank updates)

Methods that learn a mask or coefficients on a loss of all tasks see what multi-task training sees. Where they do not
beat as many steps of it, on the same rows, nothing of their gain is due to the merge.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxsub.merges import _descent

NAME = "joint_training"
NEEDS_LOSS = True


@dataclasses.dataclass(frozen=True)
class Options:
    """How long, and how fast."""

    rate: float = 0.01  # of Adam
    steps: int = 100  # of Adam


def merge_models(whole, loss, options, key):
    """{layer: result} and {"losses"}; see `merges._whole.Whole`."""
    shares = jnp.full(whole.num_models, 1 / whole.num_models, jnp.float32)
    start = {name: whole.combined(name, shares) for name in whole.layers}
    alike = {"programs": whole.programs, "name": NAME}
    found, losses = _descent.minimise(
        lambda updates, draw: whole.weights(updates), start, loss,
        steps=options.steps, rate=options.rate, key=key, **alike,
    )  # fmt: skip
    results = {}
    for name, update in found.items():
        is_factored = isinstance(update, tuple)
        own = whole.layers[name]
        results[name] = own.of_factors(*map(np.asarray, update)) if is_factored else own.result(np.asarray(update))
    return results, {"losses": losses.tolist()}
