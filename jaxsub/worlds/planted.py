"""A known subspace in every layer and noise around it; the coefficients of different layers are independent.

With few layers and a strong signal of low rank, some pairs of models come close by chance: the cosine of a pair has a
standard deviation of signal / sqrt(rank * layers). The defaults keep it at .03, far below that of kin.
"""

import dataclasses

from jaxsub.worlds import _synthetic

DESCRIPTION = "A known low-dimensional subspace plus noise; no common mean."
TRUTH = {"verdict": "shared", "flags": [], "layers": list(_synthetic.LAYERS)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world."""

    num_models: int = 100
    rank: int = 16
    signal: float = 0.25  # expected share of the energy in the subspace


def make(options, seed, folder):
    """Writes the world to `folder`; the subspace of a layer is `basis(seed, layer, options.rank)`."""
    _synthetic.require(options, positive=("num_models", "rank"), fractions=("signal",))
    labels = [{"task": f"random {i}", "seed": str(seed)} for i in range(options.num_models)]
    _synthetic.write(folder, lambda layer: rows(options, seed, layer), labels)


def rows(options, seed, layer):
    """(N, D) the models' rows before scaling."""
    return _synthetic.planted(seed, layer, options.num_models, options.rank, options.signal)
