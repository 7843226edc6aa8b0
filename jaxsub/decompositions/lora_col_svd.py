"""V3 `lora-col-svd` of the released code (NLG, Mistral): one LoRA factor of all models, columns side by side.

    A_i^T or B_i as d x r (the longer axis is d);  [F_1 ... F_N] (d, N r) minus one mean a row;  U from its SVD

The original subtracts the mean for the fit only: it projects the factor as it is and never adds the mean back, so that
its error is not the tail of the PCA. `faithful` does that; by default the mean is part of the subspace.
The original iterates svd_lowrank(q=256, niter=40), without oversampling; its limit is the exact basis found here.
"""

import dataclasses

from jaxsub.decompositions import _fit

REFERENCE = "toshi2k2/unisub, NLG get_subspaceadapter.py (V3)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Rank of the released code."""

    rank: int = 256  # at most; fewer where the factors have fewer columns or rows
    faithful: bool = False


def fit(stack, options, key):
    """TuckerSubspace with one factor, on the longer weight axis of a stack of LoRA factors; `key` is not used."""
    del key
    return _fit.fit_columns("lora-col-svd", REFERENCE, stack, rank=options.rank, faithful=options.faithful)
