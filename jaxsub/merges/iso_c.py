"""Isotropic merging in the common subspace: the sum of all updates, its singular values replaced by their mean.

    sum_n (w_n - w_0) = U S V.T;   w_0 + scaling * mean(s) U V.T

Directions that few tasks use get as much as those that all use. The mean is over singular values that are more than
rounding (of matrices of full rank: all). Low-rank updates are merged in their span. Layers that are no matrices take
scaling times the mean of the updates. Published scaling is tuned on validation data, around 1.

Fails where the sum's small singular values are noise: they are raised like all others.
"""

import dataclasses

from jaxsub.merges import _matrices
from jaxsub.rows import matrices

REFERENCE = "Marczak et al. 2025, no task left behind (arXiv 2502.04959), Iso-C"
NEEDS_UPDATES = True


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of the merged update is taken."""

    scaling: float = 1.0  # alpha


def held(shape, count, itemsize):
    """Bytes of a layer that are held at most."""
    del count
    return _matrices.held(shape, itemsize, 2)


def merge(rows, options, key):
    """The isotropic sum of the updates; deterministic, `key` is not used."""
    del key
    if not rows.is_matrix:
        return _matrices.fallback(rows, options.scaling)
    found = matrices.of(rows)
    u, s, v = _matrices.svd(sum(found))
    u *= options.scaling * s.mean() if s.size else 0.0
    return found.product(u, v.T)
