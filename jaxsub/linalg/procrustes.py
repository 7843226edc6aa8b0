"""Orthogonal Procrustes: the rotation that carries one set of points, or one basis, onto another.

    min over R of |a R - b|_F,   a.T b = U s V.T,   R = U V.T

Bases of one subspace differ by such a rotation: align before comparing coefficients or averaging components.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import matrix_functions, operands, products


class Alignment(NamedTuple):
    """The best rotation and how well it does."""

    rotation: jax.Array  # (k, k) orthogonal
    scale: jax.Array  # () factor that would fit best beside the rotation; 0 where there is nothing to scale
    distance: jax.Array  # () |rotated - target|_F, without the factor


def rotate_points(a, b, /, *, allow_reflection=True):
    """Rotation of points a that brings them closest to b, argmin |a R - b|_F.

    Args:
        a: (n, k) points as rows, such as coefficients of n models; any float dtype, not centred here.
        b: (n, k) target points.
        allow_reflection: False to accept only determinant +1.

    Returns:
        Alignment with rotation R (k, k).

    Raises:
        ConfigError: if the shapes differ or are not (n, k) with n, k >= 1.

    Fails where R is not unique: a.T b of rank below k (below k - 1 without reflections), such as fewer points than
    dimensions. One minimiser is returned, and derivatives along undetermined directions as zero.
    Source: Schonemann 1966; determinant, Kabsch 1978; scale, Umeyama 1991, equation 42.
    """
    a, b = operands.widen(a, "a"), operands.widen(b, "b")
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise errors.ConfigError(f"a has shape {a.shape} and b {b.shape}: both need the same shape (n, k), n, k >= 1")
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return _rotate_points(a.astype(dtype), b.astype(dtype), proper=not allow_reflection)


@functools.partial(jax.jit, static_argnames="proper")
def _rotate_points(a, b, *, proper):
    rotation = matrix_functions.closest_frame(products.matmul(a.T, b), proper)
    return _measure(rotation, products.matmul(a, rotation), b)


def _measure(rotation, rotated, target):
    # From the difference itself: |a|**2 + |b|**2 - 2 sum(s) cancels where the two agree.
    square = jnp.sum(jnp.square(rotated - target))
    is_zero = square == 0
    distance = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
    energy = jnp.sum(jnp.square(rotated))
    scale = jnp.where(energy == 0, 0, jnp.sum(rotated * target) / jnp.where(energy == 0, 1, energy))
    return Alignment(rotation, scale, distance)


def align_basis(a, b, /, *, allow_reflection=True):
    """Basis of the span of a that is closest to b, R a with R = argmin |R a - b|_F.

    For orthonormal rows |R a - b|**2 = sum over principal angles of 4 sin(t / 2)**2, the squared chordal distance of
    the Stiefel manifold modulo rotations.

    Args:
        a: (k, D) rows, orthonormal for the formula above; any float dtype.
        b: (k, D) target rows.
        allow_reflection: False to accept only determinant +1.

    Returns:
        (k, D) aligned basis R a, and the Alignment with R (k, k).

    Raises:
        ConfigError: if the shapes differ or are not (k, D) with 1 <= k <= D.

    Fails on: subspaces with a right angle between them, where R is not unique (see `rotate_points`).
    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 6.4.1.
    """
    return _align_basis(*operands.pair(a, b, same_rank=True), proper=not allow_reflection)


@functools.partial(jax.jit, static_argnames="proper")
def _align_basis(a, b, *, proper):
    rotation = matrix_functions.closest_frame(products.matmul(b, a.T), proper)
    aligned = products.matmul(rotation, a)
    return aligned, _measure(rotation, aligned, b)
