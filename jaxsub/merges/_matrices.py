"""What the methods for matrices share: singular vectors, orthonormal ones nearest to them, and what is no matrix.

Everything is float64 on the host, a layer at a time. Large float32 matrices are decomposed through their Gram matrix:

    W.T W = V S^2 V.T (float64),  U = W V S^-1        values down to eps32 max(p, q) s_1 are kept

A float64 Gram matrix tells squares apart to n eps64 of the largest, the square of what float32 numbers can mean is
(n eps32)^2: a value that is kept has a relative error of 1.5e-2 / n at most, at the very floor, and 4e-9 at a hundredth
of s_1. It takes two matrices beside W where LAPACK's decomposition takes six, and half of its time. Small ones, and
float64 weights, whose digits a Gram matrix halves, are decomposed as they are.
"""

import numpy as np

from jaxsub import hostmemory, reading, rows, solvers

DIRECT = 512  # shorter side up to which a float32 matrix is decomposed as it is
LIBRARY_BYTES = 2**26
POWERS = 6  # steps to the largest singular value: to a tenth, of matrices of noise too
PIECE_BYTES = 3 * 8 + 4  # of a number of a result: itself, the base's, their sum, and it as stored


def fallback(own, scaling):
    """scaling * mean of the rows, for vectors and kernels of more than two axes: published code does so."""
    return own.combination(np.full(own.num_models, scaling / own.num_models))


def svd(w, most=None, least=0.0):
    """(u (p, k), s (k,), v (q, k)) of a matrix, k the number of singular values that are more than rounding.

    Rounding is max(p, q) eps of the largest value, with the eps of w's dtype. A matrix that has overflown gives NaN:
    the one who writes the result tells.

    Args:
        w: (p, q) float32 or float64.
        most: largest k.
        least: values up to it are rounding as well, of what w is a difference of: see `rounding`.
    """
    w = np.asarray(w)
    eps, most = float(np.finfo(w.dtype).eps), min(w.shape) if most is None else most
    if not np.isfinite(w).all():
        count = min(1, most)
        return np.full((len(w), count), np.nan), np.full(count, np.nan), np.full((w.shape[1], count), np.nan)
    if w.dtype == np.float64 or min(w.shape) <= DIRECT:
        u, s, vt = solvers.svd(w)
        count = min(most, _count(s, max(w.shape) * eps, least))
        return u[:, :count], s[:count], vt[:count].T
    if w.shape[0] < w.shape[1]:
        v, s, u = svd(w.T, most, least)
        return u, s, v
    s, v = _right(w, max(w.shape) * eps, most, least)
    u = np.empty((len(w), len(s)))
    _multiply(w, v, u)
    u /= s
    return u, s, v


def rounding(w):
    """Singular values up to this are rounding in what a matrix w (p, q) is added to or taken from.

    max(p, q) eps of its largest singular value, found by power iteration: from below, to a tenth.
    """
    w = np.asarray(w)
    v = np.random.default_rng(0).standard_normal(w.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # the one who writes the result tells
        for _ in range(POWERS):  # both products normed: squares of small weights would underflow
            u = _normed(w @ _normed(v).astype(w.dtype))
            v = (w.T @ u.astype(w.dtype)).astype(np.float64)
    found = max(w.shape) * float(np.finfo(w.dtype).eps) * float(np.linalg.norm(v))
    return found if np.isfinite(found) else 0.0


def _normed(x):
    x = x.astype(np.float64)
    norm = np.linalg.norm(x)
    return x / norm if 0 < norm < np.inf else np.zeros_like(x)


class Sides:
    """Singular vectors of several matrices (p, q) side by side: at most `most` of them.

    Attributes:
        left, right: (p, most) and (q, most) float64; the first `count` columns are filled.
        count: vectors so far.
    """

    def __init__(self, shape, most):
        self.left, self.right = (np.empty((size, most)) for size in shape)
        self.values, self.count = [], 0

    def add(self, u, s, v):
        """Adds what `svd` gave."""
        at = slice(self.count, self.count + len(s))
        self.left[:, at], self.right[:, at] = u, v
        self.values.append(s)
        self.count += len(s)

    def orthonormal(self, dtype):
        """(u (p, k), s (k,), v (q, k)): each side made orthonormal, in place of what was added; s as it was added."""
        eps = float(np.finfo(dtype).eps)
        u, v = (_orthonormal(side[:, : self.count], eps) for side in (self.left, self.right))
        return u, np.concatenate([np.zeros(0), *self.values]), v


def _orthonormal(x, eps):
    """Nearest matrix with orthonormal columns to x (p, k) in place of it; rounding is max(p, k) eps.

    Directions that are rounding are left out: the rank of the result may be less than k, and is where k > p.
    """
    if not x.size or not np.isfinite(x).all():
        return x
    floor = max(x.shape) * eps
    if x.shape[1] <= DIRECT or eps < np.finfo(np.float32).eps:
        u, s, vt = solvers.svd(x)
        count = _count(s, floor)
        x[:] = u[:, :count] @ vt[:count]
        return x
    s, v = _right(x, floor)
    v /= np.sqrt(s)
    turn = v @ v.T
    del v
    _multiply(x, turn, x)
    return x


def held(shape, itemsize, beside, sides=0):
    """Bytes of a layer that a method holds at most.

    Args:
        shape: (p, q) of a layer.
        itemsize: of its numbers, 4 or 8.
        beside: layers in their own dtype while `svd` works.
        sides: pairs of Sides while it does.
    """
    (o, i), small = shape, min(shape)
    direct = itemsize == 8 or small <= DIRECT
    solved = 5 * o * i + 4 * small**2 if direct else small**2 + o * i  # LAPACK's; a Gram matrix, then both sides
    written = max(beside * itemsize, 8)  # some formats have a layer whole before it is written
    return o * i * written + 8 * (solved + sides * small * (o + i)) + library(i)


def library(columns):
    """Bytes that BLAS and LAPACK keep for themselves, and of the pieces of a result of so many columns."""
    return LIBRARY_BYTES + reading.threads() * rows.product_width(columns) * PIECE_BYTES


def _right(w, floor, most=None, least=0.0):
    """(s (k,), v (q, k)) of w (p, q), through w.T w; k singular values over floor s_1 and `least`, `most` at most."""

    def gram():
        total = np.zeros((w.shape[1],) * 2, order="F")
        solvers.add_square(total, w)
        return total

    hostmemory.trim()  # what the caller has let go of
    values, v = solvers.descending(gram, most)
    hostmemory.trim()
    s = np.sqrt(np.maximum(values, 0.0))
    count = _count(s, floor, least)
    return s[:count], v[:, :count]


def _count(s, floor, least=0.0):
    return int(np.sum(s > max(floor * s[0], least))) if s.size else 0


def _multiply(w, right, out):
    """out = w @ right in float64, a few rows at a time; `out` may be `w`."""
    for at in solvers.panels(*w.shape):
        out[at] = np.asarray(w[at], np.float64) @ right
