"""The mean of the coefficients in the updates' subspace, at the mean norm that the models' coefficients have.

    C = mean_n C_n;   w_0 + scaling * U_1 (C * mean_n |C_n| / |C|) U_2.T          (E35)

A mean of updates that point apart is shorter than each; this gives back its length, not its direction. Weights, made to
sum to 1, are those of both means. Layers that are no matrices take scaling times the mean.

Fails where coefficients cancel out: what is left of their mean is noise, and is blown up (its factor is 1 where |C| is
under 1e-6 of the norms).
"""

import dataclasses

import numpy as np

from jaxsub.merges import _subspace, _weights

REFERENCE = "Family of Kaushik et al. 2025 (arXiv 2512.05117), which publishes no formula: E35"
NEEDS_UPDATES = True
READS = 3
held = _subspace.held
CANCELLED = 1e-6


@dataclasses.dataclass(frozen=True)
class Options:
    """The subspace, and how much is taken."""

    rank: int = 0  # directions a side; 0: as many as `energy` asks for
    energy: float = 0.9  # share of the updates' energy that each side holds
    scaling: float = 1.0  # of the merged update


def merge(rows, options, key):
    """The rescaled mean of the updates in their subspace; deterministic, `key` is not used."""
    del key
    shares = _weights.shares(rows)
    if not rows.is_matrix:
        return rows.combination(options.scaling * shares)
    shared = _subspace.of(rows, options.rank, options.energy)
    c = shared.cores.x.astype(np.float64)
    mean, norm = np.tensordot(shares, c, 1), float(shares @ np.linalg.norm(c.reshape(len(c), -1), axis=1))
    length = float(np.linalg.norm(mean))
    factor = norm / length if length > CANCELLED * norm else 1.0
    return shared.result(options.scaling * factor * mean)
