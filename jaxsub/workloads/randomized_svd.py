"""Rank-32 randomized SVD of a large matrix, both sides long."""

import dataclasses

import jax
import numpy as np

from jaxsub.linalg import collectives, svd
from jaxsub.workloads import _data, _peers

REFERENCE = "Halko, Martinsson, Tropp 2011 (E20); Musco and Musco 2015"
OVERSAMPLE = 16  # of the peers, as their documentation advises


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the matrix and effort: six passes, as torch.svd_lowrank(q=48, niter=2).

    The Krylov space of 32 test vectors errs less than the power iterations of 48 (tests/linalg/test_triad.py).
    """

    rows: int = 4096
    columns: int = 16384
    rank: int = 32
    oversample: int = 0
    passes: int = 6
    range_finder: str = "krylov"


QUICK = Options(rows=1024, columns=2048)


def problem(options, rng):
    """Float32 matrix with spectrum 0.9^i over noise."""
    return _data.stack(rng, options.rows, options.columns, mean=False)


def work(options):
    """(operations, bytes): `passes` products with rank + oversample vectors, each a read."""
    size = options.rows * options.columns
    return 2 * size * (options.rank + options.oversample) * options.passes, 4 * size * options.passes


def communication(options):
    """Of every second pass the product of the short side, between passes two small Gram matrices; columns sharded."""
    size = options.rank + options.oversample
    return collectives.randomized_svd(options.rows, options.rank, size, options.passes, options.range_finder)


def ours(x, options):
    """A call that computes (u, s, vt)."""
    placed, key = jax.device_put(x), jax.random.key(0)

    def call():
        with jax.enable_x64(True):
            found = svd.randomized_svd(
                placed,
                key,
                rank=options.rank,
                oversample=options.oversample,
                passes=options.passes,
                range_finder=options.range_finder,
            )
            return found.u, found.s, found.vt

    return call


def peers(x, options):
    """The textbook in JAX, torch.svd_lowrank and scikit-learn's randomized_svd, two power iterations each.

    scikit-learn would leave two iterations unnormalised, which is faster and loses a hundred times the accuracy here.
    """
    found = {"jax, as first written": _first_written(x, options)}
    if _peers.torch():
        import torch

        t = torch.from_numpy(x)

        def lowrank():
            u, s, v = torch.svd_lowrank(t, q=options.rank + OVERSAMPLE, niter=2)
            return u[:, : options.rank].numpy(), s[: options.rank].numpy(), v[:, : options.rank].T.numpy()

        found["torch.svd_lowrank"] = lowrank
    if _peers.sklearn():
        from sklearn.utils.extmath import randomized_svd

        more = {"n_oversamples": OVERSAMPLE, "n_iter": 2, "power_iteration_normalizer": "LU", "random_state": 0}
        found["scikit-learn randomized_svd"] = lambda: randomized_svd(x, options.rank, **more)
    return found


def _first_written(x, options):
    """Two power iterations with `jnp.linalg`, every line as a textbook has it."""
    jnp, size, placed, key = jax.numpy, options.rank + OVERSAMPLE, jax.device_put(x), jax.random.key(0)

    @jax.jit
    def call(x):
        q = jnp.linalg.qr(x @ jax.random.normal(key, (x.shape[1], size)))[0]
        for _ in range(options.passes // 2 - 1):
            q = jnp.linalg.qr(x @ jnp.linalg.qr(x.T @ q)[0])[0]
        u, s, vt = jnp.linalg.svd(q.T @ x, full_matrices=False)
        return (q @ u)[:, : options.rank], s[: options.rank], vt[: options.rank]

    return lambda: call(placed)


def error(x, options, result):
    """Relative Frobenius error of the rank-32 approximation over that of the best one, minus 1."""
    u, s, vt = (np.asarray(r, np.float64) for r in result)
    total = float(np.square(x, dtype=np.float64).sum())
    captured = np.square(np.linalg.norm(_data.project_rows(x, vt)))
    best = np.sort(np.linalg.eigvalsh(_data.gram(x, centre=False)))[::-1][: options.rank].sum()
    return float(np.sqrt(max(total - captured, 0.0) / (total - best)) - 1)
