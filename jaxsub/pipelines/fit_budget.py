"""A fit within a number of bytes: a first one of rank 1 for the spectra, then one at the ranks that these deserve."""

import math

import numpy as np

from jaxsub import distributed, errors, lineup
from jaxsub.bundle import allocation, storage


def within(budget, fitted, count):
    """The Bundle of `count` layers of most energy in `budget` bytes; `fitted` gives one for a rank a layer.

    Process 0, which has the layers, decides, and the others hear of the ranks.
    """
    least = result = fitted([1] * count)
    smallest, allowed, over = _total(least), budget, 0
    ranks = _decided(least, allowed)
    while ranks is not None:
        result = fitted(ranks)
        over = _total(result) - budget
        allowed -= over  # the manifest's numbers have other digits than at rank 1
        ranks = _decided(least, allowed) if over > 0 and allowed >= smallest else None
    return result if over <= 0 else least


def _total(result):
    return distributed.from_main(lambda: result.accounting()["total"])


def _decided(least, budget):
    ranks = distributed.from_main(lambda: [[*map(int, k)] for k in _ranks(least, budget)])
    return [tuple(k) for k in ranks]


def _ranks(least, budget):
    """A rank a layer, (k,) or (k_0, k_1, ...), for a bundle of `budget` bytes, from the spectra of a fit of rank 1.

    Raises:
        ConfigError: what does not depend on the ranks takes more.
    """
    choices = []
    for layer in least.layers:
        space, count = layer.subspace, len(layer.model_ids)
        if not layer.is_linear and len(space.factors) != len(space.shape):
            raise errors.ConfigError(f"budget_bytes: {space.procedure.name} reduces one axis only; give --rank")
        spectra = [space.spectrum] if layer.is_linear else [space.spectra[axis] for axis in sorted(space.spectra)]
        sizes = [math.prod(space.shape)] if layer.is_linear else space.shape
        computed, is_lora = layer.values.dtype.itemsize, layer.parametrisation == lineup.LORA
        (each, scale), (number, other) = (storage.component_bytes(computed, dtype) for dtype in layer.storage)
        kept = [np.square(np.where(s.values > s.floor, s.values, 0.0))[: space.procedure.cap] for s in spectra]
        base = tuple(size * each + scale for size in sizes)
        inner = np.array(layer.figures["energies_of_ranks"]) if is_lora else None
        whole = () if layer.is_linear else tuple(sizes)
        at_least = 0 if layer.is_constant else 1
        choices.append(
            allocation.Choice(tuple(kept), base, 1, count * number + other, least=at_least, inner=inner, whole=whole)
        )
    spent = sum(c.num_bytes([c.least] * len(c.all_energies)) for c in choices)
    fixed = least.accounting()["total"] - spent
    if fixed + spent > budget:
        raise errors.ConfigError(
            f"budget_bytes={budget}: means, kept layers, headers and one component a layer take {fixed + spent} bytes"
        )
    return allocation.allocate(choices, budget - fixed)
