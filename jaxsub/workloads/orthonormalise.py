"""Orthonormal columns of a tall matrix."""

import dataclasses

import jax
import numpy as np

from jaxsub.linalg import collectives, orth
from jaxsub.workloads import _data, _peers

REFERENCE = "CholeskyQR2: Yamamoto et al. 2015"


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the matrix."""

    rows: int = 2**20
    columns: int = 64


QUICK = Options(rows=2**16, columns=32)


def problem(options, rng):
    """Float32 columns of condition number about 1e3."""
    x = rng.standard_normal((options.rows, options.columns), dtype=np.float32)
    return x * np.logspace(0, -3, options.columns, dtype=np.float32)


def work(options):
    """(operations, bytes) of two rounds: a half Gram product and a product with a triangle each."""
    return 6 * options.rows * options.columns**2, 4 * 4 * options.rows * options.columns


def communication(options):
    """Two Gram matrices of the columns; the rows are sharded."""
    return collectives.cholesky_qr2(options.columns)


def ours(x, options):
    """A call that computes (q, r)."""
    placed = jax.device_put(x)

    def call():
        with jax.enable_x64(True):
            return orth.cholesky_qr2(placed)

    return call


def peers(x, options):
    """torch.linalg.qr and numpy.linalg.qr."""
    found = {"numpy.linalg.qr": lambda: np.linalg.qr(x)}
    if _peers.torch():
        import torch

        t = torch.from_numpy(x)
        found["torch.linalg.qr"] = lambda: tuple(torch.linalg.qr(t))
    return found


def error(x, options, result):
    """Largest entry of Q^T Q - I."""
    q = np.asarray(result[0])
    return float(np.abs(_data.gram(q.T, centre=False) - np.eye(q.shape[1])).max())
