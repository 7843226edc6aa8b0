"""Ranks across layers for a number of bytes: always the component next that holds most energy a byte."""

import dataclasses
import heapq

import numpy as np

from jaxsub import errors


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one layer may spend bytes on.

    Attributes:
        energies: an array for each axis of the rank, non-increasing: what its 1st, 2nd, ... component holds.
        base: for each axis, bytes of one component by itself (a row of the basis).
        count: models, each of which stores the product of the ranks.
        itemsize: bytes of a number.
        least: rank on every axis that the layer has in any case.
    """

    energies: tuple[np.ndarray, ...]
    base: tuple[int, ...]
    count: int
    itemsize: int = 4
    least: int = 0

    def num_bytes(self, ranks):
        """Bytes of the layer's basis and coefficients at these ranks."""
        coefficients = self.count * self.itemsize * int(np.prod(ranks))
        return coefficients + sum(k * each for k, each in zip(ranks, self.base, strict=True))


def allocate(choices, budget):
    """Ranks of every layer, (k,) or (k_1, k_2), whose bytes are at most `budget`.

    One axis: no other ranks of as many bytes or fewer hold more energy, whatever is left of the budget is less than the
    next component takes (smaller ones further down may still be taken). Two axes: energies of the axes are added as if
    they were apart, a bound (E12), and bytes of coefficients grow with the other axis: a good choice, not a proven one.

    Args:
        choices: list of Choice.
        budget: bytes for all bases and coefficients.

    Raises:
        ConfigError: the least ranks alone take more.

    Source: greedy water-filling; optimal for non-increasing gains at equal costs within a layer (Everett 1963).
    """
    ranks = [tuple(min(c.least, len(e)) for e in c.energies) for c in choices]
    spent = sum(c.num_bytes(r) for c, r in zip(choices, ranks, strict=True))
    if spent > budget:
        raise errors.ConfigError(f"{budget} bytes for bases and coefficients; the least ranks take {spent}")
    heap: list[tuple] = []

    def offer(index):
        choice, now = choices[index], ranks[index]
        for axis, energies in enumerate(choice.energies):
            if now[axis] < len(energies) and energies[now[axis]] > 0:
                then = tuple(k + (a == axis) for a, k in enumerate(now))
                cost = choice.num_bytes(then) - choice.num_bytes(now)
                heapq.heappush(heap, (-float(energies[now[axis]]) / cost, index, axis, now, then, cost))

    for index in range(len(choices)):
        offer(index)
    while heap:
        _, index, _, now, then, cost = heapq.heappop(heap)
        if now == ranks[index] and spent + cost <= budget:  # else made for ranks that have grown, or too large
            ranks[index], spent = then, spent + cost
            offer(index)
    return ranks
