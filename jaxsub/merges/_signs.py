"""Trimming by magnitude, electing a sign for every entry, and merging the models that have it: the parts of TIES."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.merges import _columns, _select, _weights

FUNCTIONS = ("mean", "sum")


def require_share(name, value):
    """Raises ConfigError for a share that does not lie in (0, 1]."""
    if not 0 < value <= 1:
        raise errors.ConfigError(f"{name}={value}: a share in (0, 1]")


def band(rows, density, gamma=0.0):
    """(low, high), each (N,): magnitudes between which the share `density` of each row's entries lies.

    Left out are the largest, int(gamma D) of them, and the smallest, as many as that takes; if fewer must go than
    gamma says, the largest stay.
    """
    size = rows.size
    if density >= 1:
        return np.zeros(rows.num_models, rows.dtype), np.full(rows.num_models, np.inf, rows.dtype)
    kept = max(1, int(density * size))
    below = max(0, size - kept - int(gamma * size))
    low, high = _select.magnitudes(rows, (below, below + kept - 1)).T
    if not gamma:
        high = np.full(rows.num_models, np.inf)
    return low.astype(rows.dtype), high.astype(rows.dtype)


def within(x, low, high):
    """x (N, W) where its magnitude lies in the band, else 0."""
    size = jnp.abs(x)
    return jnp.where((size >= low[:, None]) & (size <= high[:, None]), x, 0)


def elected(x, weights, *, function):
    """(W,) x_n a_n summed over the models whose sign is that of the sum; over the sum of their a_n for "mean".

    Entries of 0 take no part. A sum of exactly 0 elects the positive ones.
    """

    def step(sums, row, weight):
        v = weight * row
        above, below, share_above, share_below = sums
        shares = share_above + jnp.where(v > 0, weight, 0), share_below + jnp.where(v < 0, weight, 0)
        return above + jnp.maximum(v, 0), below + jnp.minimum(v, 0), *shares

    zeros = jnp.zeros_like(x[0])
    above, below, share_above, share_below = _columns.fold(step, (zeros,) * 4, x, weights)
    is_positive = above + below >= 0
    total = jnp.where(is_positive, above, below)
    if function == "sum":
        return total
    share = jnp.where(is_positive, share_above, share_below)
    return total / jnp.where(share == 0, 1, share)


@jax.jit
def _trimmed_mean(x, start, low, high, weights, scaling):
    del start
    return scaling * elected(within(x, low, high), weights, function="mean")


@jax.jit
def _trimmed_sum(x, start, low, high, weights, scaling):
    del start
    return scaling * elected(within(x, low, high), weights, function="sum")


def ties(rows, density, scaling, function, gamma=0.0):
    """The TIES merge of rows, each trimmed to a band of magnitudes; see the plug-in `ties`."""
    require_share("density", density)
    errors.require_known("function", function, FUNCTIONS)
    weights = _weights.given(rows, 1.0).astype(rows.dtype)
    kernel = _trimmed_mean if function == "mean" else _trimmed_sum
    return rows.map(kernel, *band(rows, density, gamma), weights, rows.dtype.type(scaling))


@jax.jit
def _sum(x, start, low, high, weights):
    del start
    return _columns.weighted_sum(within(x, low, high), weights)


def pruned(rows, density, scaling, gamma=0.0):
    """scaling * sum_n a_n x_n of rows trimmed to a band of magnitudes."""
    require_share("density", density)
    weights = (scaling * _weights.given(rows, 1.0)).astype(rows.dtype)
    return rows.map(_sum, *band(rows, density, gamma), weights)
