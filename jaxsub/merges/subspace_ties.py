"""TIES on the coefficients in the subspace that the updates share: w_0 + U_1 ties(C_1, ..., C_N) U_2.T  (E37).

Entries of C_n are coordinates along directions that all updates share, largest first; see `ties` for the rest. With one
side only it would be `knots_ties`. Layers that are no matrices are merged by TIES as they are. Weights as in `ties`.

Fails where the updates share nothing, as every subspace of all.
"""

import dataclasses

from jaxsub.merges import _signs, _subspace

REFERENCE = "Yadav et al. 2023 (arXiv 2306.01708) on coefficients: E37"
NEEDS_UPDATES = True
READS = 3
held = _subspace.held


@dataclasses.dataclass(frozen=True)
class Options:
    """The subspace, and as in `ties`."""

    rank: int = 0  # directions a side; 0: as many as `energy` asks for
    energy: float = 0.9  # share of the updates' energy that each side holds
    density: float = 0.2  # share of each model's coefficients that is kept
    scaling: float = 1.0  # of the merged update
    function: str = "mean"  # mean or sum of the models that agree


def merge(rows, options, key):
    """The TIES merge of the coefficients; deterministic, `key` is not used."""
    del key
    more = options.density, options.scaling, options.function
    if not rows.is_matrix:
        return _signs.ties(rows, *more)
    shared = _subspace.of(rows, options.rank, options.energy)
    return shared.merged(_signs.ties(shared.cores, *more))
