"""Entry permutation: every model's entries permuted independently, which keeps each model's values and so its mean
entry and norm, and destroys what is where.

A permuted model is its mean entry times the all-ones vector plus a deviation of fixed length. The direction of the
deviation is taken as uniform among the directions orthogonal to all-ones: means and variances of all inner products
are exact, the rest holds when no few entries carry a model's energy. With entries so heavy-tailed that one of D entries
holds most of the energy, permuted models almost never meet: their inner products are mostly near 0 and rarely near the
product of the norms, where this draw gives Gaussian ones of the same variance.
"""

import dataclasses

import numpy as np

from jaxsub.nulls import _draw

REFERENCE = "Pitman 1937 (permutation moments); deviations by Muirhead 1982, section 3.2"


@dataclasses.dataclass(frozen=True)
class Options:
    draws: int = 20  # S


def applies(observed):
    """Why the null cannot be drawn for this layer, or None."""
    if observed.entry_means is None:
        return "the models' mean entries are not known"
    return None if observed.num_features > 1 else "a single entry cannot be permuted"


def sample(observed, options, rng):
    """Gram matrices of models with permuted entries.

    Args:
        observed: `Observed`; norms, entry_means and num_features are used.
        options: `Options`.
        rng: numpy Generator.

    Yields:
        S uncentred (N, N) float64 Gram matrices.
    """
    _draw.require_draws(options)
    norms = np.asarray(observed.norms, np.float64)
    constant = np.asarray(observed.entry_means, np.float64) * np.sqrt(observed.num_features)
    deviation = np.sqrt(np.maximum((norms - np.abs(constant)) * (norms + np.abs(constant)), 0.0))
    fixed, scale = constant[:, None] * constant, deviation[:, None] * deviation
    for _ in range(options.draws):
        yield fixed + scale * _draw.unit_gram(rng, len(norms), observed.num_features - 1)
