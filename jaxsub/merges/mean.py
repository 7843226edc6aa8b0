"""The plain mean of the models, (1 / N) sum_n w_n: model soup. Weights, if given, are made to sum to 1.

Fails where models come from different starts: their hidden units are in another order, and the mean is no model.
"""

import dataclasses

from jaxsub.merges import _weights

REFERENCE = "Wortsman et al. 2022, model soups (arXiv 2203.05482)"
IS_LINEAR = True  # a sum of the rows
NEEDS_UPDATES = False


@dataclasses.dataclass(frozen=True)
class Options:
    """None."""


def merge(rows, options, key):
    """The mean of the rows; deterministic, `key` is not used."""
    del options, key
    return rows.combination(_weights.shares(rows))
