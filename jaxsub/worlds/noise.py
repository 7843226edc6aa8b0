"""Independent numbers: nothing is shared."""

import dataclasses

from jaxsub.worlds import _synthetic

DESCRIPTION = "Independent normal numbers; nothing is shared."
TRUTH = {"verdict": "chance", "flags": [], "layers": list(_synthetic.LAYERS)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world."""

    num_models: int = 100


def make(options, seed, folder):
    """Writes the world to `folder`."""
    _synthetic.require(options, positive=("num_models",))
    labels = [{"task": "none", "seed": str(seed)}] * options.num_models
    _synthetic.write(folder, lambda layer: _synthetic.normal(seed, layer, "noise", options.num_models), labels)
