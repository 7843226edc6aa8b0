"""Spherical mean of any number of models: the point of the unit sphere nearest to all of them, at their mean norm.

    m = argmin over |m| = 1 of sum_n a_n arccos(m . u_n)^2,   u_n = w_n / |w_n|;   result: (sum_n a_n |w_n|) m

Found by the gradient iteration of the Karcher mean, m <- exp_m(sum_n a_n log_m(u_n)), in the span of the models: only
their N x N inner products are needed. Weights a_n sum to 1, equal unless given. Two models: the middle of `slerp`,
but at the mean norm. Zero models take no part in the direction.

Fails where models are spread over more than a half-sphere: the mean is not unique there, and refused where directions
cancel out.
"""

import dataclasses

import numpy as np

from jaxsub import errors
from jaxsub.merges import _weights

REFERENCE = "Karcher 1977; Afsari, Tron and Vidal 2013, convergence; `karcher` of mergekit"
NEEDS_UPDATES = False
READS = 2
TOLERANCE = 1e-12  # of a step on the unit sphere


@dataclasses.dataclass(frozen=True)
class Options:
    """When to stop."""

    steps: int = 1000  # most iterations; a few are enough for models that are not far apart


def merge(rows, options, key):
    """The spherical mean of the rows; deterministic, `key` is not used."""
    del key
    if options.steps < 0:
        raise errors.ConfigError(f"steps={options.steps}: 0 or more")
    gram, weights = rows.gram(), _weights.shares(rows)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    used = norms > 0
    if not used.any():
        return rows.combination(np.zeros(rows.num_models))
    scale, inverse = float(weights @ norms), np.divide(1.0, norms, out=np.zeros_like(norms), where=used)
    cosines = gram * inverse[:, None] * inverse
    shares = np.where(used, weights, 0.0)
    if not shares.sum() > 0:
        raise errors.ConfigError(f"layer {errors.quote(rows.name)}: weights of the models that are not zero sum to 0")
    mean = karcher(cosines, shares / shares.sum(), options.steps)
    if mean is None:
        raise errors.ConfigError(
            f"layer {errors.quote(rows.name)}: the models' directions cancel out, there is no spherical mean; take "
            "other weights or another method"
        )
    return rows.combination(scale * mean * inverse)


def karcher(cosines, weights, steps):
    """(N,) coefficients of the unit mean in unit rows with these inner products; None where they cancel out."""

    def length(c):
        return np.sqrt(max(float(c @ cosines @ c), 0.0))

    start = length(weights)
    if start < 1e-7:
        return None
    mean = weights / start
    for _ in range(steps):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        pull = weights * np.divide(angles, np.sin(angles), out=np.ones_like(angles), where=np.sin(angles) > 1e-12)
        tangent = pull - float(pull @ dots) * mean
        step = length(tangent)
        if step < TOLERANCE:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean = mean / length(mean)
    return mean
