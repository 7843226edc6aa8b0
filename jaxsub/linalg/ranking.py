"""How the ranks of a Tucker decomposition are chosen: by number, by share of energy, or by total error."""

import itertools
import math
from typing import NamedTuple

import jax
import numpy as np

from jaxsub import errors

SHORT = 8  # axes under this size shrink nothing and multiply badly: they come last where ranks are not known


class Rule(NamedTuple):
    """How ranks are chosen: a number an axis, or shares of energy, or a part of the squared norm."""

    axes: tuple  # axes to reduce
    ranks: dict  # axis -> rank, where ranks are given by number
    shares: dict  # axis -> share of its energy to keep
    error: float | None  # relative error of the whole, whose square the axes share, see `Choice`

    @classmethod
    def create(cls, shape, ranks, energy, error, axes=None):
        """The rule that exactly one of `ranks`, `energy` and `error` states; ConfigError if it is impossible."""
        if sum(rule is not None for rule in (ranks, energy, error)) != 1:
            raise errors.ConfigError("give exactly one of ranks, energy and error")
        if min(shape, default=0) < 1:
            raise errors.ConfigError(f"a tensor of shape {tuple(shape)} has no Tucker decomposition; sizes are >= 1")
        if ranks is not None:
            return cls._numbers(shape, ranks, axes)
        axes = tuple(range(len(shape))) if axes is None else tuple(axes)
        if not axes or sorted({*axes} & {*range(len(shape))}) != sorted(axes):
            raise errors.ConfigError(f"axes {axes} of a tensor with {len(shape)} axes; name some of them once")
        if error is not None:
            if not 0 <= error <= 1:
                raise errors.ConfigError(f"error = {error}; a relative error is between 0 and 1")
            return cls(axes, {}, {}, float(error))
        shares = tuple(energy) if isinstance(energy, (tuple, list)) else (energy,) * len(axes)
        if len(shares) != len(axes) or not all(0 < s <= 1 for s in shares):
            raise errors.ConfigError(f"energy = {energy}; a share in (0, 1], or one for each of {len(axes)} axes")
        return cls(axes, {}, dict(zip(axes, shares, strict=True)), None)

    @classmethod
    def _numbers(cls, shape, ranks, axes):
        if axes is not None:
            raise errors.ConfigError("axes go with energy and error; ranks leave an axis free by None")
        if len(ranks) != len(shape) or all(k is None for k in ranks):
            raise errors.ConfigError(f"ranks {tuple(ranks)} of a tensor of shape {tuple(shape)}; one an axis, or None")
        for axis, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
            if rank is not None and not 1 <= rank <= size:
                raise errors.ConfigError(f"rank {rank} of axis {axis}, which has {size} entries; 1 to {size}")
        numbers = {a: k for a, k in enumerate(ranks) if k is not None}
        return cls(tuple(numbers), numbers, {}, None)

    def order(self, shape, order=None):
        """The axes in the order to reduce them: as given, else the cheapest."""
        if order is not None:
            if sorted(order) != sorted(self.axes):
                raise errors.ConfigError(f"order {tuple(order)}; the axes to reduce are {self.axes}")
            return tuple(order)
        if not self.ranks or len(self.axes) > 6:
            return self.short_last(shape)
        return min(itertools.permutations(self.axes), key=lambda o: (self._cost(shape, o), o))

    def short_last(self, shape):
        """The axes, short ones last and small before large."""
        return tuple(sorted(self.axes, key=lambda a: (shape[a] < SHORT, shape[a], a)))

    def _cost(self, shape, order):
        size, cost = math.prod(shape), 0.0
        for a in order:  # half a Gram product, a projection, and reading it twice, worth 32 multiply-adds an entry
            cost += size * (shape[a] / 2 + self.ranks[a] + 32)
            size = size // shape[a] * self.ranks[a]
        return cost


def sharing(shape, axes):
    """The axes that share what an error allows: long ones, or all where none is.

    Short axes can seldom spare a direction, and would waste their part.
    """
    return {axis for axis in axes if shape[axis] >= SHORT} or set(axes)


class Choice:
    """Ranks of one axis after the other, from their energies.

    Of the square that a relative error allows each axis may lose an equal part of what those before it have left. Axes
    that do not share it (`sharing`) should come last, and have what the others leave.
    """

    def __init__(self, rule, shape):
        self.rule, self.lost, self.left = rule, 0.0, set(rule.axes)
        self.sharing = sharing(shape, rule.axes)

    def rank(self, axis, values, norm):
        """Rank of an axis; waits for the device.

        Args:
            axis: one that had no rank yet.
            values: its float64 energies, non-increasing.
            norm: squared norm of the whole tensor.
        """
        values = np.asarray(jax.device_get(values))
        tails = np.append(np.cumsum(values[::-1])[::-1], 0.0)  # tails[k]: energy lost by keeping k
        if self.rule.error is None:
            allowed = (1 - self.rule.shares[axis]) * tails[0]
        else:
            parts = len(self.left & self.sharing if axis in self.sharing else self.left)
            allowed = max(self.rule.error**2 * float(norm) - self.lost, 0.0) / parts
        rank = max(1, int(np.argmax(tails <= allowed)))
        self.lost += float(tails[rank])
        self.left.remove(axis)
        return rank
