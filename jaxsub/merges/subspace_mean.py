"""The mean in a centred subspace: M + U_1 (mean_n C_n) U_2.T with C_n = U_1.T (w_n - M) U_2. It is the plain mean M.

    sum_n C_n = U_1.T (sum_n (w_n - M)) U_2 = 0,   for every subspace and every rank (E33)

So this is `mean`, by name, for who looks for it: no subspace is fitted. What differs from the mean is uncentred
(`subspace_sum`), rescaled (`subspace_rescaled`), isotropic (`subspace_iso`) or not linear (`subspace_ties`).
"""

import dataclasses

import numpy as np

REFERENCE = "Kaushik et al. 2025 (arXiv 2512.05117), whose formula is not published; identity E33 of its replication"
NEEDS_UPDATES = False
NOTE = (
    "subspace_mean: any linear average of coefficients about their mean is the plain mean of the models, for every "
    "subspace and every rank (E33); this is `mean`"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """None."""


def merge(rows, options, key):
    """The mean of the rows; deterministic, `key` is not used."""
    del options, key
    return rows.combination(np.full(rows.num_models, 1 / rows.num_models))
