"""Isotropic merging in common and task-specific subspaces.

    1. the leading k = common * min(o, i) directions of the sum of all updates (rounded so that N divides the rest)
    2. of each update without those (left side), the leading (min(o, i) - k) / N directions
    3. both sides' directions side by side, made orthonormal; all singular values replaced by their mean

    w_0 + scaling * mean(s) U V.T

Published default: common 0.8; scaling tuned on validation data, 1 to 1.6. Low-rank updates are merged in their span,
min(o, i) being the span's. Directions that are rounding are left out. Layers that are no matrices take scaling times
the mean of the updates.

Fails where many updates share few directions: 1 / N of what is left is then less than any task needs.
"""

import dataclasses

import numpy as np

from jaxsub import solvers
from jaxsub.merges import _matrices, _signs
from jaxsub.rows import matrices

REFERENCE = "Marczak et al. 2025, no task left behind (arXiv 2502.04959), Iso-CTS, algorithm 1"
NEEDS_UPDATES = True
READS = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """How the directions are shared out."""

    common: float = 0.8  # share of the directions that are of the sum
    scaling: float = 1.0  # alpha


def held(shape, count, itemsize):
    """Bytes of a layer that are held at most."""
    del count
    return _matrices.held(shape, itemsize, 3, sides=1)


def merge(rows, options, key):
    """The isotropic merge of the updates; deterministic, `key` is not used."""
    del key
    _signs.require_share("common", options.common)
    if not rows.is_matrix:
        return _matrices.fallback(rows, options.scaling)
    found = matrices.of(rows)
    size, count = min(found.shape), rows.num_models
    each = round((size - int(size * options.common)) / count)
    shared = max(size - each * count, 0)
    sides = _matrices.Sides(found.shape, shared + each * count)
    total, least = 0.0, 0.0  # of differences of these little but rounding may be left
    for w in found:
        total, least = total + w, max(least, _matrices.rounding(w))
    del w
    dtype = total.dtype
    sides.add(*_matrices.svd(total, shared, least))
    del total
    common = sides.left[:, : sides.count]
    for w in found:
        own = _without(w, common)
        del w
        sides.add(*_matrices.svd(own, each, least))
    del own
    u, s, v = sides.orthonormal(dtype)
    u *= options.scaling * s.mean() if s.size else 0.0
    return found.product(u, v.T)


def _without(w, common):
    """w (p, q) less its part in the span of the columns of `common` (p, k), made in float64, in w's dtype."""
    w = np.asarray(w)
    inside = np.empty((common.shape[1], w.shape[1]))
    for at in solvers.panels(w.shape[1], w.shape[0]):
        inside[:, at] = common.T @ w[:, at].astype(np.float64)
    rest = np.empty_like(w)
    for at in solvers.panels(*w.shape):
        rest[at] = w[at] - common[at] @ inside
    return rest
