"""DARE before TIES: updates with most entries dropped at random, then signs elected and the models merged that agree.

    x_n = (m_n o (w_n - w_0)) / density;   s = sign(sum_n a_n x_n)
    scaling * sum over models with that sign of a_n x_n

Nothing is trimmed by magnitude beside. Masks as in `dare_linear`; `function=mean` divides by the weights that agree.
Weights a_n are 1 unless given. Fails as `dare_linear` does.
"""

import dataclasses

from jaxsub import errors
from jaxsub.merges import _drop, _signs

REFERENCE = "Yu et al. 2024 (arXiv 2311.03099) with Yadav et al. 2023 (arXiv 2306.01708); `dare_ties` of mergekit"
NEEDS_UPDATES = True
IS_ENTRYWISE = True
BLOCKS = 10  # random bits, numbers and masks of all models


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is kept, and how it is added up."""

    density: float = 0.5  # chance of an entry to stay
    scaling: float = 1.0  # of the merged update
    function: str = "mean"  # mean or sum of the models that agree


def merge(rows, options, key):
    """The TIES merge of the updates with dropped entries."""
    errors.require_known("function", options.function, _signs.FUNCTIONS)
    return _drop.ties(rows, key, options.density, options.scaling, options.function)
