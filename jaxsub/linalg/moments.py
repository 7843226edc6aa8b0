"""Adding models to, and removing them from, exact second moments: Gram matrix, mean and mode Grams.

    about a mean m: G = y y.T;   about the mean of a choice of rows, weights w: (I - 1 w) G (I - 1 w).T
    modes: K' = K + K_new + N b / (N + b) * sum over columns of (mean_new - mean)(...).T

Only the new models, and for the bordered Gram matrix the old ones once more, are read; the results equal recomputing
to round-off of the products. Removing needs no weights for the Gram matrix, and only those of the removed models for
mean and modes. Call with x64 enabled.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxsub import errors
from jaxsub.linalg import modes, pieces, products

CHUNK = 4096  # columns a product, as in `gram`
FEATURES = "features"


class Moments(NamedTuple):
    """Second moments of N rows y = x - mean, float64; the fields of the same names of `gram.DenseSums`."""

    gram: jax.Array  # (N, N) y @ y.T
    cross: jax.Array  # (N,) y @ mean
    mean_square: jax.Array  # () mean . mean


class Border(NamedTuple):
    """Products of b new models about the mean of N old ones, float64; additive over blocks of features."""

    side: jax.Array  # (b, N) new @ old.T
    corner: jax.Array  # (b, b) new @ new.T
    cross: jax.Array  # (b,) new @ mean


def border(old, new, mean, /, *, mesh, dtype):
    """Products that new models add to a Gram matrix.

    Args:
        old: (N, D) rows in storage dtype, features sharded.
        new: (b, D) rows.
        mean: (D,) float64 mean of the old rows, features sharded; accurate to float64, as `shift_mean` keeps it, or
            the error times the new rows' distance enters.
        mesh: mesh with an axis "features".
        dtype: "float32" or "float64", the dtype of the products.

    Returns:
        Border, replicated. Zero columns at the end are exact padding.

    Raises:
        ConfigError: if the features differ.
    """
    if not old.shape[1] == new.shape[1] == mean.shape[0]:
        raise errors.ConfigError(f"old {old.shape}, new {new.shape} and mean {mean.shape} need the same features")
    return _border(old, new, mean, mesh=mesh, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("mesh", "dtype"))
def _border(old, new, mean, *, mesh, dtype):
    def local(old, new, mean):
        return jax.lax.psum(_border_local(old, new, mean, dtype), FEATURES)

    features = P(None, FEATURES)
    specs = (features, features, P(FEATURES))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(old, new, mean)


def _border_local(old, new, mean, dtype):
    def step(start, size, sums):
        m = jax.lax.dynamic_slice_in_dim(mean, start, size)

        def centred(x):
            z = pieces.part(x, start, size, axis=1).astype(jnp.float64)
            return products.row_major((z - m).astype(dtype))

        y, z = centred(old), centred(new)
        found = (products.matmul(z, y.T), products.matmul(z, z.T), products.matmul(z, m.astype(dtype)))
        return Border(*(s + f.astype(jnp.float64) for s, f in zip(sums, found, strict=True)))

    shapes = ((len(new), len(old)), (len(new), len(new)), (len(new),))
    sums = Border(*(jnp.zeros(shape, jnp.float64) for shape in shapes))
    return pieces.fold(step, len(mean), CHUNK, sums)


def add_models(moments, border, /):
    """Moments of N + b models about their common mean, the new ones last.

    Args:
        moments: Moments of the old models, or `gram.DenseSums` summed over blocks.
        border: Border, summed over the same blocks.

    Returns:
        Moments. Errors are those of the products, relative to the largest distance from the old mean.

    Raises:
        ConfigError: if the border is of another number of old models.
    """
    num_models, num_new = len(moments.gram), len(border.corner)
    if border.side.shape != (num_new, num_models):
        raise errors.ConfigError(f"the border is of {border.side.shape[1]} old models, the moments of {num_models}")
    return _add_models(Moments(moments.gram, moments.cross, moments.mean_square), border)


@jax.jit
def _add_models(moments, border):
    n, b = len(moments.gram), len(border.corner)
    # About the exact mean first: what rounding left of it in the old products differs from that in the border.
    old = _about(moments, jnp.full(n, 1 / n))
    side = border.side - jnp.mean(border.side, axis=1, keepdims=True)
    gram = jnp.block([[old.gram, side.T], [side, border.corner]])
    whole = Moments(gram, jnp.concatenate([old.cross, border.cross]), old.mean_square)
    return _about(whole, jnp.full(n + b, 1 / (n + b)))


def remove_models(moments, keep, /):
    """Moments of the models kept, about their own mean. No weights are needed.

    Args:
        moments: Moments.
        keep: (M,) integer indices of the models kept, in their new order, M >= 1; repeats make a bootstrap sample.

    Returns:
        Moments of M models, exact to rounding of the largest entry of the old ones: what is left is lost where the
        models removed lay sqrt(1 / eps) times farther out.

    Raises:
        ConfigError: if nothing is kept.
    """
    keep = jnp.asarray(keep)
    if keep.ndim != 1 or not keep.shape[0] or not jnp.issubdtype(keep.dtype, jnp.integer):
        raise errors.ConfigError(f"keep has shape {keep.shape} and dtype {keep.dtype}, expected at least one index")
    return _remove_models(Moments(moments.gram, moments.cross, moments.mean_square), keep)


@jax.jit
def _remove_models(moments, keep):
    n = len(moments.gram)
    weights = jnp.zeros(n).at[keep].add(1 / len(keep))
    moved = _about(moments, weights)
    return Moments(moved.gram[keep][:, keep], moved.cross[keep], moved.mean_square)


def _about(moments, weights):
    """The same rows about mean + weights @ y; weights (N,)."""
    gram, cross, mean_square = moments
    at = products.matmul(gram, weights)
    square = products.matmul(weights, at)
    shift = products.matmul(weights, cross)
    moved = gram - at[:, None] - at[None, :] + square
    return Moments((moved + moved.T) / 2, cross - shift + at - square, mean_square + 2 * shift + square)


@functools.partial(jax.jit, static_argnames="remove")
def shift_mean(mean, num_models, batch, /, *, remove=False):
    """Mean of the models after adding, or removing, a batch: mean + b / (N + b) (batch mean - mean).

    Args:
        mean: (D,) float64 mean of N models, features sharded as in the batch.
        num_models: N, a number.
        batch: (b, D) rows in storage dtype; for removal, of the models that go, b < N.
        remove: static.

    Returns:
        (D,) float64. The batch's own mean is taken about the old one, so that a common offset does not round.

    Source: Chan, Golub and LeVeque 1983, equation 2.1a.
    """
    change = jnp.mean(batch.astype(jnp.float64) - mean, axis=0)
    b = batch.shape[0]
    return mean - b / (num_models - b) * change if remove else mean + b / (num_models + b) * change


def shift_mode_gram(mode_gram, mean, num_models, batch, /, *, shape, axis, dtype, remove=False):
    """Centred mode Gram after adding, or removing, a batch of models.

    Args:
        mode_gram: (d, d) float64 from `modes.mode_gram` of N models, d = shape[axis].
        mean: (D,) float64 mean of those N models.
        num_models: N, a number.
        batch: (b, D') replicated rows whose first prod(shape) = D columns count; for removal b < N.
        shape: weight shape.
        axis: weight axis.
        dtype: dtype of the products.
        remove: static; True for models that go.

    Returns:
        (d, d) float64.

    Raises:
        ConfigError: if mean or mode_gram do not fit the shape.

    Fails where removal takes nearly all energy: the rest is right to eps of what there was.
    Source: Chan, Golub and LeVeque 1983, equation 2.1b, for every pair of entries along the axis.
    """
    size = shape[axis]
    if mode_gram.shape != (size, size) or mean.shape != (math.prod(shape),):
        raise errors.ConfigError(
            f"mode_gram has shape {mode_gram.shape} and mean {mean.shape}, expected ({size}, {size}) and "
            f"({math.prod(shape)},) for axis {axis} of {tuple(shape)}"
        )
    own = modes.mode_gram(batch, shape=tuple(shape), axis=axis, dtype=dtype)
    return _shift_mode_gram(mode_gram, own, mean, num_models, batch, shape=tuple(shape), axis=axis, remove=remove)


@functools.partial(jax.jit, static_argnames=("shape", "axis", "remove"))
def _shift_mode_gram(mode_gram, own, mean, num_models, batch, *, shape, axis, remove):
    b = batch.shape[0]
    change = jnp.mean(batch[:, : mean.shape[0]].astype(jnp.float64) - mean, axis=0).reshape(shape)
    change = products.row_major(jnp.moveaxis(change, axis, 0).reshape(shape[axis], -1))
    between = products.matmul(change, change.T)
    # Removing b of N: the batch's mean lies N / (N - b) of its distance to the old mean away from the rest's.
    if remove:
        return mode_gram - own - num_models * b / (num_models - b) * between
    return mode_gram + own + num_models * b / (num_models + b) * between
