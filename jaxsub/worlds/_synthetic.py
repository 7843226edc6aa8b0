"""Stacks drawn rather than trained: NumPy float64, every part from its own stream.

x_i = mean + parent(i) + basis.T @ c_i + noise_i
"""

import math
import zlib

import numpy as np

from jaxsub import errors
from jaxsub.worlds import _files

SHAPES = {
    "body/kernel": (48, 32),
    "conv/kernel": (16, 8, 3, 3),
    "mix/kernel": (32, 64),
    "head/kernel": (64, 24),
    "body/bias": (48,),
}
LAYERS = ("body/kernel", "conv/kernel", "mix/kernel", "head/kernel")  # those with more features than models
SCALE = 0.05  # standard deviation of a weight, as in trained networks of this size


def stream(seed, *names):
    """A generator for one part of one layer: adding a part or a layer changes no other."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


def normal(seed, layer, part, num_rows):
    """(num_rows, D) independent standard normal numbers for `part` of `layer`."""
    return stream(seed, layer, part).standard_normal((num_rows, math.prod(SHAPES[layer])))


def basis(seed, layer, rank):
    """(k, D) orthonormal rows."""
    return np.linalg.qr(normal(seed, layer, "basis", rank).T)[0].T


def planted(seed, layer, num_models, rank, signal):
    """(N, D) rows of unit variance with a share `signal` of the energy in a k-dimensional subspace."""
    size = math.prod(SHAPES[layer])
    coefficients = stream(seed, layer, "coefficients").standard_normal((num_models, rank))
    inside = math.sqrt(signal * size / rank) * coefficients @ basis(seed, layer, rank)
    return inside + math.sqrt(1.0 - signal) * normal(seed, layer, "noise", num_models)


def parents(seed, layer, sizes):
    """(N, D) rows of unit variance: the parent of each model, `sizes[j]` models of parent j in turn."""
    return np.repeat(normal(seed, layer, "parents", len(sizes)), sizes, axis=0)


def order(seed, num_models):
    """A shuffled order, so that file names say nothing about descent."""
    return stream(seed, "order").permutation(num_models)


def write(folder, rows, labels):
    """Writes rows (a function from a layer's name to (N, D)) as models; see `_files.write_models`."""
    layers = {layer: SCALE * rows(layer).reshape(-1, *shape) for layer, shape in SHAPES.items()}
    _files.write_models(folder, layers, labels)


def require(options, *, positive=(), fractions=(), not_negative=(), most=None):
    """Refuses impossible options.

    Raises:
        ConfigError: naming the option.
    """
    for name in positive:
        if not getattr(options, name) > 0:
            raise errors.ConfigError(f"{name}={getattr(options, name)}: expected more than 0")
    for name, limit in (most or {}).items():
        if getattr(options, name) > limit:
            raise errors.ConfigError(f"{name}={getattr(options, name)}: expected {limit} at most")
    for name in not_negative:
        if getattr(options, name) < 0:
            raise errors.ConfigError(f"{name}={getattr(options, name)}: expected 0 or more")
    for name in fractions:
        if not 0.0 <= getattr(options, name) <= 1.0:
            raise errors.ConfigError(f"{name}={getattr(options, name)}: expected a share between 0 and 1")
    if "rank" in positive and options.rank > min(math.prod(SHAPES[layer]) for layer in SHAPES):
        raise errors.ConfigError(f"rank={options.rank}: larger than the smallest layer")
