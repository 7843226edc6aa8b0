"""Pairs of models dealt to devices: each computes whole pairs, and holds no more models than it needs for them.

    models -> blocks of `size` -> as many groups of blocks as there are devices, in a circle

Device k holds the groups k + c for the numbers c of a difference cover: every distance d of two groups, 0 to P / 2, is
a difference of two of them, so that the groups k + c and k + c + d meet on device k. All devices have as much to do,
each pair of blocks is one device's, and what a device holds shrinks with the root of their number.

Source: Kleinheksel and Somani 2016, "Efficient distributed all-pairs algorithms: management using optimal cyclic
quorums". Departure: covers {0 ... s - 1} and multiples of s, up to 1.5 times the least, but known for any number.
"""

import dataclasses
import itertools

import numpy as np

PAIR_ROWS = 512  # rows of factors multiplied with as many others at once: their products stay in cache


@dataclasses.dataclass(frozen=True)
class Deal:
    """Who computes which pairs of N models, on P devices of which `together` at a time are of one process."""

    num_models: int
    size: int  # models a block
    blocks: int  # of a group
    cover: tuple[int, ...]  # groups that a device holds, counted from its own, which is the first
    devices: int
    together: int

    @classmethod
    def create(cls, num_models, rank, devices=1, together=None, size=None):
        """The deal of `num_models` of LoRA rank `rank`.

        Args:
            num_models: N.
            rank: r, the largest of them.
            devices: P.
            together: devices a process; all by default.
            size: most models a block; by default so many that their products stay in cache.
        """
        together, most = together or devices, size or models_together(rank)
        if devices == 1:
            blocks = -(-num_models // most)
            return cls(num_models, -(-num_models // blocks), blocks, (0,), 1, 1)
        cover, own = _cover(devices, together), -(-num_models // devices)
        # One block, or an even number of them: then the pairs of two opposite groups can be halved.
        deals = [
            cls(num_models, -(-own // blocks), blocks, cover, devices, together)
            for blocks in ([1] if own <= most else []) + [2 * -(-own // (2 * most))]
        ]
        return min(deals, key=lambda deal: len(deal.rows()[0]) * deal.size**2)

    @property
    def own(self):
        """Models of a device's own group."""
        return self.num_models if self.devices == 1 else self.size * self.blocks

    @property
    def held(self):
        """Models that a device holds, its own first."""
        return self.own * len(self.cover)

    @property
    def padded(self):
        """Models of all groups: those from N on are none, and count as zeros."""
        return self.own * self.devices

    def models(self, device):
        """(held,) numbers of the models that a device holds; from N on there are none."""
        groups = [(device + c) % self.devices for c in self.cover]
        return np.concatenate([np.arange(g * self.own, (g + 1) * self.own) for g in groups])

    def read_by(self, devices):
        """Numbers of the models that a process with these devices holds, ascending; from N on there are none."""
        return np.unique(np.concatenate([self.models(d) for d in devices]))

    @property
    def share(self):
        """Share of all models that a process reads, the most of any."""
        first = range(0, self.devices, self.together)
        read = [self.read_by(range(d, d + self.together)) for d in first]
        return max(int((r < self.num_models).sum()) for r in read) / self.num_models

    def rows(self):
        """[(T, 2), (T, 2)] int32 of the first and of the other half of the devices: see `table`."""
        places = [[self._start(j * self.blocks + b) for b in range(self.blocks)] for j in range(len(self.cover))]
        near = [d for d in range(1, self.devices) if 2 * d < self.devices]
        between = [(p, q) for d in near for a, b in [self._meet(d)] for p in places[a] for q in places[b]]
        opposite = [[], []]
        if self.devices % 2 == 0:
            a, b = self._meet(self.devices // 2)
            for (i, p), (j, q) in itertools.product(enumerate(places[a]), enumerate(places[b])):
                for half in (0, 1):  # one block alone is computed by both
                    opposite[half] += [(p, q)] * (self.blocks == 1 or (i + j) % 2 == half)
        own = places[0]
        inside = [(p, q) for i, p in enumerate(own) for q in own[:i]] + [(p, p) for p in own]
        return [np.asarray(between + half + inside, np.int32) for half in opposite]

    def table(self):
        """(P, T, 2) int32: where the two blocks of each of a device's pairs begin among the models it holds.

        The pairs of a block of a device's own with itself come last.
        """
        first, second = self.rows()
        return np.stack([first if 2 * device < self.devices else second for device in range(self.devices)])

    def _start(self, block):
        # The last block of a single group starts early enough to be whole: nothing is padded.
        return min(block * self.size, self.held - self.size)

    def _meet(self, distance):
        """Positions in the cover of two groups that are so far apart."""
        at = {c: j for j, c in enumerate(self.cover)}
        return next(
            (j, at[(c + distance) % self.devices]) for c, j in at.items() if (c + distance) % self.devices in at
        )

    def assemble(self, blocks):
        """(N, N) symmetric matrix from (P * T, size, size), the blocks of all devices in the order of `table`."""
        found = np.zeros((self.padded, self.padded), blocks.dtype)
        held = np.stack([self.models(device) for device in range(self.devices)])
        starts = self.table()[..., None] + np.arange(self.size)  # (P, T, 2, size)
        models = np.take_along_axis(held[:, None, None], starts, axis=-1).reshape(-1, 2, self.size)
        rows, columns = models[:, 0, :, None], models[:, 1, None, :]
        found[rows, columns] = blocks
        found[columns, rows] = blocks
        return found[: self.num_models, : self.num_models]


def models_together(rank):
    """LoRA updates a block of pairs: not so many that their products outgrow the cache."""
    return max(1, min(32, PAIR_ROWS // rank))


def _cover(devices, together):
    """Differences of which reach every distance on a circle of `devices`: the groups that `together` neighbours read
    are as few as they can be, then those that one holds."""

    def one(step):
        last = -(-(devices // 2) // step) if devices // 2 >= step else 0
        return sorted({*range(min(step, devices // 2 + 1)), *(step * i % devices for i in range(1, last + 1))})

    def costs(cover):
        return len({(c + k) % devices for c in cover for k in range(together)}), len(cover)

    return tuple(min((one(step) for step in range(1, devices // 2 + 2)), key=costs))
