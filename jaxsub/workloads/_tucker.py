"""What the Tucker workloads share: they differ in shape and ranks alone. Options have `shape` and `ranks`."""

import jax
import numpy as np

from jaxsub.linalg import tucker
from jaxsub.workloads import _data, _peers

REFERENCE = "Vannieuwenhoven, Vandebril, Meerbergen 2012"


def problem(options, rng):
    """Float32 tensor of twice the ranks with decaying factors, over noise."""
    return _data.tensor(rng, options.shape, options.ranks)


def work(options):
    """(operations, bytes): half Gram products and the products that shrink, in the cheapest order; two reads."""
    return _data.tucker_work(options.shape, options.ranks), 8 * int(np.prod(options.shape))


def communication(options):
    """None: the kernel takes arrays of one device."""
    return None


def ours(x, options):
    """A call that computes (core, factors (k, d))."""
    placed = jax.device_put(x)

    def call():
        with jax.enable_x64(True):
            found = tucker.sthosvd(placed, ranks=options.ranks, certify="norms")
            return found.core, found.factors

    return call


def peers(x, options):
    """By hand in torch, tensorly on torch, pyttb."""
    return _peers.tucker(x, options.ranks)


def error(x, options, result):
    """Relative error of the approximation over that of the float64 ST-HOSVD, minus 1."""
    return _data.tucker_error(x, result[1]) / _data.best_tucker_error(x, options.ranks) - 1
