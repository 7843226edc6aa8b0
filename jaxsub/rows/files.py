"""Dense rows that stay in their files: read a block of columns at a time, the next one while one is computed."""

import concurrent.futures
import math

import jax.numpy as jnp
import numpy as np

from jaxsub import descriptors, errors, hostmemory, precision, reading, rows as core

KEPT_BYTES = 512 * 2**20  # of a layer of all models that is kept in memory once it is read: methods read it again


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
        self.models, self.entries, self.past_cache, self.base = tuple(models), group.entries, past_cache, base
        self._kept = None

    @property
    def num_blocks(self):
        """Blocks of a read."""
        return -(-self.size // self.width)

    @property
    def is_kept(self):
        """Whether the layer stays in memory once it has been read."""
        return self.num_blocks * self.width * (self.num_models + 1) * self.dtype.itemsize <= KEPT_BYTES

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
        sources = [reading.Source(m, t, self.past_cache) for m, t in zip(self.models, self.entries, strict=True)]
        base = reading.Source(*self.base, self.past_cache) if self.base else None
        buffers = [None] * (self.num_blocks if self.is_kept else min(2, self.num_blocks))
        pool = concurrent.futures.ThreadPoolExecutor(reading.READERS)
        ahead = concurrent.futures.ThreadPoolExecutor(1)

        def fill(index):
            at = index % len(buffers)
            if buffers[at] is None:
                shape = self.num_models + (base is not None), self.width
                buffers[at] = hostmemory.zeros(shape, self.dtype)
            return self._fill(buffers[at], index, sources, base, pool)

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

    def _fill(self, buffer, index, sources, base, pool):
        start, total = index * self.width, self.num_models
        count = min(self.width, self.size - start)
        own = None
        if base is not None:
            own = buffer[total]
            base.read(start, count, own[:count])
            if not np.isfinite(own[:count]).all():
                raise errors.InputError(base.model.path, "the base holds NaN or Inf", key=self.name, rule="N1")
            own[count:] = 0

        def one(n):
            row = buffer[n, :count]
            sources[n].read(start, count, row)
            if not is_finite(row):
                bad = np.flatnonzero(~np.isfinite(row))
                return reading.NonFiniteError(n, self.models[n].path, self.name, len(bad), start + int(bad[0]))
            if own is not None:
                np.subtract(row, own[:count], out=row)
            buffer[n, count:] = 0
            return None

        for failure in pool.map(one, range(total)):
            if failure is not None:
                raise failure
        return core.Block(start, count, buffer[:total], own)

    def matrix(self, n):
        """See `Rows`."""
        out = np.empty(self.size, self.dtype)
        reading.Source(self.models[n], self.entries[n], self.past_cache).read(0, self.size, out)
        reading.require_finite(out, n, self.models[n], self.entries[n])
        if self.base is not None:
            own = np.empty(self.size, self.dtype)
            reading.Source(*self.base, self.past_cache).read(0, self.size, own)
            np.subtract(out, own, out=out)
        return jnp.asarray(out.reshape(self.shape))

    def _put(self, flat):
        if self.base is None:
            yield 0, flat
            return
        source = reading.Source(*self.base, self.past_cache)
        for start in range(0, self.size, self.width):
            count = min(self.width, self.size - start)
            own = np.empty(count, self.dtype)
            source.read(start, count, own)
            yield start, flat[start : start + count] + own


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
