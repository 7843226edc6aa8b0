"""A and B of low-rank updates averaged apart, for comparison only: (sum_n a_n A_n, sum_n a_n s_n B_n).

What some tools do (`linear` of PEFT's `add_weighted_adapter` weighs each factor by the root of its weight, as is done
here). The product of averages is not the average of products: cross terms B_m A_n come in, and the result changes with
factors B R, R^-1 A that give the same updates; N copies of one adapter give N times its update. All adapters must have
one rank. Weights are made to sum to 1.

Fails always, unless all adapters share A or share B. `mean` merges the updates themselves.
"""

import dataclasses

import numpy as np

from jaxsub import errors
from jaxsub.merges import _weights

REFERENCE = "Hugging Face PEFT, `add_weighted_adapter(combination_type='linear')`; see `mean` for what is meant"
NEEDS_UPDATES = False
NOTE = "lora_factors: A and B are averaged apart, which is not the average of the updates; `mean` is"


@dataclasses.dataclass(frozen=True)
class Options:
    """None."""


def merge(rows, options, key):
    """The update of averaged factors; deterministic, `key` is not used."""
    del options, key
    shares = _weights.shares(rows)
    if rows.factors() is None:
        return rows.combination(shares)
    if (shares < 0).any() or len({*rows.ranks.tolist()}) > 1:
        raise errors.ConfigError(
            f"layer {errors.quote(rows.name)}: lora_factors takes adapters of one rank and weights that are not "
            "negative; `weighted` takes all"
        )
    roots = np.sqrt(shares)
    a, b = rows.unscaled
    scales = roots * np.sqrt(np.abs(rows.scales))
    signs = np.sign(rows.scales)
    return rows.of_factors(np.tensordot(scales, a, 1), np.tensordot(scales * signs, b, 1))
