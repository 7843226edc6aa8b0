"""Coefficients of a random subspace: theta = theta_0 + P z. What a joint subspace must beat.

`rank`: orthonormal random directions, so many in each layer of the bundle, about the same start: the same numbers as
`scalar` trains. `dimension`: one z for all weights of the network, with dense, sparse or Fastfood columns of unit norm,
as intrinsic dimension is measured.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import projections
from jaxsub.parametrisations import _parts, _spaces

REFERENCE = "Li et al. 2018, Measuring the intrinsic dimension of objective landscapes"
NEEDS_SPACES = False


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 0  # directions a layer; 0 with dimension 0: as many as the bundle holds of each
    dimension: int = 0  # of one subspace of all weights; 0: one subspace a layer
    kind: str = "dense"  # columns of the one subspace: dense, sparse or fastfood


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: (k,)} zeros, or {"all": (d,)} zeros."""
    if options.dimension:
        errors.require_known("kind", options.kind, projections.KINDS)
        size = sum(math.prod(w.shape) for w in start.values())
        if options.dimension > size:
            raise errors.ConfigError(f"dimension={options.dimension}: the network has {size} weights")
        drawn = projections.draw(options.kind, key, size, options.dimension)
        return {"all": jnp.zeros(options.dimension, jnp.float32)}, {"start": start, "drawn": drawn}
    bases = {}
    for number, (name, shape) in enumerate(sorted((n, start[n].shape) for n in (spaces or start))):
        held = len(spaces[name].basis) if spaces and spaces[name].basis is not None else 0
        size = math.prod(shape)
        rank = min(options.rank or held, size)
        if not rank:
            raise errors.ConfigError("random_subspace: give rank, dimension, or a bundle of components")
        rows = _spaces.orthonormal(jax.random.fold_in(key, number), rank, size)
        bases[name] = jnp.asarray(rows).reshape(-1, *shape)
    return {name: jnp.zeros(len(b), jnp.float32) for name, b in bases.items()}, {"start": start, "basis": bases}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    found = dict(frozen["start"])
    if not options.dimension:
        for name, c in trainable.items():
            found[name] = found[name] + _parts.combination(c, frozen["basis"][name])
        return found
    size = sum(math.prod(w.shape) for w in found.values())
    moved, at = projections.apply(frozen["drawn"], trainable["all"], size), 0
    for name in sorted(found):
        count = math.prod(found[name].shape)
        found[name] = found[name] + moved[at : at + count].reshape(found[name].shape)
        at += count
    return found
