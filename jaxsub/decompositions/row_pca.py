"""V1 `row-pca` of the released code (ViT, GPT-2, LLaMA): rows of all models are samples of d_1 features.

    X_i = W_i - mean;  all X_i one above the other, (N d_0, d_1);  V_k from its PCA;  codes X_i V_k

The released code refits with int(0.9 k / energy at k) components where 300 do not reach 0.9, and reports that number as
if it had reached it. With `faithful` the same count is kept, never fewer than 300 where there are as many; by default
the count is the fewest that reach the energy. Both say whether they do.

A narrow last axis caps the rank by construction: a stack of d x 16 factors has 16 components and no more (the released
16-component knee of Mistral-7B). Such a fit is flagged `narrow_axis`.
"""

import dataclasses

import jax
import numpy as np

from jaxsub import errors, subspace
from jaxsub.decompositions import _fit
from jaxsub.linalg import operands

REFERENCE = "toshi2k2/unisub, VIT, GPT2 and LLaMA run_pca.py (V1)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Rank, cap and target of the released scripts."""

    rank: int = 0  # 0: as many as `energy` asks for
    energy: float = 0.9
    cap: int = 300  # n_components of the released scripts; 0: none
    faithful: bool = False


def fit(stack, options, key):
    """TuckerSubspace with one factor, on the last weight axis; `key` is not used."""
    del key
    if len(stack.shape) != 2:
        raise errors.ConfigError(f"row-pca takes matrices, not weights of shape {tuple(stack.shape)}")
    samples, size = stack.num_models * stack.shape[0], stack.shape[1]
    cap = min(options.cap or size, samples, size)
    with jax.enable_x64(True):
        y, mean = stack.centred()
        rows, spectrum = _fit.axis_spectrum(y, 1, _fit.dtype_of(stack, size))
        rank, reached = _rank(spectrum, options, cap, samples)
        flags = ("narrow_axis",) if 4 * size <= stack.shape[0] else ()
        procedure = subspace.Procedure(
            "row-pca", ("1",), "models", cap, reached, options.faithful, flags=flags, reference=REFERENCE
        )
        return _fit.axis_subspace(stack, mean, 1, rows[:rank], spectrum, procedure, passes=2)


def _rank(spectrum, options, cap, samples):
    if options.rank:
        operands.require_rank(options.rank, cap, "the stack")
        return options.rank, True
    needed = spectrum.rank_of(options.energy)
    if not options.faithful:
        return (needed, True) if needed is not None and needed <= cap else (cap, False)
    held = float(np.sum(spectrum.shares[:cap]))
    if held >= options.energy or not held:
        return cap, bool(held)
    rank = min(int(options.energy * cap / held), samples)  # never over the features: k of d hold at least k / d
    return rank, float(np.sum(spectrum.shares[:rank])) >= options.energy
