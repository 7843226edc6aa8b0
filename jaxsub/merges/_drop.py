"""Random masks that hang on the layer's key, the model's name and the place alone, not on blocks or other models."""

import functools
import zlib

import jax
import jax.numpy as jnp

from jaxsub.merges import _columns, _signs, _weights


def keys(rows, key):
    """(N,) typed keys, one a model."""
    numbers = [zlib.crc32(name.encode("utf-8", "surrogatepass")) for name in rows.model_ids]
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(numbers, jnp.uint32))


def kept(x, start, model_keys, density, *, chunk):
    """x (N, W) / density where a coin of chance `density` falls so, else 0; `start` is a multiple of `chunk`."""
    count, width = x.shape
    pieces = -(-width // chunk)

    def one(key, piece):
        return jax.random.uniform(jax.random.fold_in(key, start // chunk + piece), (min(chunk, width),), jnp.float32)

    draws = jax.vmap(lambda key: jax.vmap(functools.partial(one, key))(jnp.arange(pieces)))(model_keys)
    return jnp.where(draws.reshape(count, -1)[:, :width] < density, x / density, 0)


@functools.partial(jax.jit, static_argnames="chunk")
def _summed(x, start, model_keys, density, weights, *, chunk):
    return _columns.weighted_sum(kept(x, start, model_keys, density, chunk=chunk), weights)


@functools.partial(jax.jit, static_argnames=("chunk", "function"))
def _elected(x, start, model_keys, density, weights, scaling, *, chunk, function):
    x = kept(x, start, model_keys, density, chunk=chunk)
    return scaling * _signs.elected(x, weights, function=function)


def linear(rows, key, density, scaling):
    """scaling * sum_n a_n of the rows with dropped entries."""
    _signs.require_share("density", density)
    weights = (scaling * _weights.given(rows, 1.0)).astype(rows.dtype)
    kernel = functools.partial(_summed, chunk=rows.chunk)
    return rows.map(kernel, keys(rows, key), rows.dtype.type(density), weights)


def ties(rows, key, density, scaling, function):
    """The rows with dropped entries, signs elected as in TIES; nothing is trimmed by magnitude."""
    _signs.require_share("density", density)
    weights = _weights.given(rows, 1.0).astype(rows.dtype)
    kernel = functools.partial(_elected, chunk=rows.chunk, function=function)
    return rows.map(kernel, keys(rows, key), rows.dtype.type(density), weights, rows.dtype.type(scaling))
