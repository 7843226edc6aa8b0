"""A low-rank update and a sparse one on random places: W = start + alpha / r A B + S.

W is formed for the product and formed again on the way back: what is kept for it is the inputs, A, B and S.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.parametrisations import _parts, _values

REFERENCE = "Han et al. 2024, SLTrain"
NEEDS_SPACES = False


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 4
    alpha: float = 8.0
    density: float = 0.03  # share of the entries that S holds
    layers: str = ""  # regular expression on layer names; empty: every matrix called kernel


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: {"a": (r, i), "b": (o, r), "values": (s,)}}.

    b and the values start at zero: training starts at the network's own weights. (From scratch, as published, the
    values are uniform in +-1 / sqrt(i); here `start` holds such weights.)
    """
    if not 0 < options.density <= 1:
        raise errors.ConfigError(f"density={options.density}: expected more than 0, at most 1")
    del spaces
    trainable, places = {}, {}
    for name in _parts.kernels(start, options.layers, ndim=2):
        size = math.prod(start[name].shape)
        order = jax.random.permutation(jax.random.fold_in(_parts.key_of(key, name), 1), size)
        places[name] = jnp.sort(order[: max(round(options.density * size), 1)]).astype(jnp.int32)
        trainable[name] = _parts.pair(key, name, start[name].shape, options.rank)
        trainable[name]["values"] = jnp.zeros(len(places[name]), jnp.float32)
    return trainable, {"start": start, "at": places}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    found = dict(frozen["start"])
    for name, parts in trainable.items():
        low_rank = (parts["a"].T, options.alpha / options.rank * parts["b"].T)
        found[name] = _values.Sparse(found[name], *low_rank, parts["values"], frozen["at"][name])
    return found
