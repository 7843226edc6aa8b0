"""Coordinate shuffle: in every coordinate the models' values are permuted among the models, independently of other
coordinates. Keeps every coordinate's mean and variance, so also the mean model and the total variance; the models'
norms even out.

The deviations from the mean form, over coordinates, a sum of independent dyads of unequal weight v_d. It is drawn as a
Wishart matrix with (sum v)^2 / sum v^2 degrees of freedom, projected to zero-sum and scaled to the exact total: mean
and variance of every off-diagonal entry agree to O(1 / N). Inner products between the mean and the deviations, which
sum to zero over models and vanish on centring, are left out. The draw is too even where a single model holds most of a
coordinate's variance (a few outlying entries): the diagonal and the largest eigenvalue then vary more than drawn. It is
too concentrated at the edge where a handful of coordinates hold most of sum v^2: these give a few large eigenvalues
each of its own, not one Wishart bulk.
"""

import dataclasses

import numpy as np

from jaxsub import heldout
from jaxsub.nulls import _draw

REFERENCE = "Satterthwaite 1946 (effective degrees of freedom); Buja, Eyuboglu 1992 (permuted parallel analysis)"


@dataclasses.dataclass(frozen=True)
class Options:
    draws: int = 20  # S


def applies(observed):
    """Why the null cannot be drawn for this layer, or None."""
    if observed.variance_total is None or observed.variance_squares is None or observed.mean_energy_total is None:
        return "the coordinates' variances over the models are not known"
    return None if len(observed.norms) > 1 else "a single model cannot be shuffled"


def sample(observed, options, rng):
    """Gram matrices of models shuffled in every coordinate.

    Args:
        observed: `Observed`; mean_energy_total, variance_total, variance_squares and num_features are used.
        options: `Options`.
        rng: numpy Generator.

    Yields:
        S uncentred (N, N) float64 Gram matrices, each with the observed mean energy and total energy.
    """
    _draw.require_draws(options)
    num_models = len(observed.norms)
    root = np.sqrt(observed.variance_squares)
    dimension = (observed.variance_total / root) ** 2 if root > 0 else 1.0
    dimension = float(np.clip(dimension, 1.0, observed.num_features))
    for _ in range(options.draws):
        rows = _draw.bartlett(rng, num_models, dimension)
        gram = heldout.centre(rows @ rows.T)
        trace = np.trace(gram)
        yield gram * (num_models * observed.variance_total / trace if trace > 0 else 0.0) + observed.mean_energy_total
