"""What the collectives of a compiled program return, read from its HLO."""

import math
import re

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collectives(text):
    """(bits of an entry, entries) of every array that a collective of `text` returns; loops and branches once each."""
    for line in text.splitlines():
        if COLLECTIVE.search(line):
            yield from _arrays(line)


def collective_sizes(lowered):
    """The numbers of entries of these arrays, and 1."""
    return {1, *(entries for _, entries in collectives(lowered.compile().as_text()))}


def collective_bytes(text):
    """Bytes of all of them."""
    return sum(bits // 8 * entries for bits, entries in collectives(text))


def executed(text):
    """[(kind, bytes)] of the collectives that run, sorted: loops as often as they turn, of branches the one that
    communicates least, which is the one without the fallback."""
    bodies, entry, name = {}, None, None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)
    return sorted(_run(bodies, entry))


def _run(bodies, name):
    found = []
    for line in bodies[name]:
        kind = COLLECTIVE.search(line)
        if kind:
            found.append((kind[1], sum(bits // 8 * entries for bits, entries in _arrays(line))))
        elif " while(" in line:
            inner = _run(bodies, re.search(r"body=%?([\w.\-]+)", line)[1])
            trips = TRIPS.search(line)
            if inner and not trips:
                raise ValueError(f"a loop of unknown length communicates: {line}")
            found += inner * int(trips[1]) if inner else []
        elif " conditional(" in line:
            names = re.findall(r"%([\w.\-]+)", line.split("conditional(")[1].split("), ", 1)[1].split("metadata")[0])
            found += min((_run(bodies, one) for one in names if one in bodies), key=lambda f: sum(b for _, b in f))
        elif " call(" in line:
            found += _run(bodies, re.search(r"to_apply=%?([\w.\-]+)", line)[1])
    return found


def _arrays(line):
    for bits, dims in re.findall(r"[fsu](\d+)\[([\d,]*)\]", line.split("=", 1)[1].split("(%")[0]):
        yield int(bits), math.prod(int(d) for d in dims.split(",") if d)
