"""Centred PCA of a few wide models with its basis: singular values, coefficients and directions."""

import jax
import numpy as np

from jaxsub import placement, spectrum
from jaxsub.linalg import gram
from jaxsub.workloads import _peers, gram_pca

REFERENCE = gram_pca.REFERENCE
Options, QUICK, problem = gram_pca.Options, gram_pca.QUICK, gram_pca.problem


def work(options):
    """(operations, bytes): half a Gram product and the directions; two reads and one write."""
    flops, num_bytes = gram_pca.work(options)
    size = options.models * options.features
    return flops + 2 * options.rank * size, 2 * num_bytes + 4 * options.rank * options.features


def ours(x, options):
    """A call that computes (s (k,), coefficients (N, k), directions (k, D))."""
    mesh = placement.make_mesh()
    with jax.enable_x64(True):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "features")))
    none = np.zeros((0, len(x)), np.float32)

    def call():
        with jax.enable_x64(True):
            sums, _ = gram.dense_gram(placed, none, mesh=mesh, dtype="float32")
            values, vectors = np.linalg.eigh(spectrum.centred(np.asarray(sums.gram)))
            s = np.sqrt(np.maximum(values[::-1][: options.rank], 0.0))
            leading = vectors[:, ::-1][:, : options.rank]
            return s, leading * s, gram.combinations(placed, (leading / s).T, mesh=mesh, dtype="float32")

    return call


def peers(x, options):
    """By hand in NumPy; scikit-learn PCA(randomized)."""
    rank = options.rank

    def by_hand():
        y = x - x.mean(0)
        values, vectors = np.linalg.eigh(y @ y.T)
        s, leading = np.sqrt(np.maximum(values[::-1][:rank], 0.0)), vectors[:, ::-1][:, :rank]
        return s, leading * s, (leading / s).T @ y

    found = {"numpy centre, x @ x.T, eigh, u.T @ x": by_hand}
    if _peers.sklearn():
        from sklearn.decomposition import PCA

        def randomized():
            fitted = PCA(rank, svd_solver="randomized", random_state=0)
            coefficients = fitted.fit_transform(x)
            return fitted.singular_values_, coefficients, fitted.components_

        found["scikit-learn PCA(randomized)"] = randomized
    return found


def error(x, options, result):
    """Largest of: the sine of the angle of the coefficients' span, and how far the directions are from orthonormal."""
    basis = np.asarray(result[2])
    pieces = [basis[:, i : i + 65536].astype(np.float64) for i in range(0, basis.shape[1], 65536)]
    loose = np.abs(sum(p @ p.T for p in pieces) - np.eye(len(basis))).max()
    return max(gram_pca.error(x, options, result), float(loose))
