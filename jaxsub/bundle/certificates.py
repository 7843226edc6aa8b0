"""Certificates of subspaces as they are stored: narrow numbers, and cores cut to a rank, add errors of their own."""

import dataclasses
import math

import numpy as np

from jaxsub import subspace


def measured(space, left, energies):
    """The subspace with a certificate that holds for the models rebuilt from what is stored.

    Args:
        space: as it is stored.
        left: (n,) squared errors of the models that it was fitted to, from stored coefficients; see `subspace.missed`.
        energies: (n,) their squared norms.
    """
    return at_least(space, math.sqrt(left.sum()), math.sqrt(energies.sum()))


def at_least(space, error, norm):
    """The subspace with a certificate that is not under an error, known up to rounding of models of this norm."""
    total, old = total_energy(space), space.certificate
    if not 0 < total < math.inf:
        return space
    dtype = (space.basis if isinstance(space, subspace.LinearSubspace) else space).dtype
    rounding = subspace.STORED_ROUNDING * float(np.finfo(dtype).eps) * norm / math.sqrt(total)
    error = error / math.sqrt(total)
    if max(error, rounding) <= old.bound and error <= old.relative_error + rounding:
        return space
    known = error if error > old.relative_error + rounding else old.relative_error
    certificate = dataclasses.replace(old, relative_error=known, bound=max(old.bound, error + rounding))
    return dataclasses.replace(space, certificate=certificate)


def total_energy(space):
    """Squared norms, about the mean, of the models that the certificate is of, summed."""
    is_linear = isinstance(space, subspace.LinearSubspace)
    return max(one.total_energy for one in ([space.spectrum] if is_linear else space.spectra.values()))
