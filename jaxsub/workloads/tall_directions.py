"""Centred PCA of very many rows with few columns: s and V only, no U."""

import jax
import numpy as np

from jaxsub.linalg import collectives, orth
from jaxsub.workloads import _data, _peers, tall_pca

REFERENCE = tall_pca.REFERENCE
Options, QUICK, problem = tall_pca.Options, tall_pca.QUICK, tall_pca.problem


def work(options):
    """(operations of half a Gram product, bytes read)."""
    size = options.rows * options.columns
    return size * options.columns, 4 * size


def communication(options):
    """The Gram matrix of the short side; the rows are sharded."""
    return collectives.short_gram(options.columns)


def ours(x, options):
    """A call that computes (None, s (k,), vt (k, D))."""
    with jax.enable_x64(True):
        placed = jax.device_put(x)

    def call():
        with jax.enable_x64(True):
            s, vectors = _data.leading(np.asarray(orth.gram(placed, dtype="float32")), options.rank)
        return None, s, vectors.T

    return call


def peers(x, options):
    """By hand in NumPy; scikit-learn PCA(covariance_eigh)."""

    def by_hand():
        s, vectors = _data.leading(x.T @ x, options.rank)
        return None, s, vectors.T

    found = {"numpy x.T @ x, eigh": by_hand}
    if _peers.sklearn():
        from sklearn.decomposition import PCA

        def covariance():
            fitted = PCA(options.rank, svd_solver="covariance_eigh").fit(x)
            return None, fitted.singular_values_, fitted.components_

        found["scikit-learn PCA(covariance_eigh)"] = covariance
    return found


error = tall_pca.error
