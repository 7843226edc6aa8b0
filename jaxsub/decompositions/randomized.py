"""Randomized principal components of the models: a few passes over the weights, no N x N problem. For many models."""

import dataclasses

import jax
import numpy as np

from jaxsub import subspace
from jaxsub.decompositions import _fit
from jaxsub.linalg import operands, svd

BY_ROWS = True  # components of the models: their features may be shared by devices
REFERENCE = "Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1 (E20)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Rank and effort."""

    rank: int = 32
    oversample: int = 16  # test vectors beyond the rank
    passes: int = 4  # products of the stack with the test vectors
    test: str = "gaussian"  # gaussian, sign, sparse
    range_finder: str = "power"  # power, krylov


def fit(stack, options, key):
    """LinearSubspace of a DenseStack.

    Args:
        stack: DenseStack.
        options: Options.
        key: typed PRNG key of the layer.
    """
    cap = _fit.row_cap(stack)
    operands.require_rank(options.rank, cap, f"a centred stack of {stack.num_models} models")
    with jax.enable_x64(True):
        y, mean = stack.rows()
        found = svd.of_shared(
            svd.randomized_svd,
            y,
            key,
            rank=options.rank,
            oversample=options.oversample,
            passes=options.passes,
            test=options.test,
            range_finder=options.range_finder,
        )
        total, tail = float(found.energy), float(found.tail)
        s = np.asarray(found.s, np.float64)
        # What the kernel takes for rounding, in the dtype that it computes in; it returns 0 for values under this.
        blocks = options.passes // 2 if options.range_finder == "krylov" else 1
        size = min(options.rank + options.oversample, *y.shape) * blocks
        floor = 4 * size * float(np.finfo(found.s.dtype).eps) * float(s[0])
        error = float(np.sqrt(max(tail, 0.0) / total)) if total > 0 else 0.0
        # A basis that is a little off keeps its energies a little low: the tail is the error all the same.
        certificate = subspace.Certificate(error, float(found.bound), exact=False, passes=options.passes + 1)
        procedure = subspace.Procedure("randomized", ("models",), "models", cap, reference=REFERENCE)
        spectrum = subspace.Spectrum(s, total, floor)
        return subspace.LinearSubspace(mean, found.vt, spectrum, stack.shape, procedure, certificate)
