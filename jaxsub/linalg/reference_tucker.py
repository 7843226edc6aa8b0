"""NumPy float64 twins of the Tucker kernels, through explicit unfoldings and full SVDs; for tests."""

import itertools

import numpy as np


def unfold(x, axis):
    """(d_axis, rest), the other axes in C order."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def fold(matrix, axis, shape):
    """Undoes `unfold`."""
    rest = [s for a, s in enumerate(shape) if a != axis % len(shape)]
    return np.moveaxis(np.reshape(matrix, (shape[axis], *rest)), 0, axis)


def mode_product(x, factor, axis):
    """X x_axis F by the definition: fold(F @ X_(axis))."""
    shape = [factor.shape[0] if a == axis % x.ndim else s for a, s in enumerate(x.shape)]
    return fold(factor @ unfold(x, axis), axis, shape)


def mode_products(x, factors, *, skip=None, transpose=False):
    """Mode products with every factor that is not None, but not along `skip`."""
    for axis, factor in enumerate(factors):
        if factor is not None and axis != skip:
            x = mode_product(x, factor.T if transpose else factor, axis)
    return x


def leading(matrix, rank):
    """(rank, d) leading left singular vectors of a matrix (d, columns) as rows, and all squared singular values."""
    u, s, _ = np.linalg.svd(matrix, full_matrices=matrix.shape[0] > matrix.shape[1])
    return u.T[:rank], np.square(s)


def hosvd(x, ranks):
    """(core, factors, energies of each axis), every factor from the full tensor; None in `ranks` leaves an axis."""
    x = np.asarray(x, np.float64)
    found = [None if k is None else leading(unfold(x, a), k) for a, k in enumerate(ranks)]
    factors = [None if f is None else f[0] for f in found]
    return mode_products(x, factors), factors, [None if f is None else f[1] for f in found]


def sthosvd(x, ranks, order):
    """(core, factors), each axis from the tensor shrunk along the axes before it in `order`."""
    y = np.asarray(x, np.float64)
    factors = [None] * y.ndim
    for axis in order:
        factors[axis] = leading(unfold(y, axis), ranks[axis])[0]
        y = mode_product(y, factors[axis], axis)
    return y, factors


def hooi(x, ranks, sweeps=50):
    """(core, factors) after alternating sweeps from the HOSVD start."""
    x = np.asarray(x, np.float64)
    factors = hosvd(x, ranks)[1]
    for _, axis in itertools.product(range(sweeps), [a for a, k in enumerate(ranks) if k is not None]):
        factors[axis] = leading(unfold(mode_products(x, factors, skip=axis), axis), ranks[axis])[0]
    return mode_products(x, factors), factors


def error(x, core, factors):
    """Relative error |X - core x_m U_m.T| / |X|; 0 for a zero tensor."""
    x = np.asarray(x, np.float64)
    factors = [None if f is None else np.asarray(f, np.float64) for f in factors]
    gone = x - mode_products(np.asarray(core, np.float64), factors, transpose=True)
    return np.linalg.norm(gone) / (np.linalg.norm(x) or 1.0)


def updates(a, b, scales):
    """(N, o, i) updates scale * B @ A, formed in full."""
    return np.stack([s * bb @ aa for s, aa, bb in zip(scales, np.float64(a), np.float64(b), strict=True)])
