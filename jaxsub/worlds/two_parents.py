"""Two parents and independent updates: what is shared is descent, and nothing within a lineage."""

import dataclasses

from jaxsub.worlds import _synthetic

DESCRIPTION = "Two lineages, each one parent plus independent updates."
TRUTH = {"verdict": "lineage", "flags": [], "layers": list(_synthetic.LAYERS), "lineages": [60, 40]}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world."""

    first: int = 60  # models of the first parent
    second: int = 40
    update: float = 0.5  # size of an update relative to a parent


def make(options, seed, folder):
    """Writes the world to `folder`, models in shuffled order."""
    _synthetic.require(options, positive=("first", "second", "update"))
    order = _synthetic.order(seed, options.first + options.second)
    labels = [{"task": f"random {i}", "seed": str(seed), "start": str(int(i >= options.first))} for i in order]
    _synthetic.write(folder, lambda layer: rows(options, seed, layer)[order], labels)


def rows(options, seed, layer):
    """(N, D) the models' rows before scaling and shuffling: the first parent's models first."""
    sizes = [options.first, options.second]
    updates = _synthetic.normal(seed, layer, "noise", sum(sizes))
    return _synthetic.parents(seed, layer, sizes) + options.update * updates
