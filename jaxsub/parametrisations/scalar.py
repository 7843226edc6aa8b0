"""Coefficients of a joint subspace, k numbers a layer: W = start + sum_j c_j V_j.

With the bundle's mean as the start c are the coefficients of the bundle: members are points of the same space.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxsub.parametrisations import _parts, _spaces

REFERENCE = "Kaushik et al. 2025, The Universal Weight Subspace Hypothesis, coefficients of the model axis"
NEEDS_SPACES = True


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 0  # components a layer; 0: all that the bundle holds
    augment: int = 0  # random directions more, orthogonal to the bundle's


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: (k,)} zeros."""
    bases = {}
    for number, (name, space) in enumerate(sorted(spaces.items())):
        basis = _spaces.chosen(space, options.rank, name)
        if options.augment:
            rows = _spaces.augmented(basis.reshape(len(basis), -1), options.augment, jax.random.fold_in(key, number))
            basis = rows.reshape(-1, *basis.shape[1:])
        bases[name] = jnp.asarray(basis)
    return {name: jnp.zeros(len(basis), jnp.float32) for name, basis in bases.items()}, {"start": start, "basis": bases}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    del options
    found = dict(frozen["start"])
    for name, c in trainable.items():
        found[name] = found[name] + _parts.combination(c, frozen["basis"][name])
    return found
