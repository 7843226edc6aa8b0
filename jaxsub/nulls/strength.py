"""Strength matched: every model keeps its singular values, its singular vectors on both sides are random (Haar).

Tells shared directions from energy that is merely concentrated. The leading singular values of each model are drawn
literally, sum_a s_a u_a v_a^T with random orthonormal frames, of which only the Gram matrices are needed:
<X_i, X_j> = sum_ab s_ia s_jb <u_ia, u_jb> <v_ia, v_jb>. The other singular values are lumped into one Gaussian
direction a model, orthogonal to the model's leading part. Norms are exact, and so are the mean (0) and variance
|X_i|^2 |X_j|^2 / (o i) of every inner product; fourth moments are those of the explicit part only. Literal in
distribution when all nonzero singular values are explicit, that is for N * rank <= `frames`.

How far it holds: one explicit singular value a model is enough for shares and held-out errors, which agree with literal
draws within the noise of 300 draws (24 rank-4 models of 15 x 20; also 24 full-rank models of 6 x 3). Figures that
depend on fourth moments of single inner products, such as the largest cosine of two models, need explicit frames.

Left out where the pass keeps no singular values (`layers.Options.strength_width`; shorter side first and in several
blocks): there even rank-one models have the gains of `gaussian` to a hundredth of the verdict's margin.
"""

import dataclasses

import numpy as np

from jaxsub import solvers
from jaxsub.nulls import _draw

REFERENCE = "Haar frames by Gram-Schmidt of Gaussians: Stewart 1980; Gram matrices by Muirhead 1982, section 3.2"


@dataclasses.dataclass(frozen=True)
class Options:
    """How many draws, and how they are made."""

    draws: int = 20  # S
    frames: int = 500  # singular vectors drawn explicitly on each side, over all models (at least one a model)


def applies(observed):
    """Why the null cannot be drawn for this layer, or None."""
    if len(observed.shape) != 2:
        return f"weights of shape {tuple(observed.shape)} have no singular values"
    return "the models' singular values are not known" if observed.model_singular_values is None else None


def sample(observed, options, rng):
    """Gram matrices of models with their own singular values and random singular vectors.

    Args:
        observed: `Observed`; model_singular_values and shape are used.
        options: `Options`.
        rng: numpy Generator.

    Yields:
        S uncentred (N, N) float64 Gram matrices.
    """
    _draw.require_draws(options)
    values = -np.sort(-np.abs(np.asarray(observed.model_singular_values, np.float64)), axis=1)
    num_models = len(values)
    norms = np.sqrt((values**2).sum(1))
    share = values / np.where(norms > 0, norms, 1.0)[:, None]  # unit models: one giant must not swamp the others
    used = int((share > 0).sum(1).max(initial=0))
    explicit = min(max(1, options.frames // max(num_models, 1)), *observed.shape, max(used, 1))
    leading, rest = share[:, :explicit], np.sqrt((share[:, explicit:] ** 2).sum(1))
    scale = norms[:, None] * norms
    for _ in range(options.draws):
        gram = _leading_gram(rng, leading, observed.shape)
        if rest.any():
            gram = _with_rest(rng, gram, rest, observed.shape[0] * observed.shape[1])
        yield scale * gram


def _leading_gram(rng, leading, shape):
    """Gram matrix (N, N) of sum_a leading_ia u_ia v_ia^T with Haar frames u, v on the two sides."""
    num_models, size = leading.shape
    left, right = (_draw.unit_frames(rng, num_models, size, dimension) for dimension in shape)
    strength = leading.T.reshape(-1, 1)
    product = (left * strength) @ left.T
    product *= right @ (right * strength).T
    return product.reshape(size, num_models, size, num_models).sum((0, 2))


def _with_rest(rng, gram, rest, dimension):
    """`gram` of models in R^dimension, each plus a random vector of length `rest` orthogonal to the model itself."""
    values, vectors = solvers.eigh(gram)
    width = min(len(gram), dimension)
    models = (vectors * np.sqrt(np.maximum(values, 0.0)))[:, -width:]  # rows: coordinates within the models' span
    inside = rng.standard_normal(models.shape)
    unit = _draw.unit_rows(models)
    inside -= np.einsum("nd,nd->n", inside, unit)[:, None] * unit
    outside = _draw.bartlett(rng, len(gram), dimension - width)
    length = np.sqrt((inside**2).sum(1) + (outside**2).sum(1))
    factor = np.divide(rest, length, out=np.zeros_like(rest), where=length > 0)[:, None]
    models, outside = models + factor * inside, factor * outside
    return models @ models.T + outside @ outside.T
