"""Alternating best factors from an ST-HOSVD start, never a worse fit than it; for matrices, JD-Full once centred."""

import dataclasses

from jaxsub import stacks
from jaxsub.decompositions import _fit
from jaxsub.linalg import factored, tucker

TAKES_LORA = True  # products of factors, never formed
SHRINKS = True
REFERENCE = "De Lathauwer, De Moor, Vandewalle 2000b; JD-Full: arXiv 2407.00066 (E39)"


@dataclasses.dataclass(frozen=True)
class Options(_fit.TuckerOptions):
    """As for HOSVD, and when to stop."""

    sweeps: int = 20  # at most
    tolerance: float = 1e-6  # share of the squared error that a sweep must still gain


def fit(stack, options, key):
    """TuckerSubspace of a DenseStack, or of a LoraStack, uncentred; deterministic, `key` is not used."""
    del key
    more = {"sweeps": options.sweeps, "tolerance": options.tolerance}
    if isinstance(stack, stacks.LoraStack):
        return _fit.fit_factored(factored.hooi, "hooi", REFERENCE, stack, options, **more)
    return _fit.fit_tucker(tucker.hooi, "hooi", REFERENCE, stack, options, **more)
