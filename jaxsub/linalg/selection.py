"""A few models that span a collection, chosen from the N x N Gram matrix alone.

    x_i ~ sum over chosen j of c_ij x_j,    c = G[:, S] G[S, S]**-1,    squared error: diagonal of the Schur complement

Unlike principal components the chosen rows are models that exist. Give the centred Gram matrix to choose models that
span the deviations from the mean, the uncentred one to span the weights themselves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import operands, products


class PivotedCholesky(NamedTuple):
    """Partial factorisation G = factor factor.T + Schur complement."""

    factor: jax.Array  # (N, k) columns in order of choice; zero past num_resolved
    pivots: jax.Array  # (k,) int32 rows in order of choice; -1 past num_resolved
    residuals: jax.Array  # (N,) diagonal of the Schur complement, squared distances to the span of the pivots
    traces: jax.Array  # (k + 1,) trace of the Schur complement before the first step and after each
    num_resolved: jax.Array  # () int32 steps whose pivot was above N eps of the largest diagonal entry


def pivoted_cholesky(gram, /, *, rank):
    """Greedy Cholesky factorisation: each step takes the row farthest from the span of those before it.

    Args:
        gram: (N, N) symmetric positive semi-definite, float32 or float64.
        rank: steps k, 1 ... N, static.

    Returns:
        PivotedCholesky. Equal to QR with column pivoting of the rows' transpose, in k**2 N operations.

    Raises:
        ConfigError: if gram is not square or rank not in 1 ... N.

    Fails under the floor: a squared distance below N eps max(diag G) is rounding of the Gram matrix; the steps stop
    there, which `num_resolved` says. The greedy choice can be 2**k times worse than the best (Kahan's matrix).
    Source: Higham 1990; Harbrecht, Peters and Schneider 2012, algorithm 1.
    """
    gram = operands.square(gram, "gram")
    operands.require_rank(rank, len(gram), "gram")
    return _pivoted_cholesky(gram, rank=rank)


@functools.partial(jax.jit, static_argnames="rank")
def _pivoted_cholesky(gram, *, rank):
    diagonal = jnp.diagonal(gram)
    floor = _floor(gram)

    def step(j, state):
        factor, residuals, is_used, pivots, traces, resolved = state
        p = jnp.argmax(jnp.where(is_used, -jnp.inf, residuals))
        is_new = residuals[p] > floor
        root = jnp.sqrt(jnp.where(is_new, residuals[p], 1))
        column = (gram[:, p] - products.matmul(factor, factor[p])) / root
        column = jnp.where(is_used, 0, column).at[p].set(root)
        column = jnp.where(is_new, column, 0)
        is_used = is_used.at[p].set(is_used[p] | is_new)
        residuals = jnp.where(is_used, 0, jnp.maximum(residuals - jnp.square(column), 0))
        return (
            factor.at[:, j].set(column),
            residuals,
            is_used,
            pivots.at[j].set(jnp.where(is_new, p, -1).astype(jnp.int32)),
            traces.at[j + 1].set(jnp.sum(residuals)),
            resolved + is_new.astype(jnp.int32),
        )

    n = len(gram)
    residuals = jnp.maximum(diagonal, 0)
    state = (
        jnp.zeros((n, rank), gram.dtype),
        residuals,
        jnp.zeros(n, bool),
        jnp.full(rank, -1, jnp.int32),
        jnp.zeros(rank + 1, gram.dtype).at[0].set(jnp.sum(residuals)),
        jnp.zeros((), jnp.int32),
    )
    factor, residuals, _, pivots, traces, resolved = jax.lax.fori_loop(0, rank, step, state)
    return PivotedCholesky(factor, pivots, residuals, traces, resolved)


def _floor(gram):
    return len(gram) * jnp.finfo(gram.dtype).eps * jnp.max(jnp.diagonal(gram))


class Selection(NamedTuple):
    """Chosen models and how every model is made of them, x ~ coefficients @ x[models]."""

    models: jax.Array  # (k,) int32; -1 past num_resolved
    coefficients: jax.Array  # (N, k); identity on the chosen models, zero columns past num_resolved
    squared_errors: jax.Array  # (N,) upper bounds of |x_i - c_i x[models]|**2, rounding included
    error: jax.Array  # () their sum: upper bound of the squared Frobenius error
    best: jax.Array  # () the least any rank-k approximation has, sum of the eigenvalues past k
    spectral_bound: jax.Array  # () (1 + growth**2 k (N - k)) times eigenvalue k + 1; holds if is_settled
    num_resolved: jax.Array  # () int32 chosen models above the floor
    num_swaps: jax.Array  # () int32
    is_settled: jax.Array  # () bool, no swap is left that would enlarge the volume by more than `growth`


def select_models(gram, /, *, rank, growth=2.0, max_swaps=100, gram_rounding=0.0):
    """Interpolative decomposition of N models by k of them: pivoted Cholesky, then volume-enlarging swaps.

    Args:
        gram: (N, N) inner products of the models, float32 or float64.
        rank: models to choose, 1 ... N, static.
        growth: f > 1; a chosen and another model are swapped while that multiplies the volume by more than f. Entries
            of the coefficients stay below it.
        max_swaps: swaps at most.
        gram_rounding: relative error of the Gram matrix's entries, |dG_ij| <= gram_rounding |x_i| |x_j|, which widens
            the bounds; its own dtype's rounding is always included.

    Returns:
        Selection.

    Raises:
        ConfigError: if gram is not square, rank not in 1 ... N, or growth <= 1.

    Fails under the floor as `pivoted_cholesky` does: errors cannot be certified under about eps max(diag G).
    Source: interpolative decomposition, Cheng, Gimbutas, Martinsson and Rokhlin 2005; swaps and the bound
    sigma_1(error)**2 <= (1 + f**2 k (N - k)) sigma_{k+1}**2, Gu and Eisenstat 1996, algorithm 4 and theorem 3.2,
    restated for the Gram matrix.
    """
    gram = operands.square(gram, "gram")
    operands.require_rank(rank, len(gram), "gram")
    if not growth > 1:
        raise errors.ConfigError(f"growth is {growth}, expected more than 1: swaps would never end")
    return _select_models(gram, growth, max_swaps, gram_rounding, rank=rank)


@functools.partial(jax.jit, static_argnames="rank")
def _select_models(gram, growth, max_swaps, gram_rounding, *, rank):
    n = len(gram)
    eps = jnp.finfo(gram.dtype).eps
    first = _pivoted_cholesky(gram, rank=rank)
    is_model = first.pivots >= 0
    diagonal = jnp.diagonal(gram)
    floor = _floor(gram)

    def solve(models):
        """Coefficients, squared errors and the volume factor of every swap, for one choice."""
        at = jnp.where(is_model, models, 0)
        both = is_model[:, None] & is_model[None, :]
        inner = jnp.where(both, gram[at][:, at], jnp.eye(rank, dtype=gram.dtype))
        side = jnp.where(is_model, gram[:, at], 0)
        lower = jnp.linalg.cholesky(inner)
        inverse = jax.lax.linalg.triangular_solve(lower, jnp.eye(rank, dtype=gram.dtype), left_side=True, lower=True)
        half = products.matmul(side, inverse.T)
        coefficients = products.matmul(half, inverse)
        left = jnp.maximum(diagonal - jnp.sum(jnp.square(half), axis=1), 0)
        left = jnp.where(left > floor, left, 0)
        volume = jnp.square(coefficients) + left[:, None] * jnp.sum(jnp.square(inverse), axis=0)
        is_chosen = jnp.any((jnp.arange(n)[:, None] == at) & is_model, axis=1)
        volume = jnp.where(is_chosen[:, None] | ~is_model[None, :], 0, volume)
        return coefficients, inner, side, at, volume

    def goes_on(state):
        _, volume, swaps = state
        return (jnp.max(volume) > growth**2) & (swaps < max_swaps)

    def swap(state):
        models, volume, swaps = state
        i, j = jnp.unravel_index(jnp.argmax(volume), volume.shape)
        models = models.at[j].set(i.astype(jnp.int32))
        return models, solve(models)[-1], swaps + 1

    start = (first.pivots, solve(first.pivots)[-1], jnp.zeros((), jnp.int32))
    models, volume, swaps = jax.lax.while_loop(goes_on, swap, start)
    coefficients, inner, side, at, _ = solve(models)
    chosen = jnp.where(is_model, at, n)
    coefficients = coefficients.at[chosen].set(jnp.eye(rank, dtype=gram.dtype), mode="drop")
    # The error of the coefficients as they are, not of exact ones, so that the bound holds whatever the conditioning.
    quadratic = jnp.sum(products.matmul(coefficients, inner) * coefficients, axis=1)
    found = diagonal - 2 * jnp.sum(side * coefficients, axis=1) + quadratic
    norms = jnp.sqrt(jnp.maximum(diagonal, 0))
    reach = norms + products.matmul(jnp.abs(coefficients), jnp.where(is_model, norms[at], 0))
    squared = jnp.maximum(found, 0) + ((2 * rank + 4) * eps + gram_rounding) * jnp.square(reach)
    squared = squared.at[chosen].set(0, mode="drop")
    values = jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1], 0)
    next_value = values[rank] if rank < n else jnp.zeros((), gram.dtype)
    return Selection(
        models,
        coefficients,
        squared,
        jnp.sum(squared),
        jnp.sum(values[rank:]),
        (1 + growth**2 * rank * (n - rank)) * next_value,
        first.num_resolved,
        swaps,
        jnp.max(volume) <= growth**2,
    )
