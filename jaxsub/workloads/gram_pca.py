"""Centred PCA of a few wide models: singular values and coefficients through the Gram matrix."""

import dataclasses

import jax
import numpy as np

from jaxsub import placement, spectrum
from jaxsub.linalg import collectives, gram
from jaxsub.workloads import _data, _peers

REFERENCE = "method of snapshots (Sirovich 1987)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the stack."""

    models: int = 256
    features: int = 2**20
    rank: int = 32


QUICK = Options(models=64, features=2**16)


def problem(options, rng):
    """Rows with a known decaying spectrum above a floor and a mean 30 times the first direction's share."""
    return _data.stack(rng, options.models, options.features)


def work(options):
    """(floating-point operations of the symmetric half, bytes read)."""
    return options.models**2 * options.features, 4 * options.models * options.features


def communication(options):
    """One all-reduce of the Gram matrix and moments, whatever the features."""
    return collectives.dense_gram(options.models)


def ours(x, options):
    """A call that computes (s (k,), coefficients (N, k))."""
    mesh = placement.make_mesh()
    placed = _data.place(x, mesh)

    def call():
        s, vectors = leading(placed, mesh, options.rank)
        return s, vectors * s

    return call


def leading(placed, mesh, rank):
    """(s (k,), vectors (N, k)) of the rows minus their mean."""
    none = np.zeros((0, len(placed)), np.float32)
    with jax.enable_x64(True):
        sums, _ = gram.dense_gram(placed, none, mesh=mesh, dtype="float32")
        return _data.leading(spectrum.centred(np.asarray(sums.gram)), rank)


def peers(x, options):
    """Name -> call with the same results, for the libraries that are installed."""
    rank = options.rank

    def numpy_snapshots():
        y = x - x.mean(0)
        s, vectors = _data.leading(y @ y.T, rank)
        return s, vectors * s

    found = {"numpy centre, x @ x.T, eigh": numpy_snapshots}
    if _peers.sklearn():
        randomized = _peers.randomized_pca(x, rank)
        found["scikit-learn PCA(randomized)"] = lambda: randomized()[1::-1]
    if _peers.torch():
        import torch

        t = torch.from_numpy(x)

        def lowrank():
            u, s, _ = torch.pca_lowrank(t, q=rank + 16)
            return s[:rank].numpy(), (u * s)[:, :rank].numpy()

        found["torch.pca_lowrank"] = lowrank
    return found


def error(x, options, result):
    """Sine of the largest angle between the coefficients' span and the exact one, from float64."""
    return _data.angle(_data.left_vectors(x, options.rank), result[1])
