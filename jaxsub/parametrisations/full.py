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
    names = chosen(start, options.layers)
    found = {name: w for name, w in start.items() if name in names}
    return found, {"start": {name: w for name, w in start.items() if name not in found}}


def chosen(layers, pattern):
    """Names of the layers that a regular expression is found in.

    Raises:
        ConfigError: there are none, or it is no regular expression.
    """
    what = f"layers={errors.quote(pattern)!r}"
    try:
        found = {name for name in layers if re.search(pattern, name)}
    except re.error as error:
        raise errors.ConfigError(f"{what}: no regular expression: {error}") from error
    if not found:
        last = ", ".join(map(errors.quote, [*layers][-4:]))
        raise errors.ConfigError(f"{what}: no layer of the network matches; it ends with {last}")
    return found


def params(trainable, frozen, options):
    """See `parametrisations`."""
    del options
    return {**frozen["start"], **trainable}
