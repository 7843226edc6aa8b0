"""Fisher merging: entry by entry, each model counts as much as its Fisher information says.

    w = sum_n a_n (F_n + floor) o w_n / sum_n a_n (F_n + floor)

F_n is the diagonal Fisher information of model n, the mean over its own data of squared gradients of the log
likelihood; your evaluator computes it. `--config.statistics=FOLDER` holds a file `<model id>.safetensors` a model:
layer name -> array of the layer's shape, not negative. Of low-rank updates it is that of the whole weight. Layers
without it take the mean. Weights a_n are 1 unless given; the norm of each model's Fisher information, by which some
implementations divide, can be put into them. Published default of the floor: 1e-6.

Fails where Fisher information is far from the curvature: few data, or a model that has not converged.
"""

import dataclasses

import jax

from jaxsub import errors
from jaxsub.merges import _columns, _weights

REFERENCE = "Matena and Raffel 2022, merging models with Fisher-weighted averaging (arXiv 2111.09832), equation 5"
NEEDS_UPDATES = False
IS_ENTRYWISE = True
TAKES_STATISTICS = "of the layer's shape"


@dataclasses.dataclass(frozen=True)
class Options:
    """What keeps the quotient defined."""

    floor: float = 1e-6  # added to all Fisher information


@jax.jit
def _merged(x, fisher, start, weights, floor):
    del start
    wide = fisher.astype(x.dtype) + floor
    return _columns.weighted_sum(wide * x, weights) / _columns.weighted_sum(wide, weights)


def merge(rows, options, key):
    """The weighted rows; deterministic, `key` is not used."""
    del key
    if rows.statistics is None:
        return rows.combination(_weights.shares(rows))
    if rows.statistics.shape != rows.shape:
        raise errors.ConfigError(
            f"layer {errors.quote(rows.name)}: its statistics have shape {rows.statistics.shape}, not {rows.shape}"
        )
    if not options.floor > 0:
        raise errors.ConfigError(f"floor={options.floor}: must be above 0")
    weights = _weights.given(rows, 1.0).astype(rows.dtype)
    return rows.map_beside(_merged, weights, rows.dtype.type(options.floor))
