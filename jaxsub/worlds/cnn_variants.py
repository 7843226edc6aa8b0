"""Small residual networks with convolutions on eight variations of digits, from one pretrained base."""

import dataclasses

from jaxsub.models import cnn
from jaxsub.worlds import _variants

DESCRIPTION = "Small residual networks with convolutions on eight variations of digits, from one base."
LAYERS = ("first_1/kernel", "second_1/kernel", "second_2/kernel")
TRUTH = {"verdict": "shared", "flags": ["one_lineage"], "layers": list(LAYERS)}


@dataclasses.dataclass(frozen=True)
class Options(_variants.Options):
    """Options of the world."""

    learning_rate: float = 1e-2


def make(options, seed, folder):
    """Writes the world to `folder`; see `_variants.make`."""
    _variants.make(options, seed, folder, model=cnn.CNN())


def evaluation(options, seed):
    """How its models are scored; see `_evaluation`."""
    del seed
    return _variants.evaluation(options, cnn.CNN())
