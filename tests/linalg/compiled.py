"""What the collectives of a compiled program return, read from its HLO; loops are counted once."""

import math
import re

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


def collectives(text):
    """(bits of an entry, entries) of every array that a collective of the program `text` returns on one device."""
    for line in text.splitlines():
        if COLLECTIVE.search(line):
            for bits, dims in re.findall(r"[fsu](\d+)\[([\d,]*)\]", line.split("=", 1)[1].split("(%")[0]):
                yield int(bits), math.prod(int(d) for d in dims.split(",") if d)


def collective_sizes(lowered):
    """The numbers of entries of these arrays, and 1."""
    return {1, *(entries for _, entries in collectives(lowered.compile().as_text()))}


def collective_bytes(text):
    """Bytes of all of them."""
    return sum(bits // 8 * entries for bits, entries in collectives(text))
