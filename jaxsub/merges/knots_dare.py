"""KnOTS-DARE-TIES: updates are aligned by one singular value decomposition of all, then merged by DARE and TIES.

As `knots_ties`, with the rows R_n of the common basis merged by `dare_ties`: dropped at random, signs elected. Layers
that are no matrices are merged by `dare_ties` as they are. Scaling is tuned in the paper; masks hang on `--seed`.

Fails as `knots_ties` and `dare_linear` do.
"""

import dataclasses

from jaxsub import errors
from jaxsub.merges import _drop, _knots, _signs

REFERENCE = "Stoica et al. 2024 (arXiv 2410.19735), KnOTS-DARE-TIES"
NEEDS_UPDATES = True
READS = 2
held = _knots.held


@dataclasses.dataclass(frozen=True)
class Options:
    """As in `dare_ties`."""

    density: float = 0.5  # chance of an entry to stay, in the common basis
    scaling: float = 0.6  # of the merged update
    function: str = "mean"  # mean or sum of the models that agree


def merge(rows, options, key):
    """The DARE-TIES merge of the rotated updates."""
    errors.require_known("function", options.function, _signs.FUNCTIONS)

    def inner(turned):
        return _drop.ties(turned, key, options.density, options.scaling, options.function)

    return _knots.merge(rows, inner) if rows.is_matrix else inner(rows)
