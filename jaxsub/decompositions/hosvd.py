"""Truncated HOSVD of the centred stack, models axis kept whole: Algorithm 1 of the paper (order 2 for matrices)."""

from jaxsub import stacks
from jaxsub.decompositions import _fit
from jaxsub.linalg import factored, tucker

TAKES_LORA = True  # products of factors, never formed
REFERENCE = "De Lathauwer, De Moor, Vandewalle 2000; arXiv 2512.05117, Algorithm 1 (E1 to E8)"
Options = _fit.TuckerOptions


def fit(stack, options, key):
    """TuckerSubspace of a DenseStack, or of a LoraStack, uncentred; deterministic, `key` is not used."""
    del key
    if isinstance(stack, stacks.LoraStack):
        return _fit.fit_factored(factored.hosvd, "hosvd", REFERENCE, stack, options)
    return _fit.fit_tucker(tucker.hosvd, "hosvd", REFERENCE, stack, options)
