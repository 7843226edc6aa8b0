"""Coordinate shuffle: in every coordinate the models' values are permuted among the models.

Independently of other coordinates. Keeps every coordinate's mean and variance, so also the mean model and the total
variance; the models' norms even out.

The deviations from the mean form, over coordinates, a sum of independent dyads of unequal weight v_d. It is drawn as a
Wishart matrix of directions with independent lengths, projected to zero-sum and scaled to the exact total. The variance
of the off-diagonal entries (hence the effective degrees of freedom, (sum v)^2 / sum v^2 for Gaussian values) and of the
diagonal are exact to O(1 / N) when the fourth moment of the deviations is known; without it the values of a coordinate
are taken as Gaussian over models. Inner products between the mean and the deviations, which sum to zero over models and
vanish on centring, are left out.

Where it breaks: one Wishart bulk stands for coordinates of every weight. Variances spread hundredfold move shares of
energy and held-out errors by less than .01 (24 models, 300 features); where a handful of coordinates hold most of
sum v^2, the rank of the draw is too low and the figures mean little. Without the fourth moment, one giant model makes
the null explain far too much (LOO(16) .83 instead of .99); with it, .98.
"""

import dataclasses

import numpy as np

from jaxsub import spectrum
from jaxsub.nulls import _draw

REFERENCE = "Satterthwaite 1946 (effective degrees of freedom); Buja, Eyuboglu 1992 (permuted parallel analysis)"

MOST_DEGREES = 1e12  # where two models' deviations never overlap, their directions are drawn as orthogonal


@dataclasses.dataclass(frozen=True)
class Options:
    """How many draws, and how they are made."""

    draws: int = 20  # S


def applies(observed):
    """Why the null cannot be drawn for this layer, or None."""
    if observed.variance_total is None or observed.variance_squares is None or observed.mean_energy_total is None:
        return "the coordinates' variances over the models are not known"
    return None if len(observed.norms) > 1 else "a single model cannot be shuffled"


def sample(observed, options, rng):
    """Gram matrices of models shuffled in every coordinate.

    Args:
        observed: `Observed`; mean_energy_total, variance_total, variance_squares, num_features are used, and
            deviation_fourths where known.
        options: `Options`.
        rng: numpy Generator.

    Yields:
        S uncentred (N, N) float64 Gram matrices, each with the observed mean energy and total energy.
    """
    _draw.require_draws(options)
    num_models = len(observed.norms)
    dimension, spread = _moments(observed)
    for _ in range(options.draws):
        energy = rng.gamma(1.0 / spread, spread, num_models) if spread > 0 else np.ones(num_models)
        rows = _draw.unit_rows(_draw.bartlett(rng, num_models, dimension)) * np.sqrt(energy)[:, None]
        gram = spectrum.centred(rows @ rows.T)
        trace = np.trace(gram)
        yield gram * (num_models * observed.variance_total / trace if trace > 0 else 0.0) + observed.mean_energy_total


def _moments(observed):
    """Degrees of freedom that give the off-diagonal entries' variance, and the relative variance of the diagonal."""
    num_models, total, squares = len(observed.norms), observed.variance_total, observed.variance_squares
    if not squares > 0:
        return 1.0, 0.0
    fourths = observed.deviation_fourths
    if fourths is None:  # of Gaussian values with zero sum
        fourths = 3.0 * num_models * (num_models - 1) / (num_models + 1) * squares
    pairs = (num_models**2 * squares - fourths) / (num_models * (num_models - 1.0))  # sum_d E (e_id e_jd)^2, i != j
    off_diagonal = pairs - squares / (num_models - 1.0) ** 2
    wishart = total**2 * (1.0 + 1.0 / (num_models - 1.0) ** 2)  # the same times the degrees of freedom
    most = observed.num_features if observed.num_features < num_models else MOST_DEGREES
    dimension = wishart / max(off_diagonal, wishart / most)
    return max(dimension, 1.0), max(fourths / num_models - squares, 0.0) / total**2
