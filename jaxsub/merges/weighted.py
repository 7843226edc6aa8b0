"""A weighted sum of the models, sum_n a_n w_n; by default the weights are made to sum to 1.

Weights come from the user (`--config.weights=`), 1 each without. With `normalize=false` they are taken as they are: a
sum of weights other than 1 shrinks or grows the base that all models share, unless `--base` is given.
"""

import dataclasses

from jaxsub.merges import _weights

REFERENCE = "Wortsman et al. 2022 (arXiv 2203.05482); `linear` of mergekit"
IS_LINEAR = True  # a sum of the rows
NEEDS_UPDATES = False


@dataclasses.dataclass(frozen=True)
class Options:
    """Whether weights are scaled."""

    normalize: bool = True  # weights are divided by their sum


def merge(rows, options, key):
    """The weighted sum of the rows; deterministic, `key` is not used."""
    del key
    return rows.combination(_weights.shares(rows) if options.normalize else _weights.given(rows, 1.0))
