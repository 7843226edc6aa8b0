"""Matrices of known spectrum for benchmarks, where they lie on devices, and float64 oracles."""

import jax
import numpy as np

RANK, DECAY, NOISE = 64, 0.9, 1e-3


def stack(rng, rows, columns, *, mean=True):
    """Float32 (rows, columns): 0.9^i for 64 directions over noise of 1e-3, and a mean 30 times the first's share."""
    rank = min(RANK, rows, columns)
    left = np.linalg.qr(rng.standard_normal((rows, rank)))[0] * DECAY ** np.arange(rank)
    x = np.empty((rows, columns), np.float32)
    for start in range(0, columns, 2**16):  # in pieces: no float64 copy of the whole
        part = slice(start, min(start + 2**16, columns))
        width = part.stop - part.start
        right = rng.standard_normal((rank, width), dtype=np.float32) / np.sqrt(np.float32(columns))
        x[:, part] = left.astype(np.float32) @ right
        x[:, part] += np.float32(NOISE / np.sqrt(columns)) * rng.standard_normal((rows, width), dtype=np.float32)
        if mean:
            x[:, part] += np.float32(30 / np.sqrt(rows * columns)) * rng.standard_normal(width, dtype=np.float32)
    return x


def place(x, mesh):
    """`x` on the mesh, its last axis sharded over the features."""
    spec = jax.sharding.PartitionSpec(*[None] * (x.ndim - 1), "features")
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


def leading(gram, rank):
    """(s (k,), vectors (N, k)): leading singular values and left vectors of rows with this Gram matrix."""
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(np.maximum(values[::-1][:rank], 0.0)), vectors[:, ::-1][:, :rank]


def gram(x, *, centre=True):
    """(N, N) float64 Gram matrix of the rows, made in pieces."""
    mean = x.mean(0, dtype=np.float64) if centre else np.zeros(x.shape[1])
    total = np.zeros((len(x), len(x)))
    for start in range(0, x.shape[1], 2**16):
        y = x[:, start : start + 2**16] - mean[start : start + 2**16]
        total += y @ y.T
    return total


def left_vectors(x, rank, *, centre=True):
    """(N, k) leading left singular vectors in float64."""
    return leading(gram(x, centre=centre), rank)[1]


def angle(exact, found):
    """Sine of the largest principal angle between the column spans of two (n, k) matrices."""
    found = np.linalg.qr(np.asarray(found, np.float64))[0]
    return float(np.linalg.norm(found - exact @ (exact.T @ found), 2))


def project_rows(x, basis):
    """x (N, D) times the rows of basis (k, D), float64, in pieces: (N, k)."""
    pieces = range(0, x.shape[1], 2**14)
    return sum(x[:, i : i + 2**14].astype(np.float64) @ basis[:, i : i + 2**14].T for i in pieces)


def tensor(rng, shape, ranks):
    """Float32 tensor of twice the ranks (where an axis has as many), decaying along each axis, over noise of 1e-3."""
    core_shape = [min(2 * r, d) for r, d in zip(ranks, shape, strict=True)]
    x = rng.standard_normal(core_shape).astype(np.float32)
    for axis, (size, rank) in enumerate(zip(shape, core_shape, strict=True)):
        factor = np.linalg.qr(rng.standard_normal((size, rank)))[0] * DECAY ** np.arange(rank)
        x = np.moveaxis(np.tensordot(factor.astype(np.float32), x, (1, axis)), 0, axis)
    x = np.ascontiguousarray(x)
    scale = np.float32(NOISE * np.linalg.norm(x) / np.sqrt(x.size))
    return x + scale * rng.standard_normal(shape, dtype=np.float32)


def tucker_work(shape, ranks):
    """Operations of an ST-HOSVD in order of the axes: half Gram products, and the products that shrink."""
    sizes, total = list(shape), 0
    for axis, rank in enumerate(ranks):
        rest = int(np.prod(sizes)) // sizes[axis]
        total += sizes[axis] ** 2 * rest + 2 * rank * sizes[axis] * rest * (rank < sizes[axis])
        sizes[axis] = rank
    return total


def tucker_error(x, factors):
    """Relative error of x projected on the rows (k, d) of orthonormal factors, float64."""
    core = x.astype(np.float64)
    for axis, factor in enumerate(factors):
        if factor is not None:
            core = np.moveaxis(np.tensordot(np.asarray(factor, np.float64), core, (1, axis)), 0, axis)
    total = np.square(x, dtype=np.float64).sum()
    return float(np.sqrt(max(total - np.square(core).sum(), 0.0) / total))


def best_tucker_error(x, ranks):
    """Relative error of a float64 ST-HOSVD in order of the axes."""
    core, total = x.astype(np.float64), np.square(x, dtype=np.float64).sum()
    for axis, rank in enumerate(ranks):
        unfolded = np.moveaxis(core, axis, 0).reshape(core.shape[axis], -1)
        factor = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank].T
        core = np.moveaxis(np.tensordot(factor, core, (1, axis)), 0, axis)
    return float(np.sqrt(max(total - np.square(core).sum(), 0.0) / total))
