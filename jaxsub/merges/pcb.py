"""PCB: balances the entries of updates that compete, within each model and between the models.

    beta_n = exp(N norm(|x_n|)^2) o tanh(x_n o sum_m x_m),   norm: scaled to 0 .. 1 over a model's entries
    a_n    = norm(beta_n cut from below at its largest share `ratio`)
    w_0 + scaling * sum_n a_n o x_n / sum_n a_n

|x_n| is first cut at its smallest and largest 1e-4 of entries. Published defaults: ratio 0.1, scaling 1 (tuned up to
1.8). Layer by layer; the authors' script takes all layers of a model together. Weights are not used.

Fails on layers of a few entries, where cutting at shares means little: such results are near the mean of the updates.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.merges import _columns, _select, _signs

REFERENCE = "Du et al. 2024, parameter competition balancing (arXiv 2410.02396), section 4 and the released script"
NEEDS_UPDATES = True
READS, IS_ENTRYWISE = 7, True
BLOCKS = 12  # magnitudes and their products, normalised, of all models
OUTLIERS = 1e-4  # share of the entries at each end that magnitudes are cut at


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is kept, and how it is added up."""

    ratio: float = 0.1  # share of each model's entries whose balance is not the smallest one
    scaling: float = 1.0  # lambda, of the merged update


@jax.jit
def _balance(x, start, low, high):
    """beta (N, W) and the cut updates (N, W)."""
    del start
    cut = jnp.clip(jnp.abs(x), low[:, None], high[:, None])
    room = (high - low)[:, None]
    inside = jnp.square((cut - low[:, None]) / jnp.where(room > 0, room, 1))
    total = _columns.weighted_sum(x, jnp.ones_like(low))
    return jnp.exp(x.shape[0] * inside) * jnp.tanh(x * total), jnp.sign(x) * cut


@jax.jit
def _merged(x, start, low, high, least, most, scaling):
    beta, cut = _balance(x, start, low, high)
    room = (most - least)[:, None]
    shares = (jnp.clip(beta, least[:, None], most[:, None]) - least[:, None]) / jnp.where(room > 0, room, 1)
    ones = jnp.ones_like(low)
    merged, share = _columns.weighted_sum(shares * cut, ones), _columns.weighted_sum(shares, ones)
    return scaling * merged / jnp.maximum(share, 1e-12)


def merge(rows, options, key):
    """The balanced sum of the updates; deterministic, `key` is not used."""
    del key
    _signs.require_share("ratio", options.ratio)
    size = rows.size
    if size < 2:
        return rows.combination(np.full(rows.num_models, options.scaling / rows.num_models))
    last = max(int(size * (1 - OUTLIERS) - 1), 0)
    low, high = _select.magnitudes(rows, (int(size * OUTLIERS), last)).T.astype(rows.dtype)
    if (low > high).any():
        raise errors.ConfigError("pcb: magnitudes are out of order")

    def balances():
        with jax.enable_x64(True):
            for block in rows.blocks():
                beta, _ = _balance(jax.device_put(block.x), jnp.int64(block.start), low, high)
                yield np.asarray(beta)[:, : block.count]

    ranks = min(int(size * (1 - options.ratio)), size - 1), size - 1
    least, most = _select.order_statistics(balances, rows, ranks).T.astype(rows.dtype)
    return rows.map(_merged, low, high, least, most, rows.dtype.type(options.scaling))
