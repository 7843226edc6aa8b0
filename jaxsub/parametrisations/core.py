"""Cores in joint factors of the weight axes: W = start + U_1^T C U_2, for convolutions with a factor each axis.

Of matrices the product is not formed. Of low-rank updates start is the base; C starts at zero.
"""

import dataclasses

import jax.numpy as jnp

from jaxsub import errors
from jaxsub.parametrisations import _parts, _values

REFERENCE = "Kaushik et al. 2025, order-2 cores; of kernels, FLoRA (Si et al. 2024) with frozen factors"
NEEDS_SPACES = True


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 0  # directions an axis, the leading ones; 0: all that the bundle holds


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: (k_1, k_2, ...)} zeros, axes without a factor whole."""
    del key
    cores, factors = {}, {}
    for name, space in spaces.items():
        if not space.factors:
            raise errors.ConfigError(
                f"layer {errors.quote(name)}: the bundle holds components of it, no factors of its axes; fit with "
                "--decomposition=hosvd or hooi, or train scalars (parametrisation=scalar)"
            )
        short = min(len(f) for f in space.factors.values())
        if options.rank > short:
            raise errors.ConfigError(f"layer {errors.quote(name)}: rank={options.rank}, the bundle holds {short}")
        kept = {axis: f[: options.rank or None] for axis, f in space.factors.items()}
        shape = tuple(len(kept[a]) if a in kept else size for a, size in enumerate(start[name].shape))
        cores[name] = jnp.zeros(shape, jnp.float32)
        factors[name] = {str(axis): jnp.asarray(f) for axis, f in kept.items()}
    return cores, {"start": start, "factors": factors}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    del options
    found = dict(frozen["start"])
    for name, core in trainable.items():
        factors = {int(axis): f for axis, f in frozen["factors"][name].items()}
        if core.ndim == 2:
            left = factors[0].T @ core if 0 in factors else core
            right = factors[1] if 1 in factors else jnp.eye(core.shape[1], dtype=core.dtype)
            found[name] = _values.Factored(found[name], left, right)
        else:
            found[name] = found[name] + _parts.expanded(core, factors)
    return found
