"""Centred PCA of very many rows with few columns: U, s and V."""

import dataclasses

import jax
import numpy as np

from jaxsub.linalg import collectives, svd
from jaxsub.workloads import _data, _peers

REFERENCE = "Gram matrix of the short side (Sirovich 1987)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the matrix."""

    rows: int = 2**20
    columns: int = 256
    rank: int = 32


QUICK = Options(rows=2**15, columns=64)


def problem(options, rng):
    """Float32 rows, the transposed stack of the other workloads, columns centred."""
    x = np.ascontiguousarray(_data.stack(rng, options.columns, options.rows, mean=False).T)
    return x - x.mean(0)


def work(options):
    """(operations, bytes): half a Gram product and the projection; two reads and one write."""
    size = options.rows * options.columns
    return size * (options.columns + 2 * options.rank), 8 * size + 4 * options.rows * options.rank


def communication(options):
    """The Gram matrix of the short side and signs; of x.T, whose long side is sharded."""
    return collectives.gram_svd(options.columns, options.rank)


def ours(x, options):
    """A call that computes (u, s, vt)."""
    placed = jax.device_put(x)

    def call():
        with jax.enable_x64(True):
            found = svd.gram_svd(placed, rank=options.rank)
            return found.u, found.s[: options.rank], found.vt

    return call


def peers(x, options):
    """By hand in torch; scikit-learn PCA(randomized)."""
    rank, found = options.rank, {}
    if _peers.torch():
        import torch

        t = torch.from_numpy(x)

        def by_hand():
            values, vectors = torch.linalg.eigh(t.T @ t)
            s, v = values.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
            return ((t @ v) / s).numpy(), s.numpy(), v.T.numpy()

        found["torch x.T @ x, eigh, x @ v"] = by_hand
    if _peers.sklearn():
        found["scikit-learn PCA(randomized)"] = _peers.randomized_pca(x, rank)
    return found


def error(x, options, result):
    """Sine of the largest angle between the span of V and the exact one."""
    return _data.angle(_data.left_vectors(x.T, options.rank, centre=False), np.asarray(result[2]).T)
