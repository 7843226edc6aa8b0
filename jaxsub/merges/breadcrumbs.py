"""Model Breadcrumbs: task arithmetic of updates without their largest and without their smallest entries.

    w_0 + scaling * sum_n a_n mask(w_n - w_0)

Of each model's entries, layer by layer, the share `gamma` of largest magnitude is left out, for outliers, and of the
rest the share `density` of all is kept, the larger ones. Published defaults: the smallest 85 % and the largest 1 % go,
scaling 0.3. With `elect=true` signs are elected as in TIES (`breadcrumbs_ties` of mergekit). Weights a_n are 1 unless
given. Fails where what is large is what the task needs.
"""

import dataclasses

from jaxsub import errors
from jaxsub.merges import _signs

REFERENCE = "Davari and Belilovsky 2024, Model Breadcrumbs (arXiv 2312.06795), section 3.2"
NEEDS_UPDATES = True
READS, IS_ENTRYWISE = 4, True


@dataclasses.dataclass(frozen=True)
class Options:
    """What is kept, and how it is added up."""

    density: float = 0.14  # share of each model's entries that is kept
    gamma: float = 0.01  # share of the largest entries that is left out
    scaling: float = 0.3  # of the merged update
    elect: bool = False  # signs are elected, and the sum is of the models that agree


def merge(rows, options, key):
    """The sum of the masked updates; deterministic, `key` is not used."""
    del key
    if not 0 <= options.gamma < 1:
        raise errors.ConfigError(f"gamma={options.gamma}: a share in [0, 1)")
    if options.elect:
        return _signs.ties(rows, options.density, options.scaling, "sum", options.gamma)
    return _signs.pruned(rows, options.density, options.scaling, options.gamma)
