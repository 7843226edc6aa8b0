"""Eigenproblems and singular values of small matrices on the host: what one algorithm fails at, another tries once.

LAPACK's divide and conquer comes first. Where it gives up, or returns NaN for numbers that are finite, QR iterations
follow; where these fail too there is a SolverError, and never a result that is not finite. Both are rare: an all but
correct matrix on which a library's solver fails is a defect of that library (JAX issue 22809 was one).
"""

import contextlib
import logging
import threading

import numpy as np

from jaxsub import errors

PANEL = 2**19  # numbers of a large matrix that are worked on at a time in float64
SUBSET = 0.3  # share of the eigenvectors up to which they are found by bisection, each by itself

log = logging.getLogger("jaxsub")
_lock, _retries = threading.Lock(), []


def eigh(matrix):
    """(values ascending, vectors) of symmetric matrices (..., n, n), float64.

    Raises:
        SolverError: a matrix that is not finite, or both algorithms failed.
    """
    return _solved("eigenvectors", np.linalg.eigh, lambda one: _scipy().eigh(one, driver="ev"), matrix)


def eigvalsh(matrix):
    """Eigenvalues of symmetric matrices (..., n, n), ascending; raises as `eigh`."""
    return _solved(
        "eigenvalues", np.linalg.eigvalsh, lambda one: _scipy().eigh(one, driver="ev", eigvals_only=True), matrix
    )


def singular_values(matrix):
    """Singular values of matrices (..., m, n), non-increasing; raises as `eigh`."""
    return _solved(
        "singular values",
        lambda x: np.linalg.svd(x, compute_uv=False),
        lambda one: _scipy().svd(one, compute_uv=False, lapack_driver="gesvd"),
        matrix,
    )


def svd(matrix):
    """(u, s, vt), thin, of matrices (..., m, n); raises as `eigh`."""
    return _solved(
        "singular vectors",
        lambda x: tuple(np.linalg.svd(x, full_matrices=False)),
        lambda one: _scipy().svd(one, full_matrices=False, lapack_driver="gesvd"),
        matrix,
    )


def panels(count, width):
    """Slices of `count` rows of `width` numbers, about PANEL numbers each."""
    step = max(1, PANEL // max(width, 1))
    return [slice(start, start + step) for start in range(0, count, step)]


def add_square(total, x, weight=1.0):
    """Adds weight * x.T @ x, x (m, n), to the upper triangle of `total` (n, n), float64 and Fortran's order."""
    from scipy.linalg import blas

    for at in panels(*x.shape):
        part = np.ascontiguousarray(x[at], np.float64)
        blas.dsyrk(weight, part.T, beta=1.0, c=total, overwrite_c=True)


def descending(make, count=None):
    """(values (k,), vectors (n, k)) of a symmetric matrix' k largest eigenvalues, largest first; k = n by default.

    For large matrices: beside the matrix itself no other is held but the vectors.

    Args:
        make: () -> (n, n) float64 in Fortran's order, its upper triangle filled; it is overwritten, and made a second
            time where the first algorithm fails.
        count: k.

    Raises:
        SolverError: as `eigh`.
    """
    matrix = make()
    size = len(matrix)
    # LAPACK scales an Inf to 0 here, or does not end.
    if not all(np.isfinite(column).all() for column in matrix.T):
        raise errors.SolverError(f"eigenvectors of a {size} x {size} matrix that holds NaN or Inf, or has overflown")
    count = size if count is None else min(count, size)
    if not count:
        return np.zeros(0), np.zeros((size, 0))
    more = {"lower": False, "overwrite_a": True, "check_finite": False}
    if count <= size * SUBSET:
        more["subset_by_index"] = [size - count, size - 1]
    found = None
    with contextlib.suppress(np.linalg.LinAlgError):
        found = _scipy().eigh(matrix, driver="evr", **more)
    del matrix
    if found is None or not is_finite(found):
        upper = np.triu(make())
        note(f"eigenvectors of a {size} x {size} matrix were found by divide and conquer: the first way failed")
        found = eigh(upper + np.triu(upper, 1).T)
    values, vectors = (np.asfortranarray(part) for part in found)
    for i in range(vectors.shape[1] // 2):  # turned round where it lies: a view turned round is copied by every product
        vectors[:, [i, -1 - i]] = vectors[:, [-1 - i, i]]
    return values[::-1][:count], vectors[:, :count]


def leading(matrix, count):
    """The `count` largest eigenvalues of one symmetric matrix, ascending, and their vectors; raises as `eigh`."""
    size = len(matrix)
    try:
        chosen = [size - count, size - 1]
        found = _scipy().eigh(matrix, subset_by_index=chosen, check_finite=False)
        if is_finite(found):
            return found
    except np.linalg.LinAlgError:
        pass
    if np.isfinite(matrix).all():
        note(f"{count} eigenvectors of a {size} x {size} matrix were found among all: bisection did not converge")
    values, vectors = eigh(matrix)
    return values[size - count :], vectors[:, size - count :]


@contextlib.contextmanager
def of_layer(name):
    """Makes whatever fails to be solved inside a SolverError that names the layer."""
    try:
        yield
    except errors.SolverError as error:
        raise error.of(name) from error
    except np.linalg.LinAlgError as error:
        raise errors.SolverError(str(error)).of(name) from error


def retries():
    """What was solved by the second algorithm since the last call, in words; [] as a rule."""
    with _lock:
        found = list(_retries)
        _retries.clear()
    return found


def note(text):
    """Remembers for `retries`, and logs, that something was solved by a second algorithm."""
    with _lock:
        _retries.append(text)
    log.warning(text)


def is_finite(found):
    """Whether all of an array, or of a tuple of arrays, is finite."""
    return all(np.isfinite(part).all() for part in (found if isinstance(found, tuple) else (found,)))


def _scipy():
    import scipy.linalg

    return scipy.linalg


def _solved(what, first, second, matrix):
    matrix = np.asarray(matrix, np.float64)
    shape = " x ".join(map(str, matrix.shape[-2:]))
    if matrix.size == 0:
        return _plain(first(matrix))
    try:
        found = _plain(first(matrix))
        if is_finite(found):
            return found
    except np.linalg.LinAlgError:
        pass
    if not np.isfinite(matrix).all():
        raise errors.SolverError(f"{what} of a {shape} matrix that holds NaN or Inf")
    note(f"{what} of a {shape} matrix were found by QR iterations: divide and conquer did not converge")
    try:
        flat = [_plain(second(one)) for one in matrix.reshape(-1, *matrix.shape[-2:])]
    except np.linalg.LinAlgError as error:
        raise errors.SolverError(f"{what} of a {shape} matrix: no algorithm converges ({error})") from error
    parts = list(zip(*flat, strict=True)) if isinstance(flat[0], tuple) else [flat]
    found = tuple(np.stack(part).reshape(*matrix.shape[:-2], *part[0].shape) for part in parts)
    if not is_finite(found):
        raise errors.SolverError(f"{what} of a {shape} matrix: no algorithm gives finite numbers")
    return found if isinstance(flat[0], tuple) else found[0]


def _plain(found):
    """A tuple of arrays as a plain one, whatever named tuple a library makes of it."""
    return tuple(found) if isinstance(found, tuple) else found
