"""Ranks across layers for a number of bytes: what holds most energy a byte."""

import dataclasses
import heapq
import itertools

import numpy as np

from jaxsub import errors
from jaxsub.bundle import cores

GRID = 48  # ranks an axis that are tried together; all of them up to this number, then in growing steps
INNER_GRID = 16
TIE = 1e-9  # of a slope: rounding of sums must not merge components that hold the same


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one layer may spend bytes on.

    Attributes:
        energies: an array for each axis of the rank, non-increasing: what its 1st, 2nd, ... component holds.
        base: for each axis, bytes of one component by itself (a row of the basis).
        count: models, each of which stores the product of the ranks.
        itemsize: bytes of a number.
        least: rank on every axis that the layer has in any case.
        inner: of low-rank updates: what the models' own 1st, 2nd, ... singular vectors hold (`cores.energies`). The
            ranks then have a third number, the rank of the cores.
        whole: for each axis, the rank at which its basis is all of it and takes no bytes; () if it always does.
    """

    energies: tuple[np.ndarray, ...]
    base: tuple[int, ...]
    count: int
    itemsize: int = 4
    least: int = 0
    inner: np.ndarray | None = None
    whole: tuple[int, ...] = ()

    @property
    def all_energies(self):
        """`energies`, and `inner` where there is one."""
        return self.energies if self.inner is None else (*self.energies, self.inner)

    def num_bytes(self, ranks):
        """Bytes of the layer's basis and coefficients at these ranks (numbers, or arrays that broadcast)."""
        axes = ranks[: len(self.base)]
        numbers = np.prod(np.broadcast_arrays(*axes), axis=0) if self.inner is None else cores.count(*ranks)
        whole = self.whole or (-1,) * len(axes)
        parts = [np.where(k == full, 0, k * each) for k, each, full in zip(axes, self.base, whole, strict=True)]
        found = self.count * self.itemsize * numbers + sum(parts)
        return int(found) if np.ndim(found) == 0 else found

    def held(self, ranks):
        """Energy held at these ranks: the total times the share that each axis keeps, as if the axes were independent.

        With one axis it is exact; with more it lies between the bounds of E12 (the largest tail, the sum of all).
        """
        shares, total = 1.0, 0.0
        for k, energies in zip(ranks, self.all_energies, strict=True):
            sums = np.concatenate([[0.0], np.cumsum(energies)])
            total = max(total, float(sums[-1]))
            shares = shares * sums[k] / (sums[-1] or 1.0)
        return total * shares


def allocate(choices, budget):
    """Ranks of every layer, (k,), (k_1, k_2) or (k_1, k_2, q), whose bytes are at most `budget`.

    One axis: no other ranks of as many bytes or fewer hold more energy, whatever is left of the budget is less than the
    next component takes (smaller ones further down may still be taken). More axes: the same over those ranks of a layer
    that hold most for some price of a byte, by the estimate of `Choice.held`; then, layer by layer, the best ranks for
    the bytes that are left, and single components.

    Args:
        choices: list of Choice.
        budget: bytes for all bases and coefficients.

    Raises:
        ConfigError: the least ranks alone take more.

    Source: greedy over concave hulls (Everett 1963).
    """
    ranks = [tuple(min(c.least, len(e)) for e in c.all_energies) for c in choices]
    spent = sum(c.num_bytes(r) for c, r in zip(choices, ranks, strict=True))
    if spent > budget:
        raise errors.ConfigError(f"{budget} bytes for bases and coefficients; the least ranks take {spent}")
    steps, tables = [], []
    for index, choice in enumerate(choices):
        before = ranks[index]
        tables.append(_table(choice, before))
        for number, then in enumerate(_hull(choice, before, tables[-1])):
            gain, cost = choice.held(then) - choice.held(before), choice.num_bytes(then) - choice.num_bytes(before)
            steps.append((-gain / cost, index, number, then))
            before = then
    stopped = set()
    for _, index, _, then in sorted(steps):
        cost = choices[index].num_bytes(then) - choices[index].num_bytes(ranks[index])
        if index in stopped or spent + cost > budget:
            stopped.add(index)
            continue
        ranks[index], spent = then, spent + cost
    for index, (choice, (table, cost, held)) in enumerate(zip(choices, tables, strict=True)):
        if len(choice.all_energies) == 1:
            continue
        now = choice.num_bytes(ranks[index])
        at = int(np.argmax(np.where(cost <= now + budget - spent, held, -np.inf)))
        if held[at] > choice.held(ranks[index]):
            ranks[index], spent = tuple(int(t[at]) for t in table), spent + int(cost[at]) - now
    return _filled(choices, ranks, budget - spent)


def _table(choice, start):
    """([ranks of each axis], bytes, energy held) of the ranks from `start` on that are tried."""
    grids = []
    for axis, (energies, least) in enumerate(zip(choice.all_energies, start, strict=True)):
        most = max(int(np.count_nonzero(np.asarray(energies) > 0)), least)
        size = INNER_GRID if axis == len(choice.base) else GRID
        if len(start) == 1 or most - least < size:
            grids.append(np.arange(least, most + 1))
        else:
            grids.append(least + np.unique(np.geomspace(1, most - least + 1, size).round().astype(int)) - 1)
    table = [g.reshape(-1) for g in np.meshgrid(*grids, indexing="ij")]
    return table, choice.num_bytes(table), choice.held(table)


def _hull(choice, start, tried):
    """Ranks whose (bytes, energy held) lie on the concave hull, by growing bytes, `start` left out."""
    table, cost, held = tried
    order = np.lexsort((-held, cost))
    best = np.concatenate([[-np.inf], np.maximum.accumulate(held[order])[:-1]])
    first = (choice.num_bytes(start), choice.held(start), start)
    found = [first]
    for at in order[held[order] > best]:
        point = (int(cost[at]), float(held[at]), tuple(int(t[at]) for t in table))
        if point[0] <= first[0] or point[1] <= first[1]:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) < (1 - TIE) * _slope(found[-2], point):
            found.pop()
        found.append(point)
    return [point[2] for point in found[1:]]


def _slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])


def _filled(choices, ranks, left):
    """`ranks` with single components more for the `left` bytes, always the one that holds most a byte."""
    heap: list[tuple] = []
    tie = itertools.count()

    def offer(index):
        choice, now = choices[index], ranks[index]
        for axis, energies in enumerate(choice.all_energies):
            if now[axis] < len(energies) and energies[now[axis]] > 0:
                then = tuple(k + (a == axis) for a, k in enumerate(now))
                cost = choice.num_bytes(then) - choice.num_bytes(now)
                price = (choice.held(then) - choice.held(now)) / cost if cost > 0 else np.inf
                heapq.heappush(heap, (-price, index, next(tie), now, then, cost))

    for index in range(len(choices)):
        offer(index)
    while heap:
        _, index, _, now, then, cost = heapq.heappop(heap)
        if now == ranks[index] and cost <= left:  # else made for ranks that have grown, or too large
            ranks[index], left = then, left - cost
            offer(index)
    return ranks
