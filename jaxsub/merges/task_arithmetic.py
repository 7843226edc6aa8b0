"""Task arithmetic: w_0 + scaling * sum_n a_n (w_n - w_0), the base and the sum of all updates.

`scaling` is lambda of the paper, tuned there on validation data between 0 and 1; 0.3 is what its authors and later
benchmarks take for eight tasks, and 1 / N makes it the mean. Weights a_n are 1 unless given.

Fails where many updates add up to more than the network takes: try a smaller scaling, or TIES.
"""

import dataclasses

from jaxsub.merges import _weights

REFERENCE = "Ilharco et al. 2023, editing models with task arithmetic (arXiv 2212.04089), section 4"
IS_LINEAR = True  # a sum of the rows
NEEDS_UPDATES = True


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of the sum of the updates is taken."""

    scaling: float = 0.3  # lambda


def merge(rows, options, key):
    """The scaled sum of the updates; deterministic, `key` is not used."""
    del key
    return rows.combination(options.scaling * _weights.given(rows, 1.0))
