"""Tucker adapters for kernels of any number of axes: W = start + s G x_1 U_1 x_2 U_2 ..., all of it trained.

A matrix has a core r x r between two factors, and is not multiplied out; the update of a convolution is formed, in the
order that costs least, before it is added to the kernel. G starts at zero.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxsub.parametrisations import _parts, _values

REFERENCE = "Si et al. 2024, FLoRA: low-rank core space for N dimensions"
NEEDS_SPACES = False


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 4  # of axes of channels; axes shorter than it are kept whole
    scale: float = 2.0
    layers: str = ""  # regular expression on layer names; empty: everything called kernel


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: {"core": (r_1, ...), "0": (r_1, d_1), ...}}."""
    del spaces
    _parts.require_rank(options.rank)
    trainable = {}
    for name in _parts.kernels(start, options.layers):
        shape = start[name].shape
        ranks = tuple(min(options.rank, size) for size in shape)
        trainable[name] = {"core": jnp.zeros(ranks, jnp.float32)}
        for axis, (rank, size) in enumerate(zip(ranks, shape, strict=True)):
            own = jax.random.fold_in(_parts.key_of(key, name), axis)
            # Kaiming's uniform bound with a slope of sqrt(5), as torch starts a linear layer
            trainable[name][str(axis)] = jax.random.uniform(own, (rank, size), jnp.float32, -(size**-0.5), size**-0.5)
    return trainable, {"start": start}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    found = dict(frozen["start"])
    for name, parts in trainable.items():
        core = options.scale * parts["core"]
        if core.ndim == 2:
            found[name] = _values.Factored(found[name], parts["0"].T @ core, parts["1"])
        else:
            found[name] = found[name] + _parts.expanded(core, {a: parts[str(a)] for a in range(core.ndim)})
    return found
