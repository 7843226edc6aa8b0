"""Model Stock: between the base and the mean, at the place that the angle between fine-tunes says.

    w = t mean + (1 - t) w_0,   t = N cos / (1 + (N - 1) cos),   cos: mean cosine of the pairs of updates w_n - w_0

The fine-tunes are taken for points on a thin shell about an unseen centre; w is that centre's best estimate. Layer by
layer. Cosines of updates of unrelated tasks are near 0, and the result is then the base.

Fails where (N - 1) cos = -1, for opposing updates: the base is taken there.
"""

import dataclasses

import numpy as np

from jaxsub import rows as core

REFERENCE = "Jang et al. 2024, Model Stock (arXiv 2403.19522), equation 7"
NEEDS_UPDATES = True
READS = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """None."""


def merge(rows, options, key):
    """The row between base and mean; deterministic, `key` is not used."""
    del options, key
    core.require_models(rows, "model_stock", 2)
    count = rows.num_models
    return rows.combination(np.full(count, ratio(rows.gram()) / count))


def ratio(gram):
    """t from the (N, N) inner products of the updates."""
    count = len(gram)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    products = np.maximum(norms[:, None] * norms, 1e-300)
    cosine = float(np.clip(gram / products, -1.0, 1.0)[np.triu_indices(count, 1)].mean())
    below = 1.0 + (count - 1) * cosine
    return 0.0 if abs(below) < 1e-6 else count * cosine / below
