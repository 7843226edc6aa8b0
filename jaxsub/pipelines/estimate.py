"""About how long an analysis takes: its bytes and multiply-adds over rates measured in a fraction of a second.

Reading overlaps with the products of dense layers, so that a pass takes the longer of the two. An estimate: caches,
other processes and kernels that must be compiled first are not in it.
"""

import concurrent.futures
import dataclasses
import math
import time

import numpy as np

from jaxsub import collection, errors, formats, hostmemory, reading, verdict
from jaxsub.pipelines import lora, memory

READ_SECONDS, READ_BYTES, PLACES = 0.1, 2**20, 64  # at most: of the measurement, of one place, places
PRODUCT_WIDTH, PRODUCT_MODELS = 8192, 256  # columns, and rows at most, of the product that is timed
EIGEN_SIZE = 96
LAYER_SECONDS = 0.01  # of calls, files and small products that every layer costs
DRAW_SECONDS = 3e-3  # of a null draw, however few the models: Python's own, one thread at a time
DRAW_EIGEN = 2  # and what grows with the models, its spectrum and held-out errors, in eigenproblems of N x N


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this machine does now; 0 where it could not be measured.

    Attributes:
        read: bytes a second from the collection's own files.
        product: floating-point operations a second of centred float32 products, moving to the devices included.
        eigen: seconds of an eigenproblem of N x N over N**3.
        sampled: bytes that were read for it.
    """

    read: float
    product: float
    eigen: float
    sampled: int


@dataclasses.dataclass(frozen=True)
class Seconds:
    """An estimate of a run, in seconds: of reading, products, figures, and all of it."""

    read: float
    compute: float
    figures: float
    total: float


def of(plans, groups, models, mesh, options, *, nulls, draws):
    """(Seconds, Rates) of an analysis, measured now; arguments as of `measure` and `seconds`."""
    rates = measure(groups, models, mesh)
    return seconds(plans, groups, rates, options, nulls=nulls, draws=draws), rates


def measure(groups, models, mesh):
    """Rates, in under half a second; of each tensor that is sampled half is read at most.

    Args:
        groups: LayerGroups; `members` index into `models`.
        models: Models of the collection.
        mesh: devices that the products run on.
    """
    sampled, seconds = _read(groups, models)
    most = max((len(g.members) for g in groups), default=1)
    operations, spent = _product(min(most, PRODUCT_MODELS), mesh)
    return Rates(sampled / seconds if sampled else 0.0, operations / spent, _eigen(), sampled)


def _read(groups, models):
    """(bytes, seconds) of reads at places all over the collection, as many at once as a pass makes."""
    places = [(g, i) for g in groups for i in range(len(g.members))]
    places = places[:: max(1, len(places) // PLACES)][:PLACES]
    deadline = time.perf_counter() + READ_SECONDS

    def one(number, place):
        group, index = place
        tensor = next(iter(collection.stored_tensors(group.entries[index])))
        size = min(READ_BYTES, tensor.num_bytes // 2)
        if tensor.extent is None or not size or (number and time.perf_counter() > deadline):
            return 0
        try:
            formats.read_into(tensor.extent, (tensor.num_bytes - size) // 2, np.empty(size, np.uint8))
        except errors.InputError:  # the run itself will say so
            return 0
        return size

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(reading.READERS) as pool:
        sampled = sum(pool.map(one, range(len(places)), places))
    return sampled, time.perf_counter() - started


def _product(num_models, mesh):
    """(floating-point operations, seconds) of one small Gram product on the first device, fastest of three."""
    import jax

    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    x = hostmemory.zeros((num_models, PRODUCT_WIDTH), np.float32)
    x += 1.0

    @jax.jit
    def product(x):
        y = x - x.mean(axis=0)
        return y @ y.T

    def one():
        started = time.perf_counter()
        jax.block_until_ready(product(jax.device_put(x, device)))
        return time.perf_counter() - started

    one()
    return 2.0 * num_models**2 * PRODUCT_WIDTH * mesh.size, min(one() for _ in range(3))


def _eigen():
    x = np.eye(EIGEN_SIZE) + 1.0

    def one():
        started = time.perf_counter()
        np.linalg.eigvalsh(x)
        return time.perf_counter() - started

    with hostmemory.one_blas_thread():  # as an analysis makes them
        return min(one() for _ in range(5)) / EIGEN_SIZE**3


def seconds(plans, groups, rates, options, *, nulls, draws):
    """The Seconds of an analysis.

    Args:
        plans: LayerPlans.
        groups: their LayerGroups, same order.
        rates: Rates.
        options: the `layers.Options` of the plans.
        nulls: names of the null models.
        draws: of each of them a layer, at most.
    """
    pairs = list(zip(plans, groups, strict=True))
    read = [p.own_bytes / rates.read if rates.read else 0.0 for p in plans]
    compute = [operations(p, g, options) / rates.product + LAYER_SECONDS for p, g in pairs]
    figures = sum(_figures(p, rates, nulls, draws) for p in plans)
    is_lora = [g.parametrisation == "lora" for g in groups]
    passes = sum(r + c if both else max(r, c) for r, c, both in zip(read, compute, is_lora, strict=True))
    return Seconds(sum(read), sum(compute), figures, passes + figures)


def _figures(plan, rates, nulls, draws):
    """Seconds of a layer's null draws."""
    wide = not plan.strengths
    number = (len(nulls) - ("strength" in nulls and wide)) * (min(draws, verdict.FEWEST_DRAWS) if wide else draws)
    return number * (DRAW_SECONDS + DRAW_EIGEN * rates.eigen * plan.num_models**3 / hostmemory.cores())


def operations(plan, group, options):
    """Floating-point operations of a layer's products; those in float64 count twice."""
    n = plan.num_models
    if group.parametrisation == "lora":
        pair, rows = group.entries[0], n * max(e.rank for e in group.entries)
        total = 0
        for width in (math.prod(pair.a.shape[1:]), pair.b.shape[0]):
            exact = lora.mode_is_exact(rows, width, options)
            total += 2 * rows * width * (rows + (2 * min(rows, width) if exact else memory.TESTS))
        return total * (2 if plan.dtype == "float64" else 1)
    size = math.prod(plan.shape)
    total = 2 * n**2 * size * (2 if plan.storage == "float64" else 1)
    total += sum(2 * n * size * plan.shape[a] for a in plan.exact_axes)
    if plan.sketched_axes:
        total += 2 * size * (memory.SKETCHES * n + memory.TESTS * len(plan.sketched_axes))
    if plan.other_side:
        total += 2 * n * size * n * (size // plan.shape[0])
    if plan.strengths:
        total += 2 * 2 * n * size * min(plan.shape)
    return total * (2 if plan.dtype == "float64" else 1)
