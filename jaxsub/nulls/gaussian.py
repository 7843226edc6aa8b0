"""Independent directions: every model keeps its norm, its direction is uniform on the sphere.

Keeps the norms only. What beats it may still be due to unequal entries within a model, to singular values that fall
fast (`strength`), or to coordinates of unequal variance (`shuffle`).
"""

import dataclasses

import numpy as np

from jaxsub.nulls import _draw

REFERENCE = "Muirhead 1982, Aspects of Multivariate Statistical Theory, section 3.2 (Wishart by Bartlett)"


@dataclasses.dataclass(frozen=True)
class Options:
    """How many draws, and how they are made."""

    draws: int = 20  # S


def applies(observed):
    """None: the norms of any layer can be kept."""
    del observed


def sample(observed, options, rng):
    """Gram matrices of independent Gaussian directions with the models' norms; exact.

    Args:
        observed: `Observed`; norms and num_features are used.
        options: `Options`.
        rng: numpy Generator.

    Yields:
        S uncentred (N, N) float64 Gram matrices.
    """
    _draw.require_draws(options)
    norms = np.asarray(observed.norms, np.float64)
    scale = norms[:, None] * norms
    for _ in range(options.draws):
        yield scale * _draw.unit_gram(rng, len(norms), observed.num_features)
