"""TSV-Merge: the leading singular vectors of every update, made orthonormal to those of the others.

    w_n - w_0 = U_n S_n V_n.T, the leading min(o, i) / N of each;   U = polar([U_1 ... U_N]),  V likewise
    w_0 + scaling * U diag(S_1 ... S_N) V.T

The polar factor is the nearest set of orthonormal vectors: tasks no longer stand on each other's directions. Published
scaling: 1. Directions that are rounding are left out. Low-rank updates are merged in their span, and keep all their
directions where these are fewer than min(o, i) / N of the weight. Layers that are no matrices take scaling times the
mean of the updates.

Fails where an update needs more than min(o, i) / N directions; with more models than min(o, i) none is taken.
"""

import dataclasses

from jaxsub.merges import _matrices
from jaxsub.rows import matrices

REFERENCE = "Gargiulo et al. 2025, task singular vectors (arXiv 2412.00081), algorithm 1"
NEEDS_UPDATES = True


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of the merged update is taken."""

    scaling: float = 1.0  # alpha


def held(shape, count, itemsize):
    """Bytes of a layer that are held at most."""
    del count
    return _matrices.held(shape, itemsize, 1, sides=1)


def leaves_base(shape, count):
    """Whether so many models are too many for a layer: min(o, i) / N directions of each are none."""
    return len(shape) == 2 and min(shape) < count


def merge(rows, options, key):
    """The merge of the orthonormal task vectors; deterministic, `key` is not used."""
    del key
    if not rows.is_matrix:
        return _matrices.fallback(rows, options.scaling)
    found, each = matrices.of(rows), min(rows.shape) // rows.num_models
    sides = _matrices.Sides(found.shape, each * rows.num_models)
    for w in found:
        sides.add(*_matrices.svd(w, each))
    dtype = w.dtype
    del w
    u, s, v = sides.orthonormal(dtype)
    u *= options.scaling * s
    return found.product(u, v.T)
