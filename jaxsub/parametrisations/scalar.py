"""Coefficients of a joint subspace, k numbers a layer: W = start + sum_j c_j V_j.

With the bundle's mean as the start c are the coefficients of the bundle: members are points of the same space.
"""

import dataclasses

import jax.numpy as jnp

from jaxsub.parametrisations import _parts, _spaces, _values

REFERENCE = "Kaushik et al. 2025, The Universal Weight Subspace Hypothesis, coefficients of the model axis"
NEEDS_SPACES = True


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 0  # components a layer; 0: all that the bundle holds
    dimension: int = 0  # numbers in all, of the components with the largest singular values; 0: `rank` a layer
    augment: int = 0  # random directions more a layer, orthogonal to the bundle's


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: (k,)} zeros."""
    bases, ranks = {}, _spaces.leading(spaces, options.dimension) if options.dimension else {}
    for name, space in spaces.items():
        if options.dimension and not ranks[name]:
            continue
        basis = _spaces.chosen(space, ranks.get(name, options.rank), name)
        if options.augment:
            rows = _spaces.augmented(basis.reshape(len(basis), -1), options.augment, _parts.key_of(key, name))
            basis = rows.reshape(-1, *basis.shape[1:])
        bases[name] = jnp.asarray(basis)
    return {name: jnp.zeros(len(basis), jnp.float32) for name, basis in bases.items()}, {"start": start, "basis": bases}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    del options
    found = dict(frozen["start"])
    for name, c in trainable.items():
        found[name] = _values.Combination(found[name], c, frozen["basis"][name])
    return found
