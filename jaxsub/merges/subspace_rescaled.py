"""The mean of the coefficients in the updates' subspace, at the mean norm that the models' coefficients have.

    C = mean_n C_n;   w_0 + scaling * U_1 (C * mean_n |C_n| / |C|) U_2.T          (E35)

A mean of updates that point apart is shorter than each; this gives back its length, not its direction. Weights, made to
sum to 1, are those of both means. Layers that are no matrices take scaling times the mean.

Fails where coefficients cancel out: what is left of their mean is noise, and is blown up (its factor is 1 where |C| is
under 1e-6 of the norms).
"""

import dataclasses
import math

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
    norm = float(shares @ [_length(c) for c in shared.cores.x])
    mean = shared.cores.combination(shares).array(shared.cores.shape, out=shared.cores.x[0])  # made in order
    length = _length(mean)
    factor = norm / length if length > CANCELLED * norm else 1.0
    mean *= options.scaling * factor
    return shared.result(mean)


def _length(c):
    """Norm of a matrix, summed in float64 a row at a time."""
    return math.sqrt(sum(float(row @ row) for row in map(np.float64, c)))
