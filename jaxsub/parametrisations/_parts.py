"""What several parametrisations are made of."""

import re
import zlib

import jax
import jax.numpy as jnp

from jaxsub import errors


def key_of(key, name):
    """A layer's key: its draws do not depend on which other layers there are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def kernels(start, pattern, ndim=None):
    """Names of the arrays called kernel, or of those that match a regular expression, with `ndim` axes or 2 and more.

    Raises:
        ConfigError: none.
    """
    found = [
        name
        for name, w in sorted(start.items())
        if (w.ndim > 1 if ndim is None else w.ndim == ndim) and re.search(pattern or "(^|/)kernel$", name)
    ]
    if not found:
        raise errors.ConfigError(f"layers={errors.quote(pattern)!r}: no kernel of the network matches")
    return found


def require_rank(rank):
    """Refuses a rank below 1."""
    if rank < 1:
        raise errors.ConfigError(f"rank={rank}: expected 1 or more")


def pair(key, name, shape, rank):
    """LoRA's factors of a kernel (i, o): "a" (r, i) uniform in +-1 / sqrt(i), as PEFT starts it, "b" (o, r) zero."""
    require_rank(rank)
    width, outputs = shape
    a = jax.random.uniform(key_of(key, name), (rank, width), jnp.float32, -(width**-0.5), width**-0.5)
    return {"a": a, "b": jnp.zeros((outputs, rank), jnp.float32)}


def combination(c, basis):
    """sum_j c_j V_j, (*shape) of c (k,) and V (k, *shape)."""
    return (c @ basis.reshape(len(basis), -1)).reshape(basis.shape[1:])


def expanded(core, factors):
    """Core (k_1, k_2, ...) times the factors {axis: (k_m, d_m)}, the axis that grows least first."""
    for axis in sorted(factors, key=lambda a: factors[a].shape[1] / factors[a].shape[0]):
        core = jnp.moveaxis(jnp.tensordot(core, factors[axis], ((axis,), (0,))), -1, axis)
    return core
