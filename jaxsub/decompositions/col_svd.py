"""V2 `col-svd` of the released code (CNN): left singular vectors of all models side by side, not centred.

    W_i as d_0 x rest;  [W_1 ... W_N] (d_0, N rest);  U from its SVD;  W_i -> U U^T W_i

For layers with at most `rank` outputs U is square and nothing is compressed: such a fit is flagged `full_rank`. The
original iterates svd_lowrank(q=64, niter=50) in float64, whose limit is the exact basis found here.
"""

import dataclasses

import jax

from jaxsub import subspace
from jaxsub.decompositions import _fit
from jaxsub.linalg import operands

REFERENCE = "toshi2k2/unisub, CNN subspace.py (V2)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Rank of the released script."""

    rank: int = 64  # at most; fewer where the layer has fewer outputs


def fit(stack, options, key):
    """TuckerSubspace with one factor, on the first weight axis; `key` is not used."""
    del key
    size = stack.shape[0]
    cap = min(size, stack.num_models * (stack.num_features // size))
    operands.require_rank(min(options.rank, cap), cap, "the stack")
    rank = min(options.rank, cap)
    with jax.enable_x64(True):
        y, mean = stack.centred("none")
        rows, spectrum = _fit.axis_spectrum(y, 0, _fit.dtype_of(stack, size))
        flags = ("full_rank",) if rank == size else ()
        procedure = subspace.Procedure("col-svd", ("0",), "none", cap, reference=REFERENCE, flags=flags)
        return _fit.axis_subspace(stack, mean, 0, rows[:rank], spectrum, procedure, passes=1)
