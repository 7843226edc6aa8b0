"""Gram matrices of random vectors, drawn without the vectors. Shared by the null models.

N Gaussian vectors in R^d have the Gram matrix L L^T with L (N, min(N, d)) lower trapezoidal: standard normals under the
diagonal and chi variables with d, d - 1, ... degrees of freedom on it. Cost O(N^2 min(N, d)) for any d.
"""

import numpy as np

from jaxsub import errors


def bartlett(rng, num_vectors, dimension):
    """Coordinates, up to a rotation, of Gaussian vectors: L with L L^T Wishart(I, dimension).

    Args:
        rng: numpy Generator.
        num_vectors: n.
        dimension: d >= 0, degrees of freedom; need not be whole, but is rounded where it is under n.

    Returns:
        (n, min(n, d)) float64, exact in distribution for whole d, also when n > d.

    Source: Bartlett 1933; Muirhead 1982, Theorem 3.2.14.
    """
    if dimension < num_vectors:
        dimension = round(dimension)
    width = min(num_vectors, int(dimension))
    factor = np.tril(rng.standard_normal((num_vectors, width)), -1)
    steps = np.arange(width)
    factor[steps, steps] = np.sqrt(rng.chisquare(dimension - steps))
    return factor


def unit_rows(rows):
    """Rows of (n, d) scaled to length 1; zero rows stay zero."""
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def unit_gram(rng, num_vectors, dimension):
    """Gram matrix of independent uniform unit vectors of R^dimension.

    Args:
        rng: numpy Generator.
        num_vectors: n.
        dimension: d >= 0; see `bartlett`. For d = 0 there is no unit vector and the result is zero.

    Returns:
        (n, n) float64, diagonal exactly 1 for d >= 1, rank min(n, d).
    """
    rows = unit_rows(bartlett(rng, num_vectors, dimension))
    gram = rows @ rows.T
    if rows.shape[1]:
        np.fill_diagonal(gram, 1.0)
    return gram


def unit_frames(rng, num_frames, size, dimension):
    """Coordinates, up to one rotation of all, of independent Haar-random orthonormal frames.

    Args:
        rng: numpy Generator.
        num_frames: n.
        size: p <= dimension vectors a frame.
        dimension: d, whole.

    Returns:
        (p * n, min(n * p, d)) float64; rows i, n + i, 2 n + i, ... are orthonormal.
    """
    frames = bartlett(rng, num_frames * size, dimension).reshape(num_frames, size, -1).swapaxes(0, 1)
    frames = np.ascontiguousarray(frames)  # vector by vector, each of all frames
    for last in range(size):  # Gram-Schmidt within each frame, twice: the second time for rounding
        for before in [*range(last)] * 2:
            frames[last] -= np.einsum("nd,nd->n", frames[before], frames[last])[:, None] * frames[before]
        frames[last] = unit_rows(frames[last])
    return frames.reshape(num_frames * size, -1)


def require_draws(options):
    """Checks the number of draws.

    Raises:
        ConfigError: if it is under 1.
    """
    if options.draws < 1:
        raise errors.ConfigError(f"draws is {options.draws}; a null model needs at least 1")
