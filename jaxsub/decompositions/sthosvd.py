"""Sequentially truncated HOSVD of the centred stack: each axis from what the axes before it left. The fastest."""

from jaxsub.decompositions import _fit
from jaxsub.linalg import tucker

SHRINKS = True
REFERENCE = "Vannieuwenhoven, Vandebril, Meerbergen 2012, algorithm 1"
Options = _fit.TuckerOptions


def fit(stack, options, key):
    """TuckerSubspace of a DenseStack; deterministic, `key` is not used."""
    del key
    return _fit.fit_tucker(tucker.sthosvd, "sthosvd", REFERENCE, stack, options)
