"""Independent numbers, and many copies of some models under other names: copies must not count as evidence."""

import dataclasses

import numpy as np

from jaxsub import errors
from jaxsub.worlds import _synthetic

DESCRIPTION = "Independent normal numbers with bit-identical copies and a near copy among them."
TRUTH = {
    "verdict": "chance",
    "flags": [],
    "layers": list(_synthetic.LAYERS),
    "lineages": [2],
    "duplicates": 60,
    "near_duplicates": 1,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world."""

    num_distinct: int = 120  # without the near copies
    num_copies: int = 60
    num_near_copies: int = 1  # each is held-out information: 2 / N of the energy is explained by a twin
    num_originals: int = 20  # models that the copies are of
    difference: float = 0.1  # size of a near copy's difference; cosine 1 / sqrt(1 + difference^2)


def make(options, seed, folder):
    """Writes the world to `folder`, models in shuffled order.

    Raises:
        ConfigError: more near copies than models that are not copied.
    """
    _synthetic.require(options, positive=("num_distinct", "num_originals"))
    _synthetic.require(options, not_negative=("num_copies", "num_near_copies", "difference"))
    if options.num_originals + options.num_near_copies > options.num_distinct:
        raise errors.ConfigError(
            f"num_distinct={options.num_distinct}: fewer than num_originals + num_near_copies "
            f"({options.num_originals} + {options.num_near_copies})"
        )
    sources = source_of(options)
    order = _synthetic.order(seed, len(sources))
    labels = [{"seed": str(seed), "start": str(i)} for i in sources[order]]
    _synthetic.write(folder, lambda layer: rows(options, seed, layer)[order], labels)


def source_of(options):
    """(N,) which distinct model each one is or comes from: the distinct ones, then copies, then near copies."""
    copies = np.arange(options.num_copies) % options.num_originals
    near = options.num_originals + np.arange(options.num_near_copies)
    return np.concatenate([np.arange(options.num_distinct), copies, near])


def rows(options, seed, layer):
    """(N, D) the models' rows before scaling and shuffling."""
    x = _synthetic.normal(seed, layer, "noise", options.num_distinct)[source_of(options)]
    if options.num_near_copies:
        difference = _synthetic.normal(seed, layer, "difference", options.num_near_copies)
        x[-options.num_near_copies :] += options.difference * difference
    return x
