"""All weights of a network, or those of some layers: the baselines `full training` and `last layer only`."""

import dataclasses
import re

from jaxsub import errors

REFERENCE = ""
NEEDS_SPACES = False


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    layers: str = ""  # regular expression on layer names, such as ^(head|output)/; empty: all


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: its weights}."""
    del key, spaces
    found = {name: w for name, w in start.items() if re.search(options.layers, name)}
    if not found:
        raise errors.ConfigError(f"layers={errors.quote(options.layers)!r}: no layer of the network matches")
    return found, {"start": {name: w for name, w in start.items() if name not in found}}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    del options
    return {**frozen["start"], **trainable}
