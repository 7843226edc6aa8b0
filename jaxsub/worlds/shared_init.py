"""Untrained adapters, half of them from one seed: the stacked A factors look shared, the updates share nothing.

242 adapters with their own A and 255 with one common A, r = 16, all entries uniform in +-1 / sqrt(d) with d = 4096.
Rows of the stacked A, centred: the first 16 components hold .016 of the energy for the 242 alone and .51 for all 497.
B is random, each adapter's own, small: it stands for training that has nothing in common.

Source: the critique of shared initialisation in collections of 500 public adapters (a common seed in half of them).
"""

import dataclasses
import math

import numpy as np

from jaxsub.worlds import _files, _synthetic

LAYER = "attention.query"
DESCRIPTION = "LoRA adapters of which half start from one A; updates share nothing but that start."
TRUTH = {"verdict": "chance", "flags": [], "layers": [LAYER], "lora_starts": [255]}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the world; `scale` below 1 shrinks width and counts alike."""

    independent: int = 242
    identical: int = 255
    rank: int = 16
    width: int = 4096  # input width d
    output: int = 256
    scale: float = 1.0


def sizes(options):
    """(independent, identical, width, output) after scaling, at least 1 each."""
    numbers = (options.independent, options.identical, options.width, options.output)
    return tuple(max(1, round(options.scale * n)) for n in numbers)


def make(options, seed, folder):
    """Writes the world to `folder`: the independent adapters first, then the others."""
    _synthetic.require(options, positive=("independent", "identical", "width", "output", "scale"))
    _synthetic.require(options, positive=("rank",))
    a, b = factors(options, seed)
    own = sizes(options)[0]
    labels = [{"seed": str(seed), "start": str(min(i, own))} for i in range(len(a))]
    _files.write_adapters(folder, {LAYER: (a, b)}, labels, alpha=2 * options.rank)


def factors(options, seed):
    """A (N, r, d) and B (N, o, r) in float32."""
    own, same, width, output = sizes(options)
    bound = 1.0 / math.sqrt(width)
    starts = _synthetic.stream(seed, "a").uniform(-bound, bound, (own + 1, options.rank, width)).astype(np.float32)
    a = starts[np.minimum(np.arange(own + same), own)]
    b = _synthetic.stream(seed, "b").standard_normal((own + same, output, options.rank)) * bound
    return a, b.astype(np.float32)
