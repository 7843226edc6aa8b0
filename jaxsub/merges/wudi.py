"""WUDI: the update that disturbs each model's own as little as possible, without data.

    minimise over T:  sum_n |(T - W_n) W_n.T|^2 / |W_n|^2,   W_n the updates; from T = sum_n W_n on

Rows of W_n stand for the inputs that made them. With `solver=adam`, as published, 300 steps of Adam at 1e-5: T moves by
3e-3 an entry at most, so it is a sum that is corrected a little. With `solver=exact` the minimum nearest to the sum,

    T = S + (H - S G) G^+,   G = sum_n W_n.T W_n / |W_n|^2,   H = sum_n W_n W_n.T W_n / |W_n|^2,   S = sum_n W_n

Low-rank updates are always merged exactly, in their span: Adam's steps are not those of a rotated layer. Layers that
are no matrices take the mean of the updates. Weights are not used.

Fails where the sum is far from the minimum and steps are short: the result then hangs on the number of steps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, solvers
from jaxsub.linalg import products
from jaxsub.merges import _matrices
from jaxsub.rows import matrices

REFERENCE = "Cheng et al. 2025, whoever started the interference should end it (arXiv 2503.08099), equation 8"
NEEDS_UPDATES = True
FLOOR = 1e-12  # share of the largest eigenvalue of G under which its directions are rounding


@dataclasses.dataclass(frozen=True)
class Options:
    """How the minimum is looked for."""

    solver: str = "adam"  # adam, or exact
    steps: int = 300  # of Adam
    rate: float = 1e-5  # of Adam
    scaling: float = 1.0  # of the merged update


def held(shape, count, itemsize):
    """Bytes of a layer that are held at most."""
    del count
    o, i = shape
    steps, exact = (7 * o * i + 2 * i * i) * itemsize, 5 * o * i * itemsize + 16 * i * i
    return max(steps, exact) + _matrices.library(i)


def merge(rows, options, key):
    """The least disturbing update; deterministic, `key` is not used."""
    del key
    if options.steps < 0:
        raise errors.ConfigError(f"steps={options.steps}: 0 or more")
    errors.require_known("solver", options.solver, ("adam", "exact"))
    if not rows.is_matrix:
        return _matrices.fallback(rows, options.scaling)
    found = matrices.of(rows)
    is_exact = options.solver == "exact" or rows.factors() is not None
    if is_exact:
        return found.result(options.scaling * _exact(found))
    o, i = found.shape
    sums = tuple(jnp.zeros(shape, rows.dtype) for shape in ((o, i), (o, i), (i, i)))
    for w in found:
        sums = jax.block_until_ready(_added(*sums, w))  # else all are read before the first is added
    del w
    total, target, gram = sums
    del sums
    merged = _adam(total, target, gram, options.rate, steps=options.steps)
    del total, target, gram
    return found.result(merged if options.scaling == 1 else options.scaling * merged)


def _exact(found):
    """(p, q) float64: S + sum_n (W_n - S) W_n.T W_n / |W_n|^2 G^+."""
    total, merged = np.zeros((2, *found.shape))
    for w in found:
        total += np.asarray(w)
    for w in found:
        square = float(_square(w)) or 1.0
        for at in solvers.panels(*found.shape):
            merged[at] += _missed(w[at], total[at], w) / square
    del w

    def gram():
        result = np.zeros((found.shape[1],) * 2, order="F")
        for w in found:
            solvers.add_square(result, np.asarray(w), 1 / (float(_square(w)) or 1.0))
        return result

    values, vectors = solvers.descending(gram)
    count = int(np.sum(values > FLOOR * values[0]))
    known = vectors[:, :count]
    known /= np.sqrt(values[:count])
    inverse = known @ known.T
    del vectors, known
    for at in solvers.panels(*found.shape):
        total[at] += merged[at] @ inverse
    return total


@jax.jit
def _square(w):
    return jnp.sum(jnp.square(w.astype(jnp.float64)))


@jax.jit
def _missed(part, total, w):
    """(part - total) w.T w in float64; part and total are the same few rows of w and of S."""
    wide = w.astype(jnp.float64)
    return products.matmul(products.matmul(part.astype(wide.dtype) - total, wide.T), wide)


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def _added(total, target, gram, w):
    square = jnp.sum(jnp.square(w))
    own = products.matmul(w.T, w) / jnp.where(square > 0, square, 1)
    return total + w, target + products.matmul(w, own), gram + own


@functools.partial(jax.jit, static_argnames="steps", donate_argnums=(0,))
def _adam(start, target, gram, rate, *, steps):
    """`steps` steps of Adam (0.9, 0.999, 1e-8) from `start` on the gradient 2 (T G - H)."""

    def step(number, state):
        t, m, v = state
        gradient = 2 * (products.row_major(products.matmul(t, gram)) - target)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * jnp.square(gradient)
        count = (number + 1).astype(t.dtype)
        unbiased = m / (1 - 0.9**count), v / (1 - 0.999**count)
        return t - rate * unbiased[0] / (jnp.sqrt(unbiased[1]) + 1e-8), m, v

    zeros = jnp.zeros_like(start)
    return jax.lax.fori_loop(0, steps, step, (start, zeros, zeros))[0]
