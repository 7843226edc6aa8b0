"""Two parents whose children move in one common subspace."""

import dataclasses

from jaxsub.worlds import _synthetic

DESCRIPTION = "Two lineages, each one parent plus updates in a subspace that both share."
TRUTH = {"verdict": "lineage+shared", "flags": [], "layers": list(_synthetic.LAYERS), "lineages": [60, 40]}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world."""

    first: int = 60  # models of the first parent
    second: int = 40
    update: float = 0.5  # size of an update relative to a parent
    rank: int = 8
    signal: float = 0.5  # share of an update in the common subspace


def make(options, seed, folder):
    """Writes the world to `folder`, models in shuffled order."""
    _synthetic.require(options, positive=("first", "second", "update", "rank"), fractions=("signal",))
    order = _synthetic.order(seed, options.first + options.second)
    labels = [{"task": f"random {i}", "seed": str(seed), "start": str(int(i >= options.first))} for i in order]
    _synthetic.write(folder, lambda layer: rows(options, seed, layer)[order], labels)


def rows(options, seed, layer):
    """(N, D) the models' rows before scaling and shuffling: the first parent's models first."""
    sizes = [options.first, options.second]
    updates = _synthetic.planted(seed, layer, sum(sizes), options.rank, options.signal)
    return _synthetic.parents(seed, layer, sizes) + options.update * updates
