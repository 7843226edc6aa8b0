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

from jaxsub import errors
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
    """Bytes of a layer that are held at most, beside what is read."""
    del count
    o, i = shape
    return 12 * o * i * itemsize + 6 * i * i * max(itemsize, 8)


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
    total, target, gram = _sums(found, jnp.float64 if is_exact else rows.dtype)
    if is_exact:
        values, vectors = jnp.linalg.eigh(gram)
        is_known = values > FLOOR * values[-1]
        inverse = jnp.where(is_known, 1 / jnp.where(is_known, values, 1), 0)
        missing = target - products.matmul(total, gram)
        merged = total + products.matmul(products.matmul(missing, vectors) * inverse, vectors.T)
    else:
        merged = _adam(total, target, gram, options.rate, steps=options.steps)
    return found.result(options.scaling * merged)


def _sums(found, dtype):
    """S (p, q), H (p, q) and G (q, q)."""
    total = target = jnp.zeros(found.shape, dtype)
    gram = jnp.zeros((found.shape[1],) * 2, dtype)
    for w in found:
        total, target, gram = _added(total, target, gram, w)
    return total, target, gram


@functools.partial(jax.jit, donate_argnums=(2,))
def _added(total, target, gram, w):
    w = w.astype(gram.dtype)
    square = jnp.sum(jnp.square(w))
    own = products.matmul(w.T, w) / jnp.where(square > 0, square, 1)
    return total + w, target + products.matmul(w, own), gram + own


@functools.partial(jax.jit, static_argnames="steps")
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
