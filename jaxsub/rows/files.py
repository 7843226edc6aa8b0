"""Dense rows that stay in their files: read a block of columns at a time, the next one while one is computed."""

import concurrent.futures
import math
import threading

import jax
import numpy as np

from jaxsub import descriptors, errors, hostmemory, precision, reading, rows as core

KEPT_BYTES = 64 * 2**20  # of a layer of all models that stays in memory once it is read, for methods that read it again


class FileRows(core.Rows):
    """The models of a LayerGroup, less a base if there is one."""

    def __init__(self, group, models, model_ids, *, base=None, weights=None, statistics=None, past_cache=False):
        """Opens nothing yet.

        Args:
            group: LayerGroup with `entries`, one Tensor a member.
            models: the Model of each member, same order.
            model_ids: their ids.
            base: (Model, Tensor) that is subtracted and put back, or None.
            weights, statistics: see `Rows`.
            past_cache: see `formats.read_into`.
        """
        dtypes = [t.dtype for t in group.entries] + ([base[1].dtype] if base else [])
        dtype = "float64" if precision.widest(dtypes) == "float64" else "float32"
        more = {"weights": weights, "is_update": base is not None, "statistics": statistics, "dtype": dtype}
        super().__init__(group.name, group.shape, model_ids, **more)
        self.models, self.entries, self.base = tuple(models), group.entries, base
        pairs = zip(models, group.entries, strict=True)
        self.sources = [reading.Source(model, tensor, past_cache) for model, tensor in pairs]
        self.base_source = reading.Source(*base, past_cache) if base else None
        self._kept = None

    @property
    def num_blocks(self):
        """Blocks of a read."""
        return -(-self.size // self.width)

    @property
    def is_kept(self):
        """Whether the layer stays in memory once it has been read."""
        return self.num_blocks * self._depth * self.width * self.dtype.itemsize <= KEPT_BYTES

    @property
    def _depth(self):
        return self.num_models + (self.base is not None)

    def blocks(self):
        """See `Rows`.

        Raises:
            NonFiniteError: naming the first model with a NaN or an Inf.
        """
        if self._kept is None:
            kept = []
            for block in self._read():
                if self.is_kept:
                    kept.append(block)
                yield block
            self._kept = kept if self.is_kept else None
        else:
            yield from self._kept

    def _read(self):
        buffers = [None] * (self.num_blocks if self.is_kept else min(2, self.num_blocks))
        pool = concurrent.futures.ThreadPoolExecutor(reading.READERS)
        ahead = concurrent.futures.ThreadPoolExecutor(1)

        def fill(index):
            at = index % len(buffers)
            if buffers[at] is None:
                buffers[at] = hostmemory.zeros((self._depth, self.width), self.dtype)
            return self._fill(buffers[at], index, pool)

        try:
            pending = ahead.submit(fill, 0)
            for index in range(self.num_blocks):
                block = pending.result()
                if index + 1 < self.num_blocks:
                    pending = ahead.submit(fill, index + 1)
                yield block
        finally:
            ahead.shutdown(cancel_futures=True)
            pool.shutdown(cancel_futures=True)

    def _fill(self, buffer, index, pool):
        start, total = index * self.width, self.num_models
        count = min(self.width, self.size - start)
        own = None
        if self.base is not None:
            own = buffer[total]
            self.base_source.read(start, count, own[:count])
            self._require_finite_base(own[:count])
            own[count:] = 0

        def one(n):
            row = buffer[n, :count]
            self.sources[n].read(start, count, row)
            if not is_finite(row):
                return self._not_finite(row, n, start)
            if own is not None:
                _less(row, own[:count])
            buffer[n, count:] = 0
            return None

        for failure in pool.map(one, range(total)):
            if failure is not None:
                raise failure
        return core.Block(start, count, buffer[:total], own)

    def _combined(self, used, c, start, count):
        x, own = _scratch(len(used) + 1, count, self.dtype), None
        x, room = x[:-1], x[-1]
        for row, n in zip(x, used, strict=True):
            self.sources[n].read(start, count, row)
        if self.base is not None:
            own = room
            self.base_source.read(start, count, own)
            self._require_finite_base(own)
            _less(x, own)
        with np.errstate(over="ignore", invalid="ignore"):
            y = np.dot(c, x)
        if not is_finite(y):  # as it is wherever an input is not
            for row, n in zip(x, used, strict=True):  # again, without the base: the difference may have overflown
                self.sources[n].read(start, count, row)
            self._require_finite(x, used, start)
        return y if own is None else np.add(y, own, out=y)

    def _require_finite_base(self, own):
        if not is_finite(own):
            raise errors.InputError(self.base[0].path, "the base holds NaN or Inf", key=self.name, rule="N1")

    def _require_finite(self, x, used, start):
        for row, n in zip(x, used, strict=True):
            if not is_finite(row):
                raise self._not_finite(row, int(n), start)

    def _not_finite(self, row, n, start):
        bad = np.flatnonzero(~np.isfinite(row))
        return reading.NonFiniteError(n, self.models[n].path, self.name, len(bad), start + int(bad[0]))

    def matrix(self, n):
        """See `Rows`."""
        hostmemory.trim()  # the matrix before this one
        out = hostmemory.zeros(self.shape, self.dtype)
        self.read_matrix(n, out)
        return jax.device_put(out)  # in place, where jnp.asarray would copy

    def read_matrix(self, n, out):
        """See `Rows`."""
        out = out.reshape(-1)
        self.sources[n].read(0, self.size, out)
        reading.require_finite(out, n, self.models[n], self.entries[n])
        if self.base is not None:
            width = core.piece_width(1, self.dtype.itemsize)
            for start in range(0, self.size, width):
                part = out[start : start + width]
                _less(part, self._base_piece(start, len(part)))

    def _base_piece(self, start, count):
        own = np.empty(count, self.dtype)
        self.base_source.read(start, count, own)
        self._require_finite_base(own)
        return own

    def _put(self, flat):
        if self.base is None:
            yield 0, flat
            return
        for start in range(0, self.size, self.width):
            yield start, self._put_piece(start, flat[start : start + self.width])

    def _put_piece(self, start, part):
        return part if self.base is None else part + self._base_piece(start, len(part))


_kept = threading.local()


def _scratch(rows, columns, dtype):
    """(rows, columns) of memory that this thread used before: fresh pages cost as much as what is read into them."""
    size = rows * columns * dtype.itemsize
    if getattr(_kept, "buffer", None) is None or _kept.buffer.nbytes < size:
        _kept.buffer = np.empty(size, np.uint8)
    return _kept.buffer[:size].view(dtype).reshape(rows, columns)


def _less(x, own):
    """x - own in x; an overflow is found when the result is written, and is no warning here."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(x, own, out=x)


def is_finite(row):
    """Whether all entries are: one product tells almost always, entry by entry where squares overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(np.dot(row, row))):
            return True
    return bool(np.isfinite(row).all())


def require_base(base, name, shape):
    """The Tensor of a layer in the base, its first rows where it has more than `shape`.

    Raises:
        InputError: the base lacks it, or has it in another shape.
    """
    tensor, shape = base.tensors.get(name), tuple(shape)
    if tensor is not None and shape and tensor.shape[1:] == shape[1:] and tensor.shape and tensor.shape[0] > shape[0]:
        tensor = descriptors.Tensor(tensor.name, shape, tensor.dtype, tensor.extent)
    if tensor is None or tensor.shape != shape or not tensor.is_float:
        found = "lacks it" if tensor is None else f"has {tensor.dtype} of shape {list(tensor.shape)}"
        raise errors.InputError(
            base.path,
            f"the base {found}, the models have shape {list(shape)}",
            key=name,
            hint="give the model they were trained from, or leave the layer out with --exclude_layers",
        )
    return tensor
