"""Centred PCA of a few wide models with its basis: singular values, coefficients and directions."""

import jax
import numpy as np

from jaxsub import placement
from jaxsub.linalg import gram
from jaxsub.workloads import _data, _peers, gram_pca

REFERENCE = gram_pca.REFERENCE
Options, QUICK, problem = gram_pca.Options, gram_pca.QUICK, gram_pca.problem


def work(options):
    """(operations, bytes): half a Gram product and the directions; two reads and one write."""
    flops, num_bytes = gram_pca.work(options)
    size = options.models * options.features
    return flops + 2 * options.rank * size, 2 * num_bytes + 4 * options.rank * options.features


def communication(options):
    """As `gram_pca`: the directions stay where their features are."""
    return gram_pca.communication(options)


def ours(x, options):
    """A call that computes (s (k,), coefficients (N, k), directions (k, D))."""
    mesh = placement.make_mesh()
    placed = _data.place(x, mesh)

    def call():
        s, vectors = gram_pca.leading(placed, mesh, options.rank)
        with jax.enable_x64(True):
            return s, vectors * s, gram.combinations(placed, (vectors / s).T, mesh=mesh, dtype="float32")

    return call


def peers(x, options):
    """By hand in NumPy; scikit-learn PCA(randomized)."""
    rank = options.rank

    def by_hand():
        y = x - x.mean(0)
        s, vectors = _data.leading(y @ y.T, rank)
        return s, vectors * s, (vectors / s).T @ y

    found = {"numpy centre, x @ x.T, eigh, u.T @ x": by_hand}
    if _peers.sklearn():
        randomized = _peers.randomized_pca(x, rank)

        def by_sklearn():
            coefficients, s, directions = randomized()
            return s, coefficients, directions

        found["scikit-learn PCA(randomized)"] = by_sklearn
    return found


def error(x, options, result):
    """Largest of: the sine of the angle of the coefficients' span, and how far the directions are from orthonormal."""
    basis = np.asarray(result[2])
    loose = np.abs(_data.gram(basis, centre=False) - np.eye(len(basis))).max()
    return max(gram_pca.error(x, options, result), float(loose))
