"""Large stacks of models shared by the devices of a process: by features where rows are, else by models.

Components of the models as rows take sums of N x N and N x k matrices, if each device has features of its own. Factors
of weight axes take sums of small squares, if each has models of its own: a model's axes stay whole.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import hostmemory, placement, precision, subspace
from jaxsub.linalg.gram import FEATURES

SHARED_BYTES = 2**26  # of a stack as stored: smaller ones are not worth an exchange between devices


def mesh(count, shape, num_bytes, *, by_rows):
    """The mesh that shares a stack of so many models and bytes, of one device where that is not worth it.

    Args:
        count: N.
        shape: of a model; empty for low-rank updates.
        num_bytes: of the stack as stored.
        by_rows: whether models are rows of features, not tensors.
    """
    devices = jax.local_device_count()
    if num_bytes < SHARED_BYTES:
        devices = 1
    elif by_rows:
        devices = math.gcd(shape[0], devices)
    else:  # no more than there are shares of
        devices = -(-count // -(-count // devices))
    return placement.make_mesh(devices, is_local=True)


def placed(x, mesh, *, by_rows):
    """A stack x (N, *shape) on the mesh; by models it may end with some of zeros. One CPU device may use x in place."""
    with jax.enable_x64(True):  # else float64 would become float32
        return _placed(x, mesh, by_rows)


def _placed(x, mesh, by_rows):
    if mesh.size == 1:
        return jax.device_put(x)
    if mesh.devices.flat[0].platform == "cpu":  # whose shares are each small enough for glibc to keep when freed
        hostmemory.free_at_once()
    if by_rows:
        return jax.device_put(x, NamedSharding(mesh, P(None, FEATURES)))
    each, parts = -(-len(x) // mesh.size), []
    for number, device in enumerate(mesh.devices.flat):
        part = x[number * each : (number + 1) * each]
        if len(part) < each:
            part = np.concatenate([part, np.zeros((each - len(part), *x.shape[1:]), x.dtype)])
        parts.append(jax.device_put(part, device))
    shape = each * mesh.size, *x.shape[1:]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P(FEATURES)), parts)


def updates(stack, mesh):
    """A LoraStack dealt to the mesh."""
    if mesh.size == 1:
        return stack
    a, b = (placed(x, mesh, by_rows=False) for x in (stack.a, stack.b))
    scales = np.pad(stack.scales, (0, len(a) - len(stack.scales)))
    return dataclasses.replace(stack, a=a, b=b, scales=scales, count=stack.num_models)


def projected(space, a, b, scales):
    """`subspace.project` of low-rank updates in memory, many of them dealt to the devices, which send nothing."""
    count, own = len(a), mesh(len(a), (), a.nbytes + b.nbytes, by_rows=False)
    if own.size == 1:
        return subspace.project(space, (a, b, scales))
    a, b, scales, power = precision.unit_factors(a, b, scales)
    a, b = (placed(x, own, by_rows=False) for x in (a, b))
    values = subspace.project(space, (a, b, np.pad(scales, (0, len(a) - count))))
    return precision.scaled(values[:count], power)


def spread(space, mesh):
    """A subspace as it goes with stacks placed on the mesh: features of mean and basis are shared, factors are not."""
    if mesh.size == 1 or not isinstance(space, subspace.LinearSubspace):
        return space
    with jax.enable_x64(True):
        mean = jax.device_put(space.mean, NamedSharding(mesh, P(FEATURES)))
        basis = jax.device_put(space.basis, NamedSharding(mesh, P(None, FEATURES)))
    return dataclasses.replace(space, mean=mean, basis=basis)
