"""V5 `flat-pca` of the released code (ImageClassification, Diffusion): PCA of each adapter tensor, flattened.

The same as `gram` on the tensors of a LoRA factor (view `lora_factors`), with the components counted as there. Where
the original is wrong it is so around the decomposition: alphas ignored, a bfloat16 basis that is not orthonormal, a
reshape that holds for rank 1 only. None of these is reproduced.
"""

import dataclasses

from jaxsub.decompositions import _fit

BY_ROWS = True  # components of the models: their features may be shared by devices
CUTS_RANK = True
REFERENCE = "toshi2k2/unisub, ImageClassification and Diffusion; Gram trick"


@dataclasses.dataclass(frozen=True)
class Options:
    """How many components."""

    rank: int = 16
    energy: float = 0.9  # used where rank is 0


def fit(stack, options, key):
    """LinearSubspace of a DenseStack; deterministic, `key` is not used. A rank over N - 1 or D is cut to that."""
    del key
    cap = _fit.row_cap(stack)
    return _fit.fit_rows("flat-pca", REFERENCE, stack, rank=min(options.rank, cap), energy=options.energy)
