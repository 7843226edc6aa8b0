"""Task arithmetic within the subspace that the updates share: w_0 + scaling * U_1 U_1.T (sum_n a_n W_n) U_2 U_2.T.

W_n = w_n - w_0 uncentred, U_1 and U_2 their leading directions of either side. Task arithmetic without what only single
updates hold (E34). Weights a_n are 1 unless given. At full rank it is `task_arithmetic`. Layers that are no matrices
take that.

Fails where the updates share nothing: each loses what lies outside of the leading directions of all.
"""

import dataclasses

from jaxsub.merges import _subspace, _weights

REFERENCE = "Family of Kaushik et al. 2025 (arXiv 2512.05117), which publishes no formula: E34"
NEEDS_UPDATES = True
READS = 3
held = _subspace.held


@dataclasses.dataclass(frozen=True)
class Options:
    """The subspace, and how much of the sum is taken."""

    rank: int = 0  # directions a side; 0: as many as `energy` asks for
    energy: float = 0.9  # share of the updates' energy that each side holds
    scaling: float = 0.3  # lambda


def merge(rows, options, key):
    """The scaled sum of the updates in their subspace; deterministic, `key` is not used."""
    del key
    weights = options.scaling * _weights.given(rows, 1.0)
    if not rows.is_matrix:
        return rows.combination(weights)
    shared = _subspace.of(rows, options.rank, options.energy)
    return shared.merged(shared.cores.combination(weights))
