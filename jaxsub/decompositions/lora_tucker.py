"""V4 `lora-tucker` of the released code (NLU hosvd.py): one LoRA factor of all models, not centred.

order 2: left singular vectors of the factors side by side, (d, N r). order 3: Tucker of the (N, d, r) stack with ranks
(N, K, r) by HOOI, of which the factor on the long axis is used; at those ranks it spans the same directions.
"""

import dataclasses

import jax

from jaxsub import errors, subspace
from jaxsub.decompositions import _fit
from jaxsub.linalg import operands, tucker

REFERENCE = "toshi2k2/unisub, NLU hosvd.py (V4), tensorly.decomposition.tucker(init='svd', tol=1e-6)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Rank and order of the released code."""

    rank: int = 32  # K, at most; fewer where the factors have fewer columns or rows
    order: int = 2  # 2 or 3


def fit(stack, options, key):
    """TuckerSubspace with one factor, on the longer weight axis of a stack of LoRA factors; `key` is not used."""
    del key
    if options.order not in (2, 3):
        raise errors.ConfigError(f"order={options.order}: 2 or 3")
    axis, cap = _fit.long_axis(stack)
    rank = min(options.rank, cap)
    operands.require_rank(rank, cap, "the stack")
    with jax.enable_x64(True):
        y, mean = stack.centred("none")
        dtype = _fit.dtype_of(stack, stack.shape[axis])
        rows, spectrum = _fit.axis_spectrum(y, axis, dtype)
        factor, passes = rows[:rank], 1
        if options.order == 3:
            ranks = [None, *stack.shape]  # all N of the models axis: as good as free
            ranks[axis + 1] = rank
            found = tucker.hooi(y, ranks=tuple(ranks), dtype=dtype, certify="norms")
            factor, passes = _fit.alone(found.factors[axis + 1]), int(found.num_passes)
        procedure = subspace.Procedure("lora-tucker", (str(axis),), "none", cap, reference=REFERENCE)
        return _fit.axis_subspace(stack, mean, axis, factor, spectrum, procedure, passes=passes)
