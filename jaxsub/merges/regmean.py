"""RegMean: the weight whose outputs are nearest to those of every model on that model's own inputs.

    W = (sum_n W_n G_n) (sum_n G_n)^-1,   G_n = X_n.T X_n of the layer's inputs X_n (rows), W (o, i)

Off-diagonal entries of G_n are first multiplied by `shrink` (published: 0.9). Your evaluator collects the inputs:
`--config.statistics=FOLDER` holds a file `<model id>.safetensors` a model, layer name -> G_n (i, i), symmetric, a sum
or a mean over tokens. Layers without it, and those that are no matrices, take the mean. Of low-rank updates it is the
weight's own input; their result is exact and has the rank of all updates together. Weights a_n multiply G_n.

Fails where inputs span less than the layer: the sum of the G_n must be invertible, to which shrinking helps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.linalg import products
from jaxsub.merges import _weights

REFERENCE = "Jin et al. 2023, dataless knowledge fusion (arXiv 2212.09849), equation 2 and section 3.2"
NEEDS_UPDATES = False
TAKES_STATISTICS = "(i, i) of its input width"
MOST_CONDITION = 1e13  # of the sum of the G_n: beyond it nothing of a float64 solution is left


@dataclasses.dataclass(frozen=True)
class Options:
    """How the inputs' correlations are used."""

    shrink: float = 0.9  # factor of the off-diagonal entries of G_n


def held(shape, count, itemsize):
    """Bytes of a layer that are held at most."""
    del count
    o, i = shape
    return 8 * (6 * i * i + 4 * o * i) + 3 * o * i * itemsize


def merge(rows, options, key):
    """The regression mean of the rows; deterministic, `key` is not used."""
    del key
    if rows.statistics is None or not rows.is_matrix:
        return rows.combination(_weights.shares(rows))
    width = rows.shape[1]
    if rows.statistics.shape != (width, width):
        raise errors.ConfigError(
            f"layer {errors.quote(rows.name)}: its statistics have shape {rows.statistics.shape}, not {(width, width)}"
        )
    if not 0 <= options.shrink <= 1:
        raise errors.ConfigError(f"shrink={options.shrink}: a number in 0 .. 1")
    weights, total, found = _weights.given(rows, 1.0), 0.0, None
    with jax.enable_x64(True):
        for n in range(rows.num_models):
            total = total + _shrunk(rows.statistics.matrix(n), options.shrink, weights[n])
        inverse = _inverse(total, rows.name)
        for n in range(rows.num_models):
            right = products.matmul(_shrunk(rows.statistics.matrix(n), options.shrink, weights[n]), inverse)
            found = rows.times_right(n, right, found)
    return rows.summed(found)


@jax.jit
def _shrunk(g, shrink, weight):
    g = g.astype(jnp.float64) * weight
    return shrink * g + (1 - shrink) * jnp.diag(jnp.diagonal(g))


def _inverse(g, name):
    found = np.asarray(g)
    try:
        inverse = np.linalg.inv(found)
    except np.linalg.LinAlgError:
        inverse = np.full_like(found, np.nan)
    condition = np.linalg.norm(found) * np.linalg.norm(inverse)  # a bound of the condition number, of no more work
    if not condition <= MOST_CONDITION:
        raise errors.ConfigError(
            f"layer {errors.quote(name)}: the sum of the inputs' products has no inverse; take more inputs than it has "
            "columns, or a smaller shrink"
        )
    return jnp.asarray(inverse)
