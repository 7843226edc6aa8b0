"""Iso-C within the subspace that the updates share: the sum of coefficients, its singular values made equal.

    sum_n C_n = P S Q.T;   w_0 + scaling * mean(s) (U_1 P) (U_2 Q).T          (E36)

At full rank it is `iso_c`. Directions that are rounding are left out. Layers that are no matrices take scaling times
the mean of the updates. Fails as `iso_c`, but for directions outside of the subspace.
"""

import dataclasses

from jaxsub.merges import _matrices, _subspace

REFERENCE = "Marczak et al. 2025 (arXiv 2502.04959) in the subspace of Kaushik et al. 2025 (arXiv 2512.05117): E36"
NEEDS_UPDATES = True
READS = 3
held = _subspace.held


@dataclasses.dataclass(frozen=True)
class Options:
    """The subspace, and how much is taken."""

    rank: int = 0  # directions a side; 0: as many as `energy` asks for
    energy: float = 0.9  # share of the updates' energy that each side holds
    scaling: float = 1.0  # of the merged update


def merge(rows, options, key):
    """The isotropic sum of the updates in their subspace; deterministic, `key` is not used."""
    del key
    if not rows.is_matrix:
        return _matrices.fallback(rows, options.scaling)
    shared = _subspace.of(rows, options.rank, options.energy)
    total = shared.cores.x.sum(axis=0)
    shared = dataclasses.replace(shared, cores=None)
    u, s, v = _matrices.svd(total)
    level = options.scaling * s.mean() if s.size else 0.0
    return shared.result(level * u @ v.T)
