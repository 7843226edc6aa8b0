"""AdaMerging: task arithmetic whose coefficients are learned, one a model and layer, on a loss of yours.

    w_l = w_0,l + sum_n c_ln (w_n,l - w_0,l);   c minimises the loss, by Adam

Published: coefficients start at 0.3 and are kept in 0 .. 1; the loss is the entropy of the merged model's predictions
on unlabelled inputs of the test set, summed over the tasks, which makes the result transductive. Give your own with
`--loss=module:function`, function(weights) -> number, or function(weights, key), traceable by JAX; weights is {layer:
array}, of low-rank updates (a, b) with the update b @ a. `per=model` learns one coefficient a model for all layers. All
models are in memory at once: N + 3 times a model.

Fails where the loss has an easier way out: entropy is smallest for a model that is sure of one answer.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.merges import _descent

REFERENCE = "Yang et al. 2024, AdaMerging (arXiv 2310.02575), equations 3 and 4"
NEEDS_UPDATES = True
NEEDS_LOSS = True


@dataclasses.dataclass(frozen=True)
class Options:
    """What is learned, and how."""

    per: str = "layer"  # layer: a coefficient for every model and layer; model: one for all layers
    start: float = 0.3  # of all coefficients
    steps: int = 500  # of Adam
    rate: float = 1e-3  # of Adam
    clamp: bool = True  # coefficients are kept in 0 .. 1


def merge_models(whole, loss, options, key):
    """{layer: result} and {"coefficients", "losses"}; see `_whole.Whole`."""
    errors.require_known("per", options.per, ("layer", "model"))
    shape = (len(whole.layers) if options.per == "layer" else 1, whole.num_models)

    def coefficients(c):
        c = jnp.clip(c, 0, 1) if options.clamp else c
        return jnp.broadcast_to(c, (len(whole.layers), whole.num_models))

    def build(c, draw):
        del draw
        return whole.weights(
            {name: whole.combined(name, row) for name, row in zip(whole.layers, coefficients(c), strict=True)}
        )

    start = jnp.full(shape, options.start, jnp.float32)
    alike = {"programs": whole.programs, "name": (__name__, dataclasses.replace(options, start=0.0))}
    found, losses = _descent.minimise(build, start, loss, steps=options.steps, rate=options.rate, key=key, **alike)
    c = np.asarray(coefficients(found), np.float64)
    results = {name: whole.layers[name].combination(row) for name, row in zip(whole.layers, c, strict=True)}
    return results, {"coefficients": dict(zip(whole.layers, c.tolist(), strict=True)), "losses": losses.tolist()}
