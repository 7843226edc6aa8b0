"""What both ways of fitting a layer share: memory, and figures from errors."""

import math

from jaxsub import descriptors, lineup, precision, subspace
from jaxsub.pipelines import plan

WORKING_COPIES = 4  # of a stack in the dtype of its products: itself, centred, the kernels' own, the rebuilt one


def stack_bytes(group):
    """Host bytes that a layer's whole stack needs at most, from its header."""
    if group.parametrisation == lineup.LORA:
        rank, sides = max(e.rank for e in group.entries), lineup.flat_shape(group.shape)
        return 4 * WORKING_COPIES * len(group.members) * rank * sum(sides) + 24 * max(sides) ** 2
    size = len(group.members) * math.prod(group.shape)
    stored = descriptors.numpy_dtype(precision.widest(group.dtypes)).itemsize
    return size * (stored + WORKING_COPIES * max(stored, 4))


def allowed(config):
    """Host bytes that a layer may take."""
    return config.max_host_bytes or plan.available_bytes() or math.inf


def errors_of(left, energies, total):
    """Figures from squared errors and norms of the models, and the energy that the fit set out to hold."""
    relative = subspace.relative(left, energies)
    return {
        "energy_kept": 1.0 - float(left.sum()) / total if total > 0 else 1.0,  # below 0: worse than the mean alone
        "error_mean": float(relative.mean()),
        "error_max": float(relative.max()),
    }
