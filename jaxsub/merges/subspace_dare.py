"""DARE-TIES on coefficients in the subspace that updates share: w_0 + U_1 dare_ties(C_1, ..., C_N) U_2.T  (E37).

See `dare_ties`; masks hang on `--seed`. Layers that are no matrices are merged by `dare_ties` as they are.
Fails where few coefficients hold the update: dropping one is then a large loss, not noise.
"""

import dataclasses

from jaxsub import errors
from jaxsub.merges import _drop, _signs, _subspace

REFERENCE = "Yu et al. 2024 (arXiv 2311.03099) on coefficients: E37"
NEEDS_UPDATES = True
READS = 3
held = _subspace.held


@dataclasses.dataclass(frozen=True)
class Options:
    """The subspace, and as in `dare_ties`."""

    rank: int = 0  # directions a side; 0: as many as `energy` asks for
    energy: float = 0.9  # share of the updates' energy that each side holds
    density: float = 0.5  # chance of a coefficient to stay
    scaling: float = 1.0  # of the merged update
    function: str = "mean"  # mean or sum of the models that agree


def merge(rows, options, key):
    """The DARE-TIES merge of the coefficients."""
    errors.require_known("function", options.function, _signs.FUNCTIONS)
    more = options.density, options.scaling, options.function
    if not rows.is_matrix:
        return _drop.ties(rows, key, *more)
    shared = _subspace.of(rows, options.rank, options.energy)
    return shared.merged(_drop.ties(shared.cores, key, *more))
