"""What null models may know of a layer: a few numbers a model, taken in the one pass over the weights."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Observed:
    """Figures of one layer's N models that the null models keep. All arrays float64.

    Attributes:
        num_features: D.
        shape: shape of one model's weights; for LoRA, of the product.
        norms: (N,) Euclidean norm of each model.
        entry_means: (N,) mean entry of each model; None where it was not taken.
        mean_energy_total: squared norm of the mean model.
        variance_total: sum over coordinates of the variance over models (divided by N).
        variance_squares: sum over coordinates of that variance squared.
        model_singular_values: (N, m) singular values of each model's matrix, zero-padded; None if not a matrix.
        parametrisation: "dense" or "lora".
        lora_ranks: (N,) ranks of the adapters, or None.
        b_overlap: (N, N) squared Frobenius norms of B_i^T B_j, scales folded into B, or None.
        a_width: number of columns of A, or None.
        b_norms: (N,) Frobenius norms of B_i, scales folded in, or None.
        entries: (N, D) entries of the models, rows of norm sqrt(D); only where a few carry much of a model.
        tails: excess kurtosis of the inner product of two models whose entries are permuted.
        deviation_fourths: sum over coordinates and models of (x_id - mean_d)^4; None where it was not taken.
    """

    num_features: int
    shape: tuple
    norms: np.ndarray
    entry_means: np.ndarray | None = None
    mean_energy_total: float | None = None
    variance_total: float | None = None
    variance_squares: float | None = None
    model_singular_values: np.ndarray | None = None
    parametrisation: str = "dense"
    lora_ranks: np.ndarray | None = None
    b_overlap: np.ndarray | None = None
    a_width: int | None = None
    b_norms: np.ndarray | None = None
    deviation_fourths: float | None = None
    entries: np.ndarray | None = None
    tails: float = 0.0
