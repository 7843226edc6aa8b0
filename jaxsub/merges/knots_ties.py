"""KnOTS-TIES: updates are aligned by one singular value decomposition of all, then merged by TIES.

    [W_1 ... W_N] = U S V.T side by side,  W_n = U R_n;   w_0 + U ties(R_1, ..., R_N)

In the common basis U entries of different models mean the same direction of the output, which weights of adapters do
not. Published defaults: density 0.2, mean of the models that agree, scaling 0.6 for eight ViT-B/32 adapters (tuned).
Low-rank updates are rotated by their factors; R_n has the layer's input width. Trimmed layer by layer; the authors'
script trims all layers together. Layers that are no matrices are merged by TIES as they are. Weights as in `ties`.

Fails where updates share no output directions: U is then as wide as the layer, and this is TIES in another basis.
"""

import dataclasses

from jaxsub.merges import _knots, _signs

REFERENCE = "Stoica et al. 2024, model merging with SVD to tie the KnOTS (arXiv 2410.19735), section 4"
NEEDS_UPDATES = True
READS = 2
held = _knots.held


@dataclasses.dataclass(frozen=True)
class Options:
    """As in `ties`."""

    density: float = 0.2  # share of each model's entries that is kept, in the common basis
    scaling: float = 0.6  # of the merged update
    function: str = "mean"  # mean or sum of the models that agree


def merge(rows, options, key):
    """The TIES merge of the rotated updates; deterministic, `key` is not used."""
    del key

    def inner(turned):
        return _signs.ties(turned, options.density, options.scaling, options.function)

    return _knots.merge(rows, inner) if rows.is_matrix else inner(rows)
