"""Exact principal components of the models (rows), through their Gram matrix; of float64 models through their SVD."""

import dataclasses

from jaxsub.decompositions import _fit

BY_ROWS = True  # components of the models: their features may be shared by devices
REFERENCE = "Sirovich 1987, method of snapshots (E17)"


@dataclasses.dataclass(frozen=True)
class Options:
    """How many components."""

    rank: int = 0  # 0: as many as `energy` asks for
    energy: float = 0.9  # share of the centred energy


def fit(stack, options, key):
    """LinearSubspace of a DenseStack; deterministic, `key` is not used."""
    del key
    return _fit.fit_rows("gram", REFERENCE, stack, rank=options.rank, energy=options.energy)
