"""TIES: trim each update to its largest entries, elect a sign for every entry, merge the models that have it.

    trim    keep the share `density` of each model's entries, the largest in magnitude; the others are 0
    elect   s = sign(sum_n a_n x_n)
    merge   scaling * (sum over models with that sign of a_n x_n) / (sum of their a_n)      (or without the divisor)

Published defaults: density 0.2, the mean, scaling 1 (tuned up to 1.8 with validation data). Weights a_n are 1 unless
given. Trimmed layer by layer, as mergekit does; the authors' script trims all layers of a model together.
Of low-rank updates the products' entries are trimmed, a few rows at a time, and the result is cut to rank.

Fails where fewer than a fifth of the entries do not hold the update: then `density` must be larger.
"""

import dataclasses

from jaxsub.merges import _signs

REFERENCE = "Yadav et al. 2023, TIES-Merging (arXiv 2306.01708), algorithm 1"
NEEDS_UPDATES = True
READS, IS_ENTRYWISE = 4, True


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is kept, and how it is added up."""

    density: float = 0.2  # share of each model's entries that is kept
    scaling: float = 1.0  # lambda, of the merged update
    function: str = "mean"  # mean or sum of the models that agree


def merge(rows, options, key):
    """The TIES merge of the updates; deterministic, `key` is not used."""
    del key
    return _signs.ties(rows, options.density, options.scaling, options.function)
