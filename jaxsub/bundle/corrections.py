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

ENTRIES, FACTORS = ("counts", "places", "values"), ("positions", "ranks", "a", "b", "scales")


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
        _require_numbers(self.values)
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
    """Own factors of some of n low-rank updates scales_m b_m a_m, each of its own rank, one behind another.

    Attributes:
        positions: (m,) int64, whose.
        ranks: (m,) int64, >= 0.
        a: (sum of ranks, i) rows of the a_m; b: (sum of ranks, o) columns of the b_m: in the stored dtype.
        scales: (m,) float64.
    """

    positions: np.ndarray
    ranks: np.ndarray
    a: np.ndarray
    b: np.ndarray
    scales: np.ndarray

    def _each(self):
        """Yields (a_m (r, i), b_m (o, r)) of each model."""
        ends = np.cumsum(self.ranks)
        for start, end in zip(ends - self.ranks, ends, strict=True):
            yield self.a[start:end], self.b[start:end].T

    def apply(self, rebuilt):
        """Puts the updates into reconstructions (n, o, i), in place, and returns them."""
        for p, (a, b), scale in zip(self.positions, self._each(), self.scales, strict=True):
            rebuilt[p] = scale * b.astype(np.float64) @ a.astype(np.float64)
        return rebuilt

    def applied(self, rebuilt):
        """`apply`, in a dtype that holds the factors."""
        return self.apply(rebuilt.astype(np.promote_types(rebuilt.dtype, self.a.dtype), copy=False))

    def apply_factors(self, a, b):
        """The same for factors (n, k, i), (n, o, k): both come back with the larger rank, padded with zeros."""
        rank = max(a.shape[1], int(self.ranks.max(initial=0)))
        a = np.pad(a, ((0, 0), (0, rank - a.shape[1]), (0, 0)))
        b = np.pad(b, ((0, 0), (0, 0), (0, rank - b.shape[2])))
        for p, (own_a, own_b), scale in zip(self.positions, self._each(), self.scales, strict=True):
            a[p], b[p] = 0, 0
            a[p, : len(own_a)], b[p, :, : len(own_a)] = own_a, scale * own_b.astype(np.float64)
        return a, b

    def own(self):
        """(a (r, i), b (o, r), scale) of one model, as they are kept."""
        ((a, b),) = self._each()
        return a, b, float(self.scales[0])

    def are_of(self, a, b, scale):
        """Whether these are the factors, to the bit, of one model, a (r, i), b (o, r) padded with zeros or not."""
        if len(self.positions) != 1 or self.scales[0] != scale or len(a) < self.ranks[0]:
            return False
        ((own_a, own_b),), rank = self._each(), self.ranks[0]
        is_padding = not (a[rank:].any() or b[:, rank:].any())
        return is_padding and np.array_equal(a[:rank], own_a) and np.array_equal(b[:, :rank], own_b)

    def take(self, positions, size):
        """The Factors of some of the models, renumbered."""
        del size
        at, own = {int(p): m for m, p in enumerate(self.positions)}, list(self._each())
        kept = [(i, at[p]) for i, p in enumerate(positions) if p in at]
        mine = [m for _, m in kept]
        a = [self.a[:0], *(own[m][0] for m in mine)]
        b = [self.b[:0], *(own[m][1].T for m in mine)]
        at = np.array([i for i, _ in kept], np.int64)
        return Factors(at, self.ranks[mine], np.concatenate(a), np.concatenate(b), self.scales[mine])

    def check(self, count, shape):
        """Raises ValueError unless these are updates of this shape of some of `count` models."""
        _require_numbers(self.a, self.b, self.scales)
        number = len(self.positions)
        if {self.positions.dtype.kind, self.ranks.dtype.kind} - {*"iu"}:
            raise ValueError("positions and ranks of factors that are no whole numbers")
        is_counted = self.ranks.shape == (number,) and ((0 <= self.ranks) & (self.ranks <= len(self.a))).all()
        if not is_counted or self.positions.shape != (number,) or self.scales.shape != (number,):
            raise ValueError(f"factors of {number} models with other numbers of ranks and scales")
        total = int(self.ranks.sum())
        if (self.a.shape, self.b.shape) != ((total, shape[1]), (total, shape[0])):
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
    if "ranks" not in tensors and tensors["a"].ndim == tensors["b"].ndim == 3:  # as they were: of one rank, padded
        a, b = tensors["a"], tensors["b"].swapaxes(1, 2)
        ranks, (a, b) = np.full(len(a), a.shape[1], np.int64), (x.reshape(-1, x.shape[2]) for x in (a, b))
        tensors = {**tensors, "ranks": ranks, "a": a, "b": b}
    return Factors(*(tensors[name] for name in FACTORS))


def _require_numbers(*arrays):
    for array in arrays:
        if array.dtype.name not in descriptors.FLOATS:
            raise ValueError(f"corrections of dtype {array.dtype.name}")
        if not np.isfinite(array if array.dtype.itemsize >= 4 else array.astype(np.float32)).all():
            raise ValueError("corrections that hold NaN or Inf")


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
    used = [a[m].any(axis=1) | b[m].any(axis=0) for m in mine]  # behind them there is padding
    ranks = np.array([int(np.flatnonzero(one).max(initial=-1)) + 1 for one in used], np.int64)
    rows = [a[m, :r] for m, r in zip(mine, ranks, strict=True)]
    columns = [b[m, :, :r].T for m, r in zip(mine, ranks, strict=True)]
    joined_a, joined_b = (np.concatenate(parts).astype(dtype) for parts in (rows, columns))
    return Factors(mine, ranks, joined_a, joined_b, np.asarray(scales, np.float64)[mine])


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
    positions = np.concatenate([one.positions + at for one, at in given])
    ranks, scales = (np.concatenate([getattr(one, name) for one, _ in given]) for name in ("ranks", "scales"))
    a, b = (np.concatenate([getattr(one, name).astype(dtype) for one, _ in given]) for name in "ab")
    return Factors(positions, ranks, a, b, scales)
