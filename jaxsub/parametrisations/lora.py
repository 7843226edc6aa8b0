"""LoRA on the matrices of a network: h = x W + alpha / r x A^T B^T. A baseline: it needs no bundle."""

import dataclasses

from jaxsub.parametrisations import _parts, _values

REFERENCE = "Hu et al. 2021, LoRA"
NEEDS_SPACES = False


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 4
    alpha: float = 8.0
    layers: str = ""  # regular expression on layer names; empty: every matrix called kernel


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: {"a": (r, i), "b": (o, r)}}, a as PEFT starts it, b zero."""
    del spaces
    names = _parts.kernels(start, options.layers, ndim=2)
    return {name: _parts.pair(key, name, start[name].shape, options.rank) for name in names}, {"start": start}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    found, scale = dict(frozen["start"]), options.alpha / options.rank
    for name, pair in trainable.items():
        found[name] = _values.Factored(found[name], pair["a"].T, scale * pair["b"].T)
    return found
