"""Magnitude pruning: task arithmetic of updates of which only the largest entries are kept.

    w_0 + scaling * sum_n a_n trim(w_n - w_0),   trim keeps the share `density` of a model's entries, layer by layer

TIES without the election of signs: what that adds is seen beside this. Weights a_n are 1 unless given.
Fails where fewer than a fifth of the entries do not hold the update.
"""

import dataclasses

from jaxsub.merges import _signs

REFERENCE = "Yadav et al. 2023 (arXiv 2306.01708), section 3; Han et al. 2015, magnitude pruning"
NEEDS_UPDATES = True
READS, IS_ENTRYWISE = 4, True


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is kept, and how it is added up."""

    density: float = 0.2  # share of each model's entries that is kept
    scaling: float = 0.3  # of the sum of the updates


def merge(rows, options, key):
    """The sum of the pruned updates; deterministic, `key` is not used."""
    del key
    return _signs.pruned(rows, options.density, options.scaling)
