"""How large the error of a truncated decomposition is at most, from what is at hand after it.

| certificate | needs | holds | resolves relative errors from |
|---|---|---|---|
| `tail_bound` | energy and s | always, rounding included | float32 3e-3 to 1e-2, float64 1e-7 |
| `residual_error` | one more pass over x | always, rounding included | float32 1e-6, float64 1e-14 |
| `probe_estimate` | one pass with a few columns | with the stated confidence | as `residual_error` |

All for u s vt with (nearly) orthonormal factors, all float64: call with x64 on. `axis` as in `svd`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import orth, pieces, products, sketch

# Rounding of an n-term sum is within SPREAD sqrt(n) u of its scale but for a probability 2 exp(-SPREAD**2 / 2) < 1e-3
# if roundings are independent (Higham and Mary 2019, Theorem 2.4); sums of thousands of such errors stay far below.
SPREAD = 4.0
CHUNK = 2**20  # entries of x a residual product: 4 MiB of float32 stay in cache


class ProbeEstimate(NamedTuple):
    """Relative error |x - u s vt|_F / |x|_F from random probes, float64."""

    estimate: jax.Array  # () unbiased in its square
    upper: jax.Array  # () not exceeded by the true error but with probability `failure`


class ResidualError(NamedTuple):
    """Relative error |x - u s vt|_F / |x|_F from the residual itself, float64."""

    error: jax.Array  # () as computed
    bound: jax.Array  # () with the rounding of the residual added


def require_x64(name):
    """Refuses to run `name` in float32.

    Raises:
        ConfigError: if x64 is off.
    """
    if not jax.config.jax_enable_x64:
        raise errors.ConfigError(f"{name} accumulates in float64: call it within jax.enable_x64(True)")


@functools.partial(jax.jit, static_argnames="axis")
def energy(x, axis=None):
    """() float64 squared Frobenius norm of x, any shape and float dtype; exact to n eps64."""
    require_x64("energy")
    return orth.total(jnp.sum(jnp.square(x.astype(jnp.float64))), axis)


def tail_bound(total, s, terms, dtype):
    """Exact error of a truncated projection and a bound that allows for rounding.

    For q with orthonormal columns and the SVD of q @ q.T @ x truncated to k values,
    |x - u s vt|_F**2 = |x|_F**2 - sum(s**2): identity (E11) of the projection, whatever the quality of q.

    Args:
        total: () float64 squared Frobenius norm of x.
        s: (k,) singular values of the projection, computed with sums of `terms` products in `dtype`.
        terms: length of the longest sums behind s, static.
        dtype: dtype of the products.

    Returns:
        tail: () float64, may be negative by rounding.
        bound: () float64 upper bound of |x - u s vt|_F / |x|_F; 0 for x = 0.

    Fails on: relative errors under the root of the slack, 2 SPREAD sqrt(terms) u + 16 sqrt(k) u:
    they show as that root.
    """
    require_x64("tail_bound")
    u = float(jnp.finfo(dtype).eps) / 2
    slack = 2 * SPREAD * u * math.sqrt(terms) + 16 * u * math.sqrt(s.shape[0] + 1)
    tail = total - jnp.sum(jnp.square(s.astype(jnp.float64)))
    share = jnp.maximum(tail, 0.0) / jnp.where(total > 0, total, 1.0) + slack
    return tail, jnp.where(total > 0, jnp.sqrt(share), 0.0)


@functools.partial(jax.jit, static_argnames="axis")
def residual_error(x, u, s, vt, *, axis=None):
    """Relative error of u s vt from one pass over x, in chunks of rows: nothing of the size of x is formed.

    Args:
        x: (N, D) any float dtype. u: (N, k), s: (k,), vt: (k, D). Inside shard_map local columns of x and vt.
        axis: mesh axis of D, or None.

    Returns:
        ResidualError; zeros for x = 0. The bound adds (SPREAD sqrt(k) + 2) u |x|_F of rounding.
    """
    require_x64("residual_error")
    dtype = orth.compute_dtype(x)
    num_rows, width = x.shape
    scaled, right = (u * s.astype(u.dtype)).astype(dtype), vt.astype(dtype)

    def add(start, size, sums):
        y = pieces.part(x, start, size).astype(dtype)
        left = jax.lax.dynamic_slice_in_dim(scaled, start, size)
        r = y - products.row_major(products.matmul(left, right))
        return sums + jnp.stack([jnp.sum(jnp.square(a.astype(jnp.float64))) for a in (r, y)])

    sums = orth.total(pieces.fold(add, num_rows, CHUNK // max(width, 1), jnp.zeros(2, jnp.float64)), axis)
    error = jnp.sqrt(sums[0] / jnp.where(sums[1] > 0, sums[1], 1.0))
    rounding = (SPREAD * math.sqrt(s.shape[0]) + 2) * float(jnp.finfo(dtype).eps) / 2
    return ResidualError(error, jnp.where(sums[1] > 0, error * (1 + rounding) + rounding, 0.0))


@functools.partial(jax.jit, static_argnames=("probes", "failure", "axis"))
def probe_estimate(x, u, s, vt, key, *, probes=10, failure=0.01, axis=None):
    """Relative error of u s vt from its action on Gaussian probes, |(x - u s vt) w|**2 averaged.

    Args:
        x: (N, D); u: (N, k), s: (k,), vt: (k, D); inside shard_map local columns of x and vt.
        key: typed PRNG key, not the one that drew the test matrix: the certificate would be flattered.
        probes: number t of probes, static.
        failure: probability that the true error exceeds `upper`, static.
        axis: mesh axis of D, or None.

    Returns:
        ProbeEstimate; `upper` is `estimate` times `probe_factor(probes, failure)` (2.3 for 10 probes at 1 %).
    """
    require_x64("probe_estimate")
    dtype = orth.compute_dtype(x)
    width = x.shape[1]
    start = 0 if axis is None else jax.lax.axis_index(axis) * width
    w = sketch.gaussian(key, width, probes, start=start).astype(dtype)
    inner = orth.total(products.matmul(vt.astype(dtype), w), axis)
    y = orth.total(products.row_major(products.matmul(x.astype(dtype), w)), axis)
    r = y - products.matmul(u.astype(dtype), s.astype(dtype)[:, None] * inner)
    square, whole = jnp.sum(jnp.square(r.astype(jnp.float64))) / probes, energy(x, axis)
    estimate = jnp.sqrt(square / jnp.where(whole > 0, whole, 1.0))
    return ProbeEstimate(estimate, estimate * probe_factor(probes, failure))


def probe_factor(probes, failure):
    """What an estimate from `probes` Gaussian probes is multiplied by so that it falls short with at most `failure`.

    For any residual r, P(estimate**2 <= tau |r|_F**2) <= (tau exp(1 - tau))**(t / 2), by Chernoff's bound on
    the weighted sum of chi-squares; it is worst for a residual of rank one. Source: after Gratton and Titley-Peloquin
    2018, "Improved bounds for small-sample estimation".
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        tau = (low + high) / 2
        is_safe = tau > 0 and (probes / 2) * (math.log(tau) + 1 - tau) <= math.log(failure)
        low, high = (tau, high) if is_safe else (low, tau)
    return 1 / math.sqrt(low)
