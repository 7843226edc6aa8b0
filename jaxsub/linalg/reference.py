"""Slow, readable NumPy float64 twins of the kernels and of everything computed from a Gram matrix; for tests."""

import numpy as np


def dense_sums(x):
    """The fields of `gram.DenseSums` for rows x (N, D), in order."""
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    y = x - mean
    variances = np.square(y).mean(0)
    return y @ y.T, y @ mean, mean @ mean, x.sum(1), (x**4).sum(1), np.square(variances).sum(), (y**4).sum()


def lora_gram(a, b, scales):
    """Inner products of scale * B @ A, formed in full; a (N, r, i), b (N, o, r)."""
    w = np.stack([s * bb @ aa for s, aa, bb in zip(scales, a, b, strict=True)]).reshape(len(a), -1)
    return w @ w.T


def mode_energies(x, axis, *, centre=True):
    """Squared singular values of the mode unfolding of a stack x (N, *shape), weight axis `axis`."""
    x = np.asarray(x, np.float64)
    y = x - x.mean(0) if centre else x
    unfolded = np.moveaxis(y, axis + 1, 0).reshape(y.shape[axis + 1], -1)
    return np.square(np.linalg.svd(unfolded, compute_uv=False))


def leave_one_out(x, k):
    """LOO(k): error of each model in the mean and first k components of the others, over that with the mean alone."""
    x = np.asarray(x, np.float64)
    error = base = 0.0
    for i in range(len(x)):
        rest = np.delete(x, i, 0)
        mean = rest.mean(0)
        vt = np.linalg.svd(rest - mean, full_matrices=False)[2][:k]
        d = x[i] - mean
        base += d @ d
        error += d @ d - np.square(vt @ d).sum()
    return error / base
