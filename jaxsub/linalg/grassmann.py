"""Geometry of the Grassmann manifold: subspaces as points, orthonormal bases (k, D) as their representatives.

A tangent at x is a (k, D) matrix h with h x.T = 0; its singular values are the angles it turns by. Everything is a
function of k x k matrices, so D only costs products, and repeated angles do no harm:

    exp(x, h) = cos(g) x + sinc(g) h,   g = (h h.T)**(1/2)
    log(x, y) = f(p) (y' - p x),        y' = y turned onto x,  p = y' x.T,  f(cos t) = t / sin t

Limits: the injectivity radius is pi/2. `log` is unique only while every principal angle is below pi/2; at pi/2 there
are several shortest ways, and near it derivatives grow like 1 / cos t. Arrays are not sharded; nothing is D x D.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import angles, matrix_functions, operands, products


def project_tangent(base, direction, /):
    """Horizontal part of a direction, h = d - (d x.T) x: the tangent at `base` it stands for.

    Args:
        base: (k, D) orthonormal rows x.
        direction: (k, D) any matrix d, such as a Euclidean gradient.

    Returns:
        (k, D) tangent.

    Raises:
        ConfigError: if the shapes differ or are not (k, D) with 1 <= k <= D.
    """
    return _horizontal(*operands.pair(base, direction, ("base", "direction"), same_rank=True))


@jax.jit
def _horizontal(x, d):
    return d - products.matmul(products.matmul(d, x.T), x)


def exponential(base, tangent, /):
    """Where the geodesic from `base` along `tangent` arrives after unit time.

    Args:
        base: (k, D) orthonormal rows x.
        tangent: (k, D) with tangent x.T = 0 (see `project_tangent`); its largest singular value below pi/2 for
            `logarithm` to find the way back.

    Returns:
        (k, D) orthonormal rows. The basis is the one carried along, not an arbitrary one of its span.

    Raises:
        ConfigError: if the shapes differ or are not (k, D) with 1 <= k <= D.

    Fails on: a tangent that is not horizontal; rows are then not orthonormal.
    Source: Edelman, Arias and Smith 1998, equation 2.65, with the right factor V.T kept.
    """
    return _exponential(*operands.pair(base, tangent, ("base", "tangent"), same_rank=True))


@jax.jit
def _exponential(x, h):
    square = products.matmul(h, h.T)
    along = matrix_functions.symmetric_function(matrix_functions.cosine_root, square)
    across = matrix_functions.symmetric_function(matrix_functions.sine_over_root, square)
    return products.matmul(along, x) + products.matmul(across, h)


def logarithm(base, target, /):
    """Shortest tangent at `base` whose exponential spans the target.

    Args:
        base: (k, D) orthonormal rows x.
        target: (k, D) orthonormal rows y; only their span counts.

    Returns:
        (k, D) tangent; its singular values are the principal angles. Absolute error of order eps.

    Raises:
        ConfigError: if the shapes differ or are not (k, D) with 1 <= k <= D.

    Fails at a principal angle of pi/2: one of several logarithms comes out, of the right length. Close to it the
    direction is lost: its error is eps / cos t.
    Source: Bendokat, Zimmermann and Absil 2020, algorithm 5.3 (Procrustes first, then the residual); their SVD of
    the residual replaced by a function of the k x k cosines, which has no small singular values to resolve.
    """
    return _logarithm(*operands.pair(base, target, ("base", "target"), same_rank=True))


@jax.jit
def _logarithm(x, y):
    turn = matrix_functions.closest_frame(products.matmul(x, y.T), False)
    y = products.matmul(turn, y)
    cosines = products.matmul(y, x.T)
    residual = y - products.matmul(cosines, x)
    residual = residual - products.matmul(products.matmul(residual, x.T), x)
    return products.matmul(matrix_functions.symmetric_function(matrix_functions.angle_over_sine, cosines), residual)


def distance(a, b, /):
    """Length of the shortest geodesic between two subspaces, the 2-norm of their principal angles.

    Args:
        a: (k, D) orthonormal rows.
        b: (k, D) orthonormal rows.

    Returns:
        () from 0 to sqrt(k) pi / 2. For derivatives use `squared_distance`: this one has a cone at zero.

    Raises:
        ConfigError: if the shapes differ or are not (k, D) with 1 <= k <= D.

    Source: Edelman, Arias and Smith 1998, section 4.3, arc length.
    """
    operands.pair(a, b, same_rank=True)
    return jnp.linalg.norm(angles.principal_angles(a, b))


def squared_distance(a, b, /):
    """Squared length of the shortest geodesic, |log(a, b)|**2; () and smooth while all angles are below pi/2.

    Args:
        a: (k, D) orthonormal rows.
        b: (k, D) orthonormal rows.

    Raises:
        ConfigError: if the shapes differ or are not (k, D) with 1 <= k <= D.
    """
    return jnp.sum(jnp.square(logarithm(a, b)))


def transport(base, tangent, carried, /):
    """Parallel transport of a tangent at `base` along the geodesic exp(base, t * tangent), t from 0 to 1.

    Args:
        base: (k, D) orthonormal rows x.
        tangent: (k, D) tangent h at x: the way.
        carried: (k, D) tangent at x to carry.

    Returns:
        (k, D) tangent at exponential(base, tangent), in the basis that returns. Lengths and inner products are kept.

    Raises:
        ConfigError: if the shapes differ or are not (k, D) with 1 <= k <= D.

    Source: Edelman, Arias and Smith 1998, theorem 2.4 (equation 2.68).
    """
    x, h = operands.pair(base, tangent, ("base", "tangent"), same_rank=True)
    _, d = operands.pair(x, carried, ("base", "carried"), same_rank=True)
    return _transport(x, h, d)


@jax.jit
def _transport(x, h, d):
    square, share = products.matmul(h, h.T), products.matmul(d, h.T)
    back = products.matmul(share, matrix_functions.symmetric_function(matrix_functions.sine_over_root, square))
    turned = products.matmul(share, matrix_functions.symmetric_function(matrix_functions.versine_over, square))
    return d - products.matmul(back, x) - products.matmul(turned, h)


class Mean(NamedTuple):
    """A Karcher mean and whether to believe it."""

    basis: jax.Array  # (k, D) orthonormal rows
    gradient_norm: jax.Array  # () |mean of the logarithms|_F at `basis`
    is_converged: jax.Array  # () bool, gradient_norm <= tolerance
    steps: jax.Array  # () int32
    variance: jax.Array  # () mean squared distance to `basis`
    radius: jax.Array  # () largest distance to `basis`; below pi/4 no other mean exists in that ball


def mean(bases, /, *, start=None, tolerance=None, max_steps=100):
    """Karcher mean of n subspaces: where the logarithms to them sum to zero, by Riemannian gradient descent.

    Args:
        bases: (n, k, D) orthonormal rows each.
        start: (k, D) orthonormal rows; default: the first subspace.
        tolerance: of the gradient's norm; default 32 sqrt(k) eps, which rounding of the logarithms allows.
        max_steps: steps at most.

    Returns:
        Mean. Not converged is reported, never repaired: check `is_converged`.

    Raises:
        ConfigError: if the shapes are not (n, k, D) with n >= 1 and 1 <= k <= D.

    Fails on: subspaces farther apart than a ball of radius pi/4 holds: the mean may not be unique, and unit steps may
    not converge. Not differentiable in reverse (a loop of unknown length).
    Source: Karcher 1977; unit steps, Absil, Mahony and Sepulchre 2004; uniqueness, Afsari 2011, theorem 2.1, with
    curvature at most 2 and injectivity radius pi/2.
    """
    bases = operands.widen(bases, "bases")
    if bases.ndim != 3 or not bases.shape[0]:
        raise errors.ConfigError(f"bases has shape {bases.shape}, expected (n, k, D) with n >= 1")
    first = bases[0] if start is None else start
    first, _ = operands.pair(first, bases[0], ("start", "a basis"), same_rank=True)
    if tolerance is None:
        tolerance = 32 * math.sqrt(bases.shape[1]) * float(jnp.finfo(bases.dtype).eps)
    return _mean(bases, first.astype(bases.dtype), tolerance, max_steps=max_steps)


@functools.partial(jax.jit, static_argnames="max_steps")
def _mean(bases, start, tolerance, *, max_steps):
    def gradient(x):
        def one(sums, y):
            h = _logarithm(x, y)
            square = jnp.sum(jnp.square(h))
            return (sums[0] + h, sums[1] + square, jnp.maximum(sums[2], square)), None

        zero = jnp.zeros((), x.dtype)
        total, squares, largest = jax.lax.scan(one, (jnp.zeros_like(x), zero, zero), bases)[0]
        return total / len(bases), squares / len(bases), jnp.sqrt(largest)

    def goes_on(state):
        _, (h, _, _), step = state
        return (jnp.linalg.norm(h) > tolerance) & (step < max_steps)

    def advance(state):
        x, (h, _, _), step = state
        # One Newton-Schulz step takes off the drift that many exponentials would add up.
        x = _exponential(x, h)
        x = 1.5 * x - 0.5 * products.matmul(products.matmul(x, x.T), x)
        return x, gradient(x), step + 1

    x, (h, variance, radius), step = jax.lax.while_loop(
        goes_on, advance, (start, gradient(start), jnp.zeros((), jnp.int32))
    )
    norm = jnp.linalg.norm(h)
    return Mean(x, norm, norm <= tolerance, step, variance, radius)
