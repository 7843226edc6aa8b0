"""A mean taken off a stack of models x (N, *shape), with no copy of it but the result, and the energy that is left.

Features are taken a chunk at a time. XLA on CPU would hold the whole stack in float64 to add it up, out of sight of its
own memory analysis, and take five to ten times as long (128 MiB: 730 ms, in chunks 97; jax 0.10.2).

What rounding leaves of a mean is the same for all models, a direction of its own that can be over the floor; so it is
taken off as well: the mean is (2, ...), itself and what is left without it. Neither may be fused with the subtraction:
of float64 XLA would take sum * (1 / N) off in one rounding, another mean than the one that `left` is of.
"""

import concurrent.futures
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsub.linalg import dealt, pieces
from jaxsub.linalg.gram import CHUNK, FEATURES


@functools.partial(jax.jit, static_argnames=("by", "axis", "mesh", "shared", "as_rows"))
def centred(x, present, count, given=None, *, by="models", axis=None, mesh=None, shared=None, as_rows=False):
    """Models in float32 or wider, minus a mean, and that mean in a shape that broadcasts to `shape`.

    Args:
        x: (N', *shape) of any float dtype.
        present: (N',) bool, which of them are models; where they are dealt the others become zeros.
        count: N, the number of models.
        given: (2, 1, *shape) the mean of models that are dealt; devices would exchange sums as large as a model.
        by: "models" takes off the mean model, "columns" one mean for each entry of weight axis `axis`, "none"
            nothing.
        axis: of "columns".
        mesh: that models are dealt to, or None; means of columns are few numbers, which devices add up.
        shared: mesh that the first weight axis is shared by, or None; nothing is sent for the mean model.
        as_rows: (N', D) and (D,) of "models"; outside of a traced function a reshape copies.

    Returns:
        As `x`, and the mean.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if by == "none":
        return _kept(x.astype(dtype), present, mesh), jnp.zeros((1,) * (x.ndim - 1), dtype)
    if by == "models":
        mean, left = _means(x, shared) if given is None else given[:, 0]
        y = _kept(x.astype(dtype) - mean - left, present, mesh)
        return (y.reshape(len(y), -1), mean.reshape(-1)) if as_rows else (y, mean)
    first = _mean_of_columns(x, present, count, jnp.zeros((), dtype), axis, mesh)
    rest = _mean_of_columns(x, present, count, first, axis, mesh)
    return _kept(x.astype(dtype) - first - rest, present, mesh), first


@functools.partial(jax.jit, static_argnames=("mesh", "shared"))
def energy(x, present, given=None, *, mesh=None, shared=None):
    """() float64 sum of the squares of the models without the mean model; arguments as in `centred`."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    mean, left = _means(x, shared) if given is None else given[:, 0]

    def local(parts, mean, left):
        def add(n, total):
            y = pieces.part(parts[0], n, 1)[0].astype(dtype) - mean - left
            return total + jnp.sum(jnp.square(jnp.where(parts[1][n], y, 0).astype(jnp.float64)))

        return jax.lax.fori_loop(0, len(parts[0]), add, jnp.zeros((), jnp.float64))

    if shared is None:
        return dealt.sums(local, mesh)((x, present), mean, left)
    specs = (P(None, FEATURES), P()), P(FEATURES), P(FEATURES)
    return dealt.feature_sums(local, shared, *specs)((x, present), mean, left)


@jax.jit
def finite(x):
    """(N,) bool, whether all weights of a model are numbers."""
    return jnp.isfinite(x).reshape(len(x), -1).all(axis=1)


def host_mean(x, models):
    """Mean of some models of x (N, *shape) on the host, float32 or wider, and what is left; (2, 1, *shape)."""
    dtype = np.promote_types(x.dtype, np.float32)
    flat, found = x.reshape(len(x), -1), np.empty((2, 1, *x.shape[1:]), dtype)
    first, rest = found.reshape(2, -1)

    def some(start):
        part = slice(start, start + CHUNK)
        rows = flat[models, part].astype(np.float64)
        first[part] = rows.mean(axis=0)
        rest[part] = (rows - first[part]).mean(axis=0)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(some, start) for start in range(0, flat.shape[1], CHUNK)]:
            done.result()
    return found


def _kept(y, present, mesh):
    return y if mesh is None else jnp.where(present.reshape(-1, *[1] * (y.ndim - 1)), y, 0)


def _means(x, shared):
    """(2, *shape) mean of all models, and of what is left of them without it."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def local(x):
        flat = x.reshape(len(x), -1)

        def put(start, size, found):
            part = pieces.part(flat, start, size, axis=1)
            first = jnp.mean(part.astype(jnp.float64), axis=0).astype(dtype)
            rest = jnp.mean((part.astype(dtype) - first).astype(jnp.float64), axis=0).astype(dtype)
            return jax.lax.dynamic_update_slice_in_dim(found, jnp.stack([first, rest]), start, 1)

        width = flat.shape[1]
        found = pieces.fold(put, width, CHUNK, jnp.zeros((2, width), dtype))
        return jax.lax.optimization_barrier(found.reshape(2, *x.shape[1:]))

    if shared is None:
        return local(x)
    spec = P(None, FEATURES)
    return jax.shard_map(local, mesh=shared, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _mean_of_columns(x, present, count, first, axis, mesh):
    """Means of x - `first` over all but weight axis `axis`, in the dtype of `first`; the others' sizes are 1."""
    over = tuple(a for a in range(x.ndim - 1) if a != axis)
    number = count * math.prod(x.shape[a + 1] for a in over)

    def total(parts, first):
        x, present = parts

        def add(n, sums):
            row = pieces.part(x, n, 1)[0].astype(first.dtype) - first
            row = row if mesh is None else jnp.where(present[n], row, 0)
            return sums + jnp.sum(row.astype(jnp.float64), axis=over, keepdims=True)

        sizes = [size if a == axis else 1 for a, size in enumerate(x.shape[1:])]
        return jax.lax.fori_loop(0, len(x), add, jnp.zeros(sizes, jnp.float64))

    sums = dealt.sums(total, mesh)((x, present), first)
    # Through a loop of one turn, for all that XLA knows of none: it undoes barriers before it fuses loops.
    turns, start = (jnp.asarray(count) > 0).astype(jnp.int32), jnp.zeros(sums.shape, first.dtype)
    return jax.lax.fori_loop(0, turns, lambda _, kept: (sums / number).astype(kept.dtype), start)
