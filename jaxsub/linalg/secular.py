"""Leading eigenvalues of diag(d) - a z z^T for many vectors z at once, and what each z projects on them.

One eigendecomposition of a collection's Gram matrix serves all its leave-one-out problems: leaving model i out
subtracts one dyad from the features' covariance, which in the eigenbasis is diag(values) - a z z^T. The leading
eigenvalues of that are the roots mu_j of the secular equation

    h(mu) = sum_l z_l^2 / (values_l - mu) - 1 / a = 0,      values_{j+1} <= mu_j <= values_j,

and h grows monotonically from -inf to +inf between two poles. The squared projection of z on the j-th new unit
eigenvector follows from the root alone: 1 / (a^2 h'(mu_j)).

NumPy float64 on the host: the unknowns of all models are iterated together, block by block inside the cache.
"""

import dataclasses

import numpy as np

# Weights are raised to this share of the largest eigenvalue: a root then never coincides with a pole, so that
# deflation (a zero weight) needs no case of its own, and what is added to a projection is below 1e-29 of it.
WEIGHT_FLOOR = 1e-30
# Poles closer than this share of the largest eigenvalue count as one; the root between them projects nothing,
# since its projection is below gap^2 / (4 WEIGHT_FLOOR) = 2.5e-11 of the largest eigenvalue even at the floor.
GAP_FLOOR = 1e-20
STEP_TOLERANCE = 1e-10  # relative to the distance to the nearer pole; projections follow within twice that
MAX_ITERATIONS = 80  # 4 to 8 are typical; bisection alone needs about 40 for STEP_TOLERANCE
# Poles further from a root's interval than this many half widths enter as a polynomial. Chebyshev interpolation
# then errs by (NEAR + sqrt(NEAR^2 - 1))^-(DEGREE + 1) = 2e-11, as does its change to monomials (condition 4e4).
NEAR, DEGREE = 5.0, 10
# Of the integral behind `explained`: nodes are a factor exp(NODE_STEP) apart, from LEAST of the pole that it passes to
# MOST of the largest. The step errs by exp(-pi^2 / NODE_STEP) = 3e-9; a root nearer to the pole than LEAST counts half.
NODE_STEP, LEAST, MOST = 0.5, 1e-7, 1e3
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
    bracket with bisection instead of its switching rule. Where the spectrum is flat, poles far from a root enter as a
    polynomial (the idea of Gu and Eisenstat 1995's fast multipole solver): flat spectra are what null models have.
    """
    num_rows, size = weights.shape
    scale = values[0]
    values = values / scale
    weights = np.maximum(weights / scale, WEIGHT_FLOOR)
    inverse_leverage = 1.0 / np.asarray(leverage, np.float64)[:, None]
    roots = np.empty((num_rows, rank))
    slopes = np.empty((num_rows, rank))
    for poles in _poles(values, rank):
        step = max(1, BLOCK_ELEMENTS // poles.near.size)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            found = _solve(poles, weights[rows], inverse_leverage[rows])
            roots[rows, poles.index], slopes[rows, poles.index] = found
    single = values[:rank] - values[1 : rank + 1] <= GAP_FLOOR
    projections = np.where(single, 0.0, inverse_leverage**2 / slopes)
    return roots * scale, projections * scale


def explained(values, weights, leverage, ks):
    """Sums over the first k new eigenvectors of 1 / h', which are leverage**2 times the projections of `downdate`.

    One product of matrices and no iteration: 1 / h' is the residue of 1 / h at a root, and the roots right of pole
    k + 1 are the first k. With 1 / h = -a + a^2 |z|^2 / mu + ... far out, and h infinite at the pole itself,

        sum_{j <= k} 1 / h'(mu_j) = a^2 |z|^2 / 2 - (1 / pi) int_0^inf Re(1 / h(values_{k+1} + i t) + a) dt,

    where t = exp(s) makes the trapezoidal rule exponentially accurate: in s no root is nearer than i pi / 2.

    Args:
        values: (n,) as in `downdate`, those up to the last pole that is passed well above rounding.
        weights: (N, n).
        leverage: (N,).
        ks: numbers of eigenvectors, each from 0 to n - 1.

    Returns:
        (N, len(ks)) float64. To 1e-7 of |z|^2 for generic weights; roots within LEAST of a pole count half.

    Source: trapezoidal rule after an exponential change of variable, Trefethen and Weideman 2014, SIAM Review 56(3).
    """
    scale, leverage = values[0], np.asarray(leverage, np.float64)[:, None]
    values, weights = values / scale, weights / scale
    heights = [np.exp(np.arange(np.log(MOST), np.log(LEAST * values[k]) - NODE_STEP, -NODE_STEP)) for k in ks]
    t = np.concatenate([*heights, []])
    apart = values[:, None] - np.repeat(values[np.asarray(ks, int)], [len(h) for h in heights])
    inverse = 1.0 / (np.square(apart) + np.square(t))
    real = weights @ (apart * inverse) - 1.0 / leverage
    imaginary = weights @ (t * inverse)
    parts = (real / (np.square(real) + np.square(imaginary)) + leverage) * (NODE_STEP * t)
    ends = np.cumsum([len(h) for h in heights])
    found = np.empty((len(weights), len(heights)))
    for j, (end, h) in enumerate(zip(ends, heights, strict=True)):
        own = parts[:, end - len(h) : end]
        # Beyond both ends the terms fall as geometric series.
        found[:, j] = own.sum(axis=1) + (own[:, 0] + own[:, -1]) / np.expm1(NODE_STEP)
    return (0.5 * leverage**2 * weights.sum(axis=1, keepdims=True) - found / np.pi) * scale


@dataclasses.dataclass(frozen=True)
class _Poles:
    """Some of the leading roots, which poles are near each, and the polynomial that stands for the others."""

    values: np.ndarray  # (n,) all poles
    index: np.ndarray  # (k,) the roots: root j lies between poles j and j + 1
    gaps: np.ndarray  # (k,) between these two
    half: np.ndarray  # (k,) half widths of the intervals on which the polynomials hold
    near: np.ndarray  # (S, k) a window of poles around each root; all n where windows would be wide
    far: np.ndarray | None  # (n, k, DEGREE + 1): weights @ far are coefficients in (mu - centre) / half


def _poles(values, rank):
    """The leading `rank` roots, as one `_Poles` of those with narrow windows and one of the others."""
    size, index = len(values), np.arange(rank)
    gaps = np.maximum(values[:rank] - values[1 : rank + 1], GAP_FLOOR)
    centre = 0.5 * (values[:rank] + values[1 : rank + 1])
    # Not narrower than a part of the mean gap: slopes of the polynomial are divided by it.
    half = 0.5 * np.maximum(gaps, (values[0] - values[rank]) / (8.0 * max(rank, 1)))
    inside = np.abs(values - centre[:, None]) <= NEAR * half[:, None]
    narrow = 3 * inside.sum(axis=1) <= size
    if narrow.any():
        own = index[narrow]
        width = inside[own].sum(axis=1).max()
        near = np.clip(inside[own].argmax(axis=1), 0, size - width) + np.arange(width)[:, None]
        nodes = np.cos(np.pi * (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1))
        others = np.ones((size, len(own)))
        np.put_along_axis(others, near, 0.0, axis=0)
        apart = np.where(others > 0, values[:, None] - centre[own], np.inf)[:, :, None]
        far = 1.0 / (apart - half[own, None] * nodes)
        far = far @ np.linalg.inv(np.vander(nodes, increasing=True)).T
        yield _Poles(values, own, gaps[own], half[own], near, far)
    if not narrow.all():
        own = index[~narrow]
        near = np.broadcast_to(np.arange(size)[:, None], (size, len(own)))
        yield _Poles(values, own, gaps[own], half[own], near, None)


def _solve(poles, weights, inverse_leverage):
    """Roots and slopes h' of one block of rows, both (m, k); `weights` (m, n)."""
    gaps, index = poles.gaps, poles.index
    from_upper, lower, upper, t = _start(poles, weights, inverse_leverage)
    # Near poles lead, so that sums over them are sums of whole (m, k) arrays; places are relative to the nearer pole.
    places = poles.values[poles.near][:, None, :]
    at = {
        "offsets": np.where(from_upper, places - poles.values[index], places - poles.values[index + 1]),
        "near": weights.T[:, :, None] if poles.far is None else weights.T[poles.near].transpose(0, 2, 1),
        "above": (poles.near <= index).astype(np.float64)[:, None, :],
        "inverse_leverage": inverse_leverage,
        "lower": lower,
        "upper": upper,
        "lo": np.where(from_upper, -0.5 * gaps, 0.0),
        "hi": np.where(from_upper, 0.0, 0.5 * gaps),
        "t": t,
    }
    if poles.far is not None:
        at["far"] = np.moveaxis(np.tensordot(weights, poles.far, 1), 2, 0)
        at["side"], at["half"] = np.where(from_upper, 0.5 * gaps, -0.5 * gaps) / poles.half, poles.half
    shifts, slopes = np.empty(t.size), np.empty(t.size)
    unsolved = np.arange(t.size).reshape(t.shape)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(MAX_ITERATIONS):
            shifts[unsolved] = at["t"]
            slopes[unsolved], done = _step(at)
            if done.all():
                break
            if 4 * np.count_nonzero(done) < done.size:
                at["t"] = np.where(done, shifts[unsolved], at["t"])
                continue
            # Most roots take 3 or 4 steps, one in a thousand takes 8: go on with those alone.
            left = ~done
            unsolved = unsolved[left]
            at = {
                n: np.broadcast_to(a, (*a.shape[: max(0, a.ndim - left.ndim)], *left.shape))[..., left]
                for n, a in at.items()
            }
    nearer = poles.values[index + np.where(from_upper, 0, 1)]
    return np.maximum(nearer + shifts.reshape(nearer.shape), 0.0), slopes.reshape(nearer.shape)


def _step(at):
    """One step for all roots; moves `t`, `lo` and `hi` of the state in place.

    Returns:
        The slopes h' before the step, and which roots were found before it.
    """
    t, lower, upper = at["t"], at["lower"], at["upper"]
    inverse = 1.0 / (at["offsets"] - t)
    parts = at["near"] * inverse
    h = parts.sum(axis=0) - at["inverse_leverage"]
    parts *= inverse
    slope = parts.sum(axis=0)
    slope_above = (parts * at["above"]).sum(axis=0)
    if "far" in at:
        value, change = _polynomial(at["far"], at["side"] + t / at["half"])
        change = change / at["half"]
        h, slope = h + value, slope + change
        slope_above += 0.5 * change  # any share serves: it steers the step, not the root
    at["lo"], at["hi"] = lo, hi = np.where(h < 0, t, at["lo"]), np.where(h < 0, at["hi"], t)
    to_lower, to_upper = lower - t, upper - t
    rest = h - to_lower * (slope - slope_above) - to_upper * slope_above
    product = to_lower * to_upper
    move = _root(rest, (to_lower + to_upper) * h - product * slope, product * h)
    target = t + move
    inside = (target > lo) & (target < hi)
    at["t"] = np.where(inside, target, 0.5 * (lo + hi))
    # Judged before the bracket: at the root, rounding may point the last tiny step out of it.
    return slope, np.minimum(np.abs(move), hi - lo) <= STEP_TOLERANCE * np.abs(t)


def _polynomial(coefficients, u):
    """Value and slope at u of polynomials with coefficients (degree + 1, ...), the constant first (Horner)."""
    value, slope = coefficients[-1], np.zeros_like(u)
    for c in coefficients[-2::-1]:
        slope = slope * u + value
        value = value * u + c
    return value, slope


def _start(poles, weights, inverse_leverage):
    """Which pole is nearer, where both poles lie relative to it, and a first guess from them and a constant."""
    gaps, values, k = poles.gaps, poles.values, poles.index
    middle = 1.0 / (values - values[k + 1, None] - 0.5 * gaps[:, None])  # (k, n), the same for every row
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
