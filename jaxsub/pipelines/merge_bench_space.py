"""Which options of a merge method are tried: as many candidates for every method that has something to tune.

    [label:]method option=value option=low..high option=a|b|c

One value is fixed, a range or choices are tuned. The first candidate has the published defaults, the others are a Latin
hypercube of the space: every tuned option takes evenly spread values of its range, in an order drawn for it.
"""

import dataclasses
import math
import typing
import zlib

import numpy as np

from jaxsub import config as configuration, errors, plugins
from jaxsub.pipelines import merge_bench_joint


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the bench's methods.

    Attributes:
        label: what the table calls it.
        name: of the module of `merges`.
        module: the module.
        fixed: option -> value.
        tuned: option -> (low, high) of a range, or a tuple of choices.
        text: as it was written.
    """

    label: str
    name: str
    module: typing.Any
    fixed: dict
    tuned: dict
    text: str

    def candidates(self, count, seed):
        """[Options], `count` of them, or one where nothing is tuned."""
        first = configuration.freeze(self.module.Options, self.fixed)
        if not self.tuned:
            return [first]
        rng = np.random.default_rng([seed, zlib.crc32(self.text.encode())])
        columns = {name: _spread(space, count - 1, rng) for name, space in self.tuned.items()}
        rest = [{name: column[n] for name, column in columns.items()} for n in range(count - 1)]
        return [first, *(configuration.freeze(self.module.Options, self.fixed | own) for own in rest)]


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of numbers."""

    low: float
    high: float


def _spread(space, count, rng):
    """`count` values of a space, evenly spread, in a drawn order."""
    shares = (rng.permutation(count) + 0.5) / max(count, 1)
    if isinstance(space, Range):
        return [float(f"{space.low + share * (space.high - space.low):.4g}") for share in shares]
    return [space[int(share * len(space))] for share in shares]


def parse(text):
    """The Method of a line.

    Raises:
        ConfigError: no such method or option, or a value that the option does not take.
    """
    head, *pairs = text.split() or [""]
    label, is_labelled, name = head.rpartition(":")
    name = name or head
    module = merge_bench_joint if name == merge_bench_joint.NAME else plugins.load("merges", name)
    known, fixed, tuned = configuration.fields(module.Options), {}, {}
    whose = f"of method {errors.quote(name, 40)}"
    for pair in pairs:
        option, found, space = pair.partition("=")
        if not found or option not in known or option in {**fixed, **tuned}:
            near = errors.nearest(option, known) or f" (there are: {', '.join(known) or 'none'})"
            raise errors.ConfigError(f"methods: no option {errors.quote(pair, 60)!r} {whose}{near}, or given twice")
        field = known[option]
        if ".." in space and field.type in (int, float):
            tuned[option] = _range(space, pair)
        elif "|" in space:
            tuned[option] = tuple(configuration.parse(field, value) for value in space.split("|"))
        else:
            fixed[option] = configuration.parse(field, space)
    wrong = [o for o, space in tuned.items() if isinstance(space, Range) and known[o].type is not float]
    if wrong:
        raise errors.ConfigError(f"methods: {wrong[0]} {whose} takes whole numbers: give choices, such as 1|2|4")
    return Method(label if is_labelled else name, name, module, fixed, tuned, text)


def _range(text, pair):
    low, _, high = text.partition("..")
    try:
        found = Range(float(low), float(high))
    except ValueError:
        found = Range(0.0, 0.0)
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
        raise errors.ConfigError(f"methods: {errors.quote(pair, 60)!r}: a range is low..high, such as scaling=0.1..1.5")
    return found


def parse_all(texts):
    """[Method] of all lines; labels are different.

    Raises:
        ConfigError: as `parse`, or a label that stands twice.
    """
    methods = [parse(text) for text in texts]
    labels = [m.label for m in methods]
    twice = [label for n, label in enumerate(labels) if label in labels[:n]]
    if twice:
        raise errors.ConfigError(f"methods: {errors.quote(twice[0], 40)!r} stands twice; give labels, label:method ...")
    return methods
