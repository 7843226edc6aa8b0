"""Pure functions of a spectrum: shares, ranks, effective ranks, the Marchenko-Pastur edge. NumPy, float64.

Energies are squared singular values, non-increasing; shares are of the total energy, which may be larger than
the sum of the energies given (a truncated spectrum): a rank that is not reached is None, never the cap.
"""

import math

import numpy as np

from jaxsub import precision, solvers

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
COUNTS = (1, 4, 8, 16, 32, 64)


def centred(gram):
    """Gram matrix of rows minus their mean, H G H, from the Gram matrix about any common point; (N, N)."""
    gram = np.asarray(gram, np.float64)
    if gram.size == 0:
        return gram
    rows = gram.mean(axis=1, keepdims=True)
    out = gram - rows - rows.T + gram.mean()
    return (out + out.T) / 2


def unless_equal(gram, mean_square, dtype):
    """The centred Gram matrix (N, N) itself, or zeros where all models are equal but for rounding of their mean.

    Args:
        gram: (N, N) float64, centred; one of NaN, of products that failed, is no sign of equal models.
        mean_square: squared norm of the mean model.
        dtype: of the products.
    """
    are_equal = np.trace(gram) <= precision.CONSTANT[dtype] * len(gram) * mean_square
    return np.zeros_like(gram) if are_equal else gram


def energies(gram):
    """Eigenvalues of a Gram matrix, non-increasing, rounding below zero clipped; (N,)."""
    if len(gram) == 0:
        return np.zeros(0)
    return np.maximum(solvers.eigvalsh(gram)[::-1], 0.0)


def rank_at(values, total=None, shares=SHARES):
    """Fewest components that hold each share of `total`; None where they never do.

    Args:
        values: (K,) energies, non-increasing.
        total: total energy; the sum of `values` by default.

    Returns:
        dict from the share as text ("0.9") to a count or None.
    """
    values = np.asarray(values, np.float64)
    total = float(values.sum()) if total is None else float(total)
    if not total > 0 or not len(values):
        return {_key(s): None for s in shares}
    sums = np.cumsum(values) / total
    slack = 64 * np.finfo(np.float64).eps  # so that all components reach a share of exactly 1 - 0
    found = np.searchsorted(sums, np.asarray(shares) - slack)
    return {_key(s): int(k) + 1 if k < len(sums) else None for s, k in zip(shares, found, strict=True)}


def energy_at(values, total=None, counts=COUNTS):
    """Share of `total` in the first k components, for k in `counts` up to the number of components; dict."""
    values = np.asarray(values, np.float64)
    total = float(values.sum()) if total is None else float(total)
    if not total > 0:
        return {str(k): None for k in counts if k <= len(values)}
    sums = np.cumsum(values) / total
    return {str(k): float(min(sums[k - 1], 1.0)) for k in counts if k <= len(values)}


def _key(share):
    return f"{share:g}"


def effective_ranks(values):
    """Every convention of "effective rank", each under its own name; {} for a zero spectrum.

    stable_rank: sum s^2 / s_1^2.  participation_ratio: (sum s^2)^2 / sum s^4.  erank: exp of the entropy of
    s / sum s (Roy and Vetterli 2007).  erank_energy: the same on s^2.  entropy: entropy of s^2 / sum s^2 over the
    logarithm of the number of components (WeightWatcher).
    """
    energy = np.asarray(values, np.float64)
    energy = energy[energy > 0]
    energy = energy[energy / energy.sum() > 0]  # the smallest may be no share that float64 can hold
    if not len(energy):
        return {}
    share = energy / energy.sum()
    root = np.sqrt(energy) / np.sqrt(energy).sum()
    entropy = float(-(share * np.log(share)).sum())
    return {
        "stable_rank": float(energy.sum() / energy[0]),
        "participation_ratio": float(1.0 / np.square(share).sum()),
        "erank": float(np.exp(-(root * np.log(root)).sum())),
        "erank_energy": math.exp(entropy),
        "entropy": entropy / math.log(len(energy)) if len(energy) > 1 else 0.0,
    }


def marchenko_pastur_count(values, num_models, num_features):
    """Energies above the Marchenko-Pastur edge of white noise with the spectrum's own median level.

    For n = N - 1 centred rows of D features with entry variance v, all noise energies lie below
    v (sqrt(D) + sqrt(n))**2 as both grow. v is set by the median energy, which a few components do not move. The
    largest of n noise energies exceeds the edge by a few Tracy-Widom units,
    (sqrt n + sqrt D) (1 / sqrt n + 1 / sqrt D)**(1/3); three of them are allowed.

    Fails where models differ much in norm: their noise is not white, and the count is an upper bound.
    """
    n = num_models - 1
    energy = np.asarray(values, np.float64)[: max(0, min(n, num_features))]
    if len(energy) < 3 or not energy[0] > 0:
        return 0
    small, large = min(n, num_features), max(n, num_features)
    gamma = small / large
    level = float(np.median(energy)) / (large * _mp_median(gamma))
    root = math.sqrt(small) + math.sqrt(large)
    edge = level * (root**2 + 3.0 * root * (1 / math.sqrt(small) + 1 / math.sqrt(large)) ** (1 / 3))
    return int((energy > edge).sum())


def _mp_median(gamma):
    """Median of the Marchenko-Pastur law of ratio gamma <= 1 and variance 1."""
    low, high = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2
    # x = centre + radius cos t turns the square-root ends into a smooth integrand.
    t = (np.arange(4000) + 0.5) * (math.pi / 4000)
    x = (low + high) / 2 + (high - low) / 2 * np.cos(t)
    density = np.square(np.sin(t)) / x
    mass = np.cumsum(density[::-1])
    return float(np.interp(mass[-1] / 2, mass, x[::-1]))
