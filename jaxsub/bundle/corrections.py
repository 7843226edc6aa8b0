"""What a subspace misses of its members, kept exactly, so that every one comes back within a stated error.

    Entries   dense layers: the entries of a model that its reconstruction misses most, as they are stored
    Factors   low-rank updates: the own factors of models that come back too far off

An entry kept is right to the bit: the error falls with each one and is zero when all are kept. 4 bytes for its place
beside its own; a model of which that would take more than the weight itself is kept whole.

Source: sparse plus low-rank, SLTrain (Han et al. 2024) and robust PCA (Candes et al. 2011); here greedy, exact entries
instead of differences.
"""

import dataclasses
import math

import numpy as np

from jaxsub import descriptors, precision

ENTRIES, FACTORS = ("counts", "places", "values"), ("positions", "a", "b", "scales")


@dataclasses.dataclass(frozen=True)
class Entries:
    """Entries of n models of one shape.

    Attributes:
        counts: (n,) int64, how many of each model; all entries of a weight: the model is kept whole.
        places: flat indices of the entries of models not kept whole, model after model, rising within each.
        values: the entries, model after model, in the stored dtype.
    """

    counts: np.ndarray
    places: np.ndarray
    values: np.ndarray

    def apply(self, rebuilt):
        """Puts the entries into reconstructions (n, *shape), in place, and returns them."""
        flat = rebuilt.reshape(len(self.counts), -1)
        for n, (places, values) in enumerate(self._each(flat.shape[1])):
            flat[n, places] = values
        return rebuilt

    def applied(self, rebuilt):
        """`apply`, in a dtype that holds the entries: narrow storage of a basis does not narrow them."""
        return self.apply(rebuilt.astype(np.promote_types(rebuilt.dtype, self.values.dtype), copy=False))

    def take(self, positions, size):
        """The Entries of some of the models; `size` entries make a weight."""
        parts = list(self._each(size))
        kept = [parts[p] for p in positions]
        places = [p for p, v in kept if not isinstance(p, slice)]
        return Entries(
            self.counts[list(positions)],
            np.concatenate([self.places[:0], *places]),
            np.concatenate([self.values[:0], *(v for _, v in kept)]),
        )

    def check(self, count, shape):
        """Raises ValueError unless these are entries of `count` models of this shape."""
        size = math.prod(shape)
        if {self.counts.dtype.kind, self.places.dtype.kind} - {*"iu"} or self.places.ndim != 1 or self.values.ndim != 1:
            raise ValueError("counts and places of entries that are no lists of whole numbers")
        is_counted = self.counts.shape == (count,) and (self.counts >= 0).all() and (self.counts <= size).all()
        if not is_counted or len(self.values) != self.counts.sum():
            raise ValueError(f"{len(self.values)} entries kept for {count} models")
        if (
            len(self.places) != self.counts[self.counts < size].sum()
            or not ((0 <= self.places) & (self.places < size)).all()
        ):
            raise ValueError(f"places of entries outside a weight of {size}")

    def tensors(self):
        """Arrays to store, by name."""
        return {name: getattr(self, name) for name in ENTRIES}

    def _each(self, size):
        """Yields (places, values) of each model; the places of one kept whole are a slice."""
        place = value = 0
        for count in map(int, self.counts):
            values = self.values[value : value + count]
            value += count
            if count == size:
                yield slice(None), values
            else:
                yield self.places[place : place + count], values
                place += count


@dataclasses.dataclass(frozen=True)
class Factors:
    """Own factors of some of n low-rank updates scales_m b_m a_m.

    Attributes:
        positions: (m,) int64, whose.
        a: (m, r, i); b: (m, o, r): in the stored dtype, lower ranks padded with zeros.
        scales: (m,) float64.
    """

    positions: np.ndarray
    a: np.ndarray
    b: np.ndarray
    scales: np.ndarray

    def apply(self, rebuilt):
        """Puts the updates into reconstructions (n, o, i), in place, and returns them."""
        for p, a, b, scale in zip(self.positions, self.a, self.b, self.scales, strict=True):
            rebuilt[p] = scale * b.astype(np.float64) @ a.astype(np.float64)
        return rebuilt

    def applied(self, rebuilt):
        """`apply`, in a dtype that holds the factors."""
        return self.apply(rebuilt.astype(np.promote_types(rebuilt.dtype, self.a.dtype), copy=False))

    def apply_factors(self, a, b):
        """The same for factors (n, k, i), (n, o, k): both come back with the larger rank, padded with zeros."""
        rank = max(a.shape[1], self.a.shape[1])
        a = np.pad(a, ((0, 0), (0, rank - a.shape[1]), (0, 0)))
        b = np.pad(b, ((0, 0), (0, 0), (0, rank - b.shape[2])))
        own = self.a.shape[1]
        for m, p in enumerate(self.positions):
            a[p], b[p] = 0, 0
            a[p, :own], b[p, :, :own] = self.a[m], self.scales[m] * self.b[m].astype(np.float64)
        return a, b

    def are_of(self, a, b, scale):
        """Whether these are the factors, to the bit, of one model, padded with zeros or not."""
        if len(self.positions) != 1 or self.scales[0] != scale:
            return False
        rank = min(len(a), self.a.shape[1])
        pairs = ((a, self.a[0]), (b.T, self.b[0].T))
        return all(np.array_equal(x[:rank], y[:rank]) and not (x[rank:].any() or y[rank:].any()) for x, y in pairs)

    def take(self, positions, size):
        """The Factors of some of the models, renumbered."""
        del size
        at = {int(p): m for m, p in enumerate(self.positions)}
        kept = [(i, at[p]) for i, p in enumerate(positions) if p in at]
        mine = [m for _, m in kept]
        return Factors(np.array([i for i, _ in kept], np.int64), self.a[mine], self.b[mine], self.scales[mine])

    def check(self, count, shape):
        """Raises ValueError unless these are updates of this shape of some of `count` models."""
        number, rank = len(self.positions), self.a.shape[1]
        if self.positions.dtype.kind not in "iu":
            raise ValueError("positions of factors that are no whole numbers")
        wanted = ((number, rank, shape[1]), (number, shape[0], rank), (number,))
        if (self.a.shape, self.b.shape, self.scales.shape) != wanted:
            raise ValueError(f"factors of shapes {self.a.shape}, {self.b.shape} for updates of shape {shape}")
        if ((self.positions < 0) | (self.positions >= count)).any() or len(set(self.positions.tolist())) != number:
            raise ValueError(f"factors of other models than the {count} there are")

    def tensors(self):
        """Arrays to store, by name."""
        return {name: getattr(self, name) for name in FACTORS}


def of_tensors(tensors):
    """Entries, or Factors, of their stored arrays by name."""
    if "counts" in tensors:
        return Entries(*(tensors[name] for name in ENTRIES))
    return Factors(*(tensors[name] for name in FACTORS))


def entries(x, rebuild, max_error, *, dtype, exponent=0):
    """The fewest entries with which every model comes back within max_error of its norm, or None if none is needed.

    Args:
        x: (n, *shape) models times 2**-exponent.
        rebuild: position -> reconstruction (*shape) at the same scale.
        max_error: >= 0, relative to the model's norm; 0 keeps every entry that is not right already.
        dtype: stored dtype of the entries, which holds them exactly.
    """
    size = math.prod(x.shape[1:])
    counts, places, values = np.zeros(len(x), np.int64), [], []
    small = np.uint32 if size <= 2**32 else np.uint64
    for n, model in enumerate(x):
        own = np.asarray(model, np.float64).reshape(-1)
        off = np.square(own - np.asarray(rebuild(n), np.float64).reshape(-1))
        allowed = max_error**2 * np.square(own).sum()
        if off.sum() <= allowed:
            continue
        order = np.argsort(off, kind="stable")
        left = int(np.searchsorted(np.cumsum(off[order]), allowed, side="right"))  # entries that may stay as they are
        kept = np.sort(order[left:])
        stored = np.ldexp(model.reshape(-1), exponent) if exponent else model.reshape(-1)
        if len(kept) * (np.dtype(small).itemsize + dtype.itemsize) >= size * dtype.itemsize:
            kept = slice(None)
        else:
            places.append(kept.astype(small))
        values.append(stored[kept].astype(dtype))
        counts[n] = len(values[-1])
    if not values:
        return None
    return Entries(counts, np.concatenate([np.zeros(0, small), *places]), np.concatenate(values))


def factors(a, b, scales, relative, max_error, *, dtype):
    """The own factors of updates whose relative error exceeds max_error, or None."""
    mine = np.flatnonzero(relative > max_error)
    if not len(mine):
        return None
    return Factors(mine, a[mine].astype(dtype), b[mine].astype(dtype), np.asarray(scales, np.float64)[mine])


def joined(first, second, counts):
    """Corrections of two lists of models, one after the other; either may be None.

    Args:
        first, second: Entries or Factors of the same shape, or None.
        counts: numbers of models of the two lists.
    """
    if first is None and second is None:
        return None
    if isinstance(first or second, Entries):
        given = [one for one in (first, second) if one is not None]
        dtype = precision.widest(one.values.dtype.name for one in given)
        parts = [
            np.zeros(n, np.int64) if one is None else one.counts for one, n in zip((first, second), counts, strict=True)
        ]
        places = np.concatenate([one.places for one in given])
        values = [one.values.astype(descriptors.numpy_dtype(dtype)) for one in given]
        return Entries(np.concatenate(parts), places, np.concatenate(values))
    given = [(one, at) for one, at in ((first, 0), (second, counts[0])) if one is not None]
    dtype = descriptors.numpy_dtype(precision.widest(x.dtype.name for one, _ in given for x in (one.a, one.b)))
    rank = max(one.a.shape[1] for one, _ in given)
    a = [np.pad(one.a.astype(dtype), ((0, 0), (0, rank - one.a.shape[1]), (0, 0))) for one, _ in given]
    b = [np.pad(one.b.astype(dtype), ((0, 0), (0, 0), (0, rank - one.b.shape[2]))) for one, _ in given]
    positions = np.concatenate([one.positions + at for one, at in given])
    return Factors(positions, np.concatenate(a), np.concatenate(b), np.concatenate([one.scales for one, _ in given]))
