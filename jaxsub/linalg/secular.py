"""Leading eigenvalues of diag(d) - a z z^T for many vectors z at once, and what each z projects on them.

One eigendecomposition of a collection's Gram matrix serves all its leave-one-out problems: leaving model i out
subtracts one dyad from the features' covariance, which in the eigenbasis is diag(values) - a z z^T. The leading
eigenvalues of that are the roots mu_j of the secular equation

    h(mu) = sum_l z_l^2 / (values_l - mu) - 1 / a = 0,      values_{j+1} <= mu_j <= values_j,

and h grows monotonically from -inf to +inf between two poles. The squared projection of z on the j-th new unit
eigenvector follows from the root alone: 1 / (a^2 h'(mu_j)).

NumPy float64 on the host: the unknowns of all models are iterated together, block by block inside the cache.
"""

import numpy as np

# Weights are raised to this share of the largest eigenvalue: a root then never coincides with a pole, so that
# deflation (a zero weight) needs no case of its own, and what is added to a projection is below 1e-29 of it.
WEIGHT_FLOOR = 1e-30
# Poles closer than this share of the largest eigenvalue count as one; the root between them projects nothing,
# since its projection is below gap^2 / (4 WEIGHT_FLOOR) = 2.5e-11 of the largest eigenvalue even at the floor.
GAP_FLOOR = 1e-20
STEP_TOLERANCE = 1e-10  # relative to the distance to the nearer pole; projections follow within twice that
MAX_ITERATIONS = 80  # 4 to 8 are typical; bisection alone needs about 40 for STEP_TOLERANCE
BLOCK_ELEMENTS = 1 << 17  # float64 numbers a work array: 1 MiB, fastest of 2^14 to 2^19 at N = 500, k = 32


def downdate(values, weights, leverage, *, rank):
    """Leading eigenvalues after subtracting leverage_i z_i z_i^T, and the squared projections of z_i on them.

    Args:
        values: (n,) float64 eigenvalues before, non-increasing, none negative, the first positive.
        weights: (N, n) float64 squared entries z_il^2 in the eigenbasis.
        leverage: (N,) float64 positive factors a_i.
        rank: number k <= n - 1 of leading eigenvalues wanted.

    Returns:
        roots: (N, k) float64 eigenvalues after, non-increasing along a row.
        projections: (N, k) float64 squared projections of z_i on the new unit eigenvectors; 0 where an
            eigenvalue is unchanged because it is repeated or z_i is orthogonal to its eigenvector.

    Fails silently where the result is rounding: roots under about n * eps * values[0].

    Source: Bunch, Nielsen, Sorensen 1978, "Rank-one modification of the symmetric eigenproblem"; iteration by the
    "middle way" of Li 1993 (LAPACK working note 89), in coordinates relative to the nearer pole, safeguarded by a
    bracket with bisection instead of its switching rule.
    """
    num_rows, size = weights.shape
    scale = values[0]
    values = values / scale
    weights = np.maximum(weights / scale, WEIGHT_FLOOR)
    inverse_leverage = 1.0 / np.asarray(leverage, np.float64)[:, None]
    roots = np.empty((num_rows, rank))
    slopes = np.empty((num_rows, rank))
    if rank:
        step = max(1, BLOCK_ELEMENTS // (rank * size))
        poles = values[None, :] - values[: rank + 1, None]  # (k + 1, n): distance of every pole from pole j
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            roots[rows], slopes[rows] = _solve(values, poles, weights[rows], inverse_leverage[rows])
    single = values[:rank] - values[1 : rank + 1] <= GAP_FLOOR
    projections = np.where(single, 0.0, inverse_leverage**2 / slopes)
    return roots * scale, projections * scale


def _solve(values, poles, weights, inverse_leverage):
    """Roots and slopes h' of one block of rows; `weights` (m, n), `poles` (k + 1, n), results (m, k)."""
    rank = len(poles) - 1
    gaps = np.maximum(values[:rank] - values[1 : rank + 1], GAP_FLOOR)
    from_upper, lower, upper, t = _start(poles, gaps, weights, inverse_leverage)
    origin = np.where(from_upper, 0, 1) + np.arange(rank)  # row of `poles`: j for the upper pole, j + 1 for the lower
    lo = np.where(from_upper, -0.5 * gaps, 0.0)
    hi = np.where(from_upper, 0.0, 0.5 * gaps)
    distances = poles[origin]  # (m, k, n)
    work = np.empty_like(distances)
    column = weights[:, :, None]
    above = np.tri(rank)[None]  # poles l <= j lie above root j
    slopes = np.empty_like(t)
    done = np.zeros(t.shape, bool)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(MAX_ITERATIONS):
            np.subtract(distances, t[:, :, None], out=work)
            np.divide(1.0, work, out=work)
            h = np.matmul(work, column)[:, :, 0] - inverse_leverage
            np.multiply(work, work, out=work)
            slope = np.matmul(work, column)[:, :, 0]
            slope_above = np.matmul(work[:, :, :rank] * above, column[:, :rank])[:, :, 0]
            slopes = np.where(done, slopes, slope)
            lo, hi = np.where(h < 0, t, lo), np.where(h < 0, hi, t)
            to_lower, to_upper = lower - t, upper - t
            rest = h - to_lower * (slope - slope_above) - to_upper * slope_above
            product = to_lower * to_upper
            move = _root(rest, (to_lower + to_upper) * h - product * slope, product * h)
            target = t + move
            # Judged before the bracket: at the root, rounding may point the last tiny step out of it.
            done |= np.minimum(np.abs(move), hi - lo) <= STEP_TOLERANCE * np.abs(t)
            if done.all():
                break
            inside = (target > lo) & (target < hi)
            t = np.where(done, t, np.where(inside, target, 0.5 * (lo + hi)))
    return np.maximum(values[np.arange(rank) + np.where(from_upper, 0, 1)] + t, 0.0), slopes


def _start(poles, gaps, weights, inverse_leverage):
    """Which pole is nearer, where both poles lie relative to it, and a first guess from them and a constant."""
    rank = len(gaps)
    k = np.arange(rank)
    middle = 1.0 / (poles[1:] - 0.5 * gaps[:, None])  # (k, n): the same points for every row
    h = np.matmul(weights, middle.T) - inverse_leverage
    from_upper = h < 0
    lower = np.where(from_upper, -gaps, 0.0)
    upper = np.where(from_upper, 0.0, gaps)
    below, above = weights[:, k + 1], weights[:, k]
    rest = h + 2.0 * (below - above) / gaps
    guess = _root(rest, rest * (lower + upper) + below + above, rest * lower * upper + below * upper + above * lower)
    lo, hi = np.where(from_upper, -0.5 * gaps, 0.0), np.where(from_upper, 0.0, 0.5 * gaps)
    inside = np.isfinite(guess) & (guess > lo) & (guess < hi)
    return from_upper, lower, upper, np.where(inside, guess, 0.5 * (lo + hi))


def _root(c, a, b):
    """The zero of c t^2 - a t + b that lies between the poles of the two-pole model behind it."""
    root = np.sqrt(np.maximum(a * a - 4.0 * b * c, 0.0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(a > 0, 2.0 * b / (a + root), (a - root) / (2.0 * c))
