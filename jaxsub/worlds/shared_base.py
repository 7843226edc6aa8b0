"""One base, independent updates: the mean holds most of the energy and no subspace helps about it."""

import dataclasses

from jaxsub.worlds import _synthetic

DESCRIPTION = "A common base and independent updates; no subspace beside the mean."
TRUTH = {"verdict": "common_mean", "flags": ["one_lineage"], "layers": list(_synthetic.LAYERS), "lineages": [100]}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world."""

    num_models: int = 100
    update: float = 0.5  # size of an update relative to the base


def make(options, seed, folder):
    """Writes the world to `folder`."""
    _synthetic.require(options, positive=("num_models", "update"))
    labels = [{"task": f"random {i}", "seed": str(seed), "start": "0"} for i in range(options.num_models)]
    _synthetic.write(folder, lambda layer: rows(options, seed, layer), labels)


def rows(options, seed, layer):
    """(N, D) the models' rows before scaling."""
    base = _synthetic.parents(seed, layer, [options.num_models])
    return base + options.update * _synthetic.normal(seed, layer, "noise", options.num_models)
