"""The frame of a refit: orthonormal directions that hold a basis and all of the new models, up to rounding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import hostmemory, subspace
from jaxsub.linalg import mode_gram, orth

ROUNDINGS = 32  # of the largest new model: what a frame does not hold of it


def of(space, x):
    """The subspace with orthonormal directions that hold those of `space` and all of the new models, same mean."""
    if isinstance(space, subspace.LinearSubspace):
        rows = np.asarray(space.basis)
        new = np.zeros((0, rows.shape[1]), rows.dtype)
        if x is not None:
            new = hostmemory.aligned(np.asarray(x).reshape(len(x), -1), rows.dtype)
            new -= np.asarray(space.mean)
        found = _rows_of(rows, new)
        del new  # as large as the models; a CPU device then takes the others where they are
        return dataclasses.replace(space, basis=jax.device_put(found))
    factors, y = {axis: np.asarray(factor) for axis, factor in space.factors.items()}, None
    if x is not None:
        y = hostmemory.aligned(x, space.dtype)
        y -= np.asarray(space.mean)
    for axis, rows in factors.items():
        if y is None:
            rows = _make_orthonormal(rows.copy())
        elif rows.dtype == np.float64:  # of which a Gram matrix keeps half the digits
            rows = _rows_of(rows, np.moveaxis(y, axis + 1, -1).reshape(-1, rows.shape[1]).copy())
        else:
            rows = _axis_of(rows, y, axis + 1)
        factors[axis] = jnp.asarray(rows)
    return dataclasses.replace(space, factors=factors)


def _axis_of(rows, y, axis):
    """`_rows_of` float32 rows (k, d) and all that lies along an axis (d) of models y, by its Gram matrix in float64.

    That resolves 1e-8 of the norm of all models, where rounding leaves more; nothing of their size is made.
    """
    gram = np.asarray(mode_gram.mode_gram(y, axis=axis, dtype="float64"))
    noise = ROUNDINGS * np.finfo(rows.dtype).eps * max((float(np.linalg.norm(one)) for one in y), default=0.0)
    own = _make_orthonormal(rows.astype(np.float64))
    rest = np.eye(len(gram)) - own.T @ own
    energies, vectors = np.linalg.eigh(rest @ gram @ rest)
    count = min(int((energies > noise**2).sum()), len(gram) - len(own))
    more = vectors[:, len(gram) - count :].T[::-1]
    return np.concatenate([own, more]).astype(rows.dtype)


def _rows_of(rows, new):
    """Orthonormal rows that span `rows`, and `new` up to rounding; as few as that takes. Changes `new`."""
    own = _make_orthonormal(rows.copy())
    noise = ROUNDINGS * np.finfo(rows.dtype).eps * math.sqrt(max((float(row @ row) for row in new), default=0.0))
    for _ in range(2):  # twice is enough: what is left is orthogonal to rounding
        _take_off(new, own)
    if not new.size:
        return own
    turn, right = _directions(new, noise)
    count = min(len(right if turn is None else turn), own.shape[1] - len(own))
    found = hostmemory.zeros((len(own) + count, own.shape[1]), own.dtype)
    found[: len(own)] = own
    own, more = found[: len(own)], found[len(own) :]
    if turn is None:
        more[...] = right[:count]
    else:
        np.matmul(turn[:count], right, out=more)
    _take_off(more, own)
    _make_orthonormal(more)
    return found


def _take_off(rows, own):
    """Takes what is in the span of orthonormal rows off other rows, in place."""
    inside = rows @ own.T
    for start in range(0, rows.shape[1], orth.PIECE):
        rows[:, start : start + orth.PIECE] -= inside @ own[:, start : start + orth.PIECE]


def _directions(new, noise):
    """(turn, rows): unit rows turn @ rows that span others but for directions of at most `noise`, the largest first.

    `turn` is None where the rows are these already.
    """
    if len(new) > new.shape[1] or new.dtype == np.float64:
        wide = np.linalg.qr(new, mode="r") if len(new) > new.shape[1] else new
        _, values, right = np.linalg.svd(wide, full_matrices=False)
        return None, right[values > noise]
    # A Gram matrix of float32 entries in float64 resolves 1e-8 of the largest value, `noise` is 4e-6 of it.
    energies, turn = np.linalg.eigh(np.asarray(orth.row_gram(new, dtype="float64")))
    values = np.sqrt(np.maximum(energies, 0.0))
    found = np.flatnonzero(values > noise)[::-1]
    return (turn[:, found] / values[found]).T.astype(new.dtype), new


def _make_orthonormal(rows):
    """`rows`, made orthonormal with the span that they have."""
    if len(rows) and rows.dtype == np.float32:
        gram = np.asarray(orth.row_gram(rows, dtype="float64"))
        values = np.linalg.eigvalsh(gram)
        if values[0] > values[-1] / 4:  # LAPACK takes many times as long of long rows
            orth.one_round(rows, gram)
            return rows
    rows[...] = np.linalg.qr(rows.T)[0].T
    return rows
