"""Orthonormal bases of tall matrices, whole on one device or with their rows sharded; the one sign convention.

    cholesky_qr2:  G = x.T x  ->  G = r.T r  ->  q = x r^-1, twice: two reads of x, 2 l^2 numbers communicated

The small factor is inverted and multiplied: a triangular solve against the long side is slower and, under automatic
sharding, gathers it. Functions with `axis` may be called inside `jax.shard_map(..., check_vma=False)` with x the local
rows and `axis` the mesh axis they are sharded over; only (l, l) matrices are communicated. Small matrices accumulate
in float64 where x64 is on. Non-finite entries spread to everything: refuse them before.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.linalg import pieces, products, symmetric

CHUNK = 4096  # rows a Gram product: as fast as 16384 at l = 64, and sums of 4096 float32 terms lose less
FEW = 512  # the same of programs side by side
NARROW = 64  # columns up to which y.T @ y is fast as it stands: 256 take half the time moved first, 48 near twice
PIECE = 2**16  # columns of rows of the host transformed at once
DEVIATION = 0.1  # |q.T q - I| after one round up to which a second one reaches round-off


def compute_dtype(x):
    """Dtype that x is computed in: float64 for float64, float32 for all narrower ones."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def wide_dtype():
    """Dtype of small accumulated matrices: float64 where x64 is on, else float32."""
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def unit_scale(largest):
    """Powers of two, shape and dtype of `largest` >= 0, that bring it to [0.5, 1); 1 for zeros."""
    exponent = jnp.frexp(jnp.where(largest > 0, largest, 1))[1]
    # 2.0**127 is float32's last power: subnormal numbers are scaled as far as that goes.
    limit = 126 if largest.dtype == jnp.float32 else 1022
    return jnp.ldexp(jnp.ones((), largest.dtype), jnp.clip(-exponent, -limit, limit))


def total(value, axis):
    """Sum of `value` over the mesh axis `axis`; `value` itself where `axis` is None."""
    return value if axis is None else jax.lax.psum(value, axis)


def gram(x, axis=None, *, dtype=None):
    """(l, l) x.T @ x of x (m, l): products in `dtype` (default: wide) a chunk of rows at a time, wide sums.

    Chunks matter: one float32 product over a million rows is a hundred times less exact than their sum. Large ones on
    one CPU device are made by programs side by side, and waited for.
    """
    return _gram(x, axis, dtype, 0)


def row_gram(x, axis=None, *, dtype=None):
    """(n, n) x @ x.T of x (n, D), its columns as the rows of `gram`: of x.T XLA would make a copy."""
    return _gram(x, axis, dtype, 1)


def _gram(x, axis, dtype, long):
    dtype = jnp.dtype(wide_dtype() if dtype is None else dtype)
    number = pieces.programs(x, x.shape[long] // FEW) if x.shape[1 - long] >= NARROW else 1
    if number == 1:
        return _joined([_gram_sums(x, axis=axis, dtype=dtype, long=long)], size=x.shape[1 - long])
    kernel = functools.partial(_gram_sums, dtype=dtype, long=long, number=number)
    return _joined(pieces.side_by_side(kernel, x, number), size=x.shape[1 - long])


@functools.partial(jax.jit, static_argnames=("axis", "dtype", "long", "number"))
def _gram_sums(x, index=None, *, axis=None, dtype, long, number=1):
    """Blocks of the Gram matrix, see `symmetric`."""
    wide, width = wide_dtype(), x.shape[1 - long]
    chunk, share = (CHUNK, None) if number == 1 else (FEW, (index, number))

    def add(start, size, sums):
        y = pieces.part(x, start, size, long).astype(dtype)
        if not long:
            y = products.row_major(products.row_major(y).T) if share or width > NARROW else y.T
        return symmetric.add(sums, symmetric.multiply(y))

    return total(pieces.fold(add, x.shape[long], chunk, symmetric.zeros(width, wide), share), axis)


@functools.partial(jax.jit, static_argnames="size")
def _joined(parts, *, size):
    return symmetric.assemble(jax.tree.map(lambda *own: sum(own), *parts), size)


def one_round(rows, gram):
    """Makes float32 rows of the host (k, D) orthonormal in place; rows of zeros stay.

    One round of CholeskyQR, for rows that nearly are orthonormal: from a condition number of 2 it reaches rounding.

    Args:
        rows: (k, D) NumPy array.
        gram: (k, k) rows @ rows.T, products in float64.

    Returns:
        (k, k) float64, lower triangular: the rows that were are it times the rows that are.

    Raises:
        numpy.linalg.LinAlgError: rows that depend on one another.
    """
    empty = np.diag(gram) == 0
    lower = np.linalg.cholesky(gram + np.diag(empty.astype(np.float64)))
    inverse = np.linalg.inv(lower)
    for start in range(0, rows.shape[1], PIECE):
        part = rows[:, start : start + PIECE]
        part[...] = inverse @ part
    return lower


def fix_signs(vt, u=None, *, axis=None):
    """Rows of vt with their entry of largest magnitude positive, and the columns of u turned along with them.

    Where the largest positive and negative entries are equally large, the row is left as it is. So neither the order of
    reduction nor the number of devices matters.

    Args:
        vt: (k, D) rows, columns possibly sharded over `axis`.
        u: (N, k) or None.
        axis: mesh axis of D inside shard_map, or None.

    Returns:
        vt (k, D), or (u, vt) if u is given.
    """
    ends = jnp.stack([jnp.max(vt, axis=1), jnp.max(-vt, axis=1)])
    ends = ends if axis is None else jax.lax.pmax(ends, axis)
    signs = jnp.where(ends[0] >= ends[1], 1, -1).astype(vt.dtype)
    vt = vt * signs[:, None]
    return vt if u is None else (u * signs.astype(u.dtype), vt)


@jax.jit
def qr(x):
    """Thin Householder QR with a non-negative diagonal of r: x = q @ r. For small matrices on one device.

    Args:
        x: (m, l) any float dtype, m >= l or not.

    Returns:
        q: (m, min(m, l)) orthonormal columns, also where x is rank-deficient (then with arbitrary ones).
        r: (min(m, l), l) upper triangular. Both float32, or float64 for float64 input.

    Fails on: nothing finite; slow for long m (`cholesky_qr2`). Source: LAPACK geqrf, orgqr.
    """
    return _positive(*jnp.linalg.qr(x.astype(compute_dtype(x))))


def _positive(q, r):
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(r.dtype)
    return q * signs, r * signs[:, None]


@functools.partial(jax.jit, static_argnames="axis")
def tsqr(x, axis=None):
    """QR of a tall matrix from the QR factors of each device's rows: x = q @ r, as stable as Householder's.

    Arguments and errors are those of `cholesky_qr2`.

    Returns:
        q: (m, l) orthonormal columns, also where x is rank-deficient: there they depend on the number of devices.
        r: (l, l) upper triangular, non-negative diagonal, replicated.

    Communicates one all-gather of P l^2 numbers. One panel a device: LAPACK on 64 panels of 16384 x 64 took 7 times as
    long as on all rows. 2 to 4 times slower than `cholesky_qr2`.
    Source: Demmel, Grigori, Hoemmen, Langou 2012, "Communication-optimal parallel and sequential QR".
    """
    _check_tall(x, axis)
    return _positive(*_tsqr(x.astype(compute_dtype(x)), axis))


def _tsqr(x, axis):
    if axis is None:
        return jnp.linalg.qr(x)
    q, r = jnp.linalg.qr(x)
    inner, whole = jnp.linalg.qr(jax.lax.all_gather(r, axis, tiled=True))
    own = jax.lax.dynamic_slice_in_dim(inner, jax.lax.axis_index(axis) * r.shape[0], r.shape[0])
    return products.matmul(q, own), whole


@functools.partial(jax.jit, static_argnames="axis")
def cholesky_qr2(x, axis=None):
    """QR of a tall matrix by two rounds of Cholesky QR, x = q @ r, with fallbacks that keep it stable.

    Args:
        x: (m, l) rows, any float dtype; inside shard_map the local rows.
        axis: mesh axis of the rows inside shard_map, or None.

    Returns:
        q: (m, l) columns orthonormal or exactly zero. Column j is zero where x_j depends on the columns before it to
            within 4 sqrt(l) eps |x_j|: the basis has no direction that x has not, and zero rows of x stay zero.
        r: (l, l) upper triangular, diagonal non-negative, row j zero where q_j is. Both float32, or float64
            for float64 input.

    Raises:
        ConfigError: if x has fewer rows (of all devices together) than columns.

    The first round is accepted if its q is within DEVIATION of orthonormal (condition up to about 1e6 for float32 with
    x64 on, 1e3 without; 1e7 for float64). Else a shifted round comes first (condition up to about 1 / eps), and if that
    does not reach it either, `tsqr` and a Gram-Schmidt of its r that leaves dependent columns out.

    Fails on: near-dependent columns in front of the tolerance, which are kept as directions of rounding.
    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015 (CholeskyQR2); Fukaya et al. 2020 (shifted CholeskyQR3);
    products of the first Gram matrix in float64 as in Yamazaki, Tomov, Dongarra 2015.
    """
    _check_tall(x, axis)
    return _cholesky_qr2(x.astype(compute_dtype(x)), axis, False)


@functools.partial(jax.jit, static_argnames="axis")
def cholesky_lq2(x, axis=None):
    """`cholesky_qr2` of x.T for x (l, m) that lies row-major, x = r.T @ q: no transposed copy of the long side.

    Returns:
        q: (l, m) rows orthonormal or zero. r: (l, l) as in `cholesky_qr2`, whose arguments and errors are these.
    """
    _check_tall(x.T, axis)
    return _cholesky_qr2(x.astype(compute_dtype(x)), axis, True)


def _cholesky_qr2(x, axis, is_wide):
    first, r1, finite = _round(x, axis, 0.0, None, is_wide)
    second, r2, close = _small_factor(gram(first.T if is_wide else first, axis, dtype=x.dtype), 0.0)

    def fast():
        return _times(first, second, is_wide), products.matmul(r2, r1).astype(x.dtype)

    def slow():
        q, r = _shifted_qr(x.T if is_wide else x, axis)
        return (q.T if is_wide else q), r

    ok = finite[0] & close[0] & close[1] & _is_independent(products.matmul(r2, r1), x)
    return jax.lax.cond(ok, fast, slow)


def _shifted_qr(x, axis):
    """CholeskyQR3: a shifted round bounds the condition, two more reach round-off; `_careful_qr` where they do not."""
    scales = _column_scales(x, axis)
    x = x * scales
    rows = x.shape[0] if axis is None else x.shape[0] * jax.lax.axis_size(axis)
    width = x.shape[1]
    # 11 (m l + l (l + 1)) u |x|^2 in the source; m l -> l sqrt(m) since chunk sums err like a random walk.
    shift = 11.0 * width * (rows**0.5 + width) * float(jnp.finfo(wide_dtype()).eps) / 2
    start, r0, _ = _round(x, axis, min(shift, 0.1), None)
    first, r1, finite = _round(start, axis, 0.0, None)
    second, r2, close = _small_factor(gram(first, axis), 0.0)

    r = products.matmul(r2, products.matmul(r1, r0))

    def three():
        return _times(first, second, False), r.astype(x.dtype)

    ok = finite[0] & close[0] & close[1] & _is_independent(r, x)
    q, r = jax.lax.cond(ok, three, lambda: _careful_qr(x, axis))
    return q, r / scales


def _careful_qr(x, axis):
    """Householder panels, then Gram-Schmidt on their triangular factor with dependent columns left out."""
    q, r = _tsqr(x, axis)
    inner, r = _gram_schmidt(r, _tolerance(x))
    return products.matmul(q, inner), r


def _tolerance(x):
    """Share of a column's length up to which what is left of it is rounding."""
    return 4 * min(x.shape) ** 0.5 * float(jnp.finfo(x.dtype).eps)


def _is_independent(r, x):
    """Whether no column of x = q @ r, zero ones aside, depends on those before it."""
    lengths = jnp.sqrt(jnp.sum(jnp.square(r), axis=0))
    return jnp.all((jnp.diagonal(r) > _tolerance(x) * lengths) | (lengths == 0))


def _gram_schmidt(x, tolerance):
    """QR of a small x (l, l) by Gram-Schmidt, twice: column j is zero where |x_j - projection| <= tolerance |x_j|."""

    def column(j, carry):
        q, r = carry
        a = x[:, j]
        c = products.matmul(q.T, a)
        y = a - products.matmul(q, c)
        d = products.matmul(q.T, y)
        y = y - products.matmul(q, d)
        norm = jnp.sqrt(products.matmul(y, y))
        keep = norm > tolerance * jnp.sqrt(products.matmul(a, a))
        y = jnp.where(keep, y / jnp.where(keep, norm, 1), 0)
        # Once more: what is left of a nearly dependent column still points back by eps / tolerance.
        y = y - products.matmul(q, products.matmul(q.T, y))
        y = y / jnp.where(keep, jnp.sqrt(products.matmul(y, y)), 1)
        c = (c + d).at[j].set(jnp.where(keep, norm, 0))
        return q.at[:, j].set(y), r.at[:, j].set(c)

    zero = jnp.zeros_like(x)
    return jax.lax.fori_loop(0, x.shape[1], column, (zero, zero))


def regularised(x, axis=None, *, is_wide=False):
    """Well-conditioned basis of the range of x (m, l) in two shifted rounds; columns near-orthonormal, never NaN.

    For between power iterations: no branch on the long side, 2 l^2 numbers communicated. Directions under about eps of
    the largest stay short instead of being blown up. Zero columns stay zero. With `is_wide`, of the rows of x (l, m).
    """
    return _regular_round(_regular_round(x, axis, is_wide), axis, is_wide)


def _regular_round(x, axis, is_wide):
    g = gram(x.T if is_wide else x, axis, dtype=x.dtype)
    size, rows = len(g), x.shape[1] if is_wide else x.shape[0]
    rows = rows if axis is None else rows * jax.lax.axis_size(axis)
    eps = float(jnp.finfo(x.dtype).eps)
    inverse, _, flags = _small_factor(g, eps * min(x.shape))
    # Nearly parallel columns: rounding can make g more indefinite than that shift (2.4 l eps was seen with float64,
    # where up to a quarter of such matrices failed). The bound of `_shifted_qr` holds, but shortens more directions.
    bound = min(11.0 * size * (rows**0.5 + size) * eps / 2, 0.1)
    return _times(x, jax.lax.cond(flags[0], lambda: inverse, lambda: _small_factor(g, bound)[0]), is_wide)


def cholesky_round(x, axis=None, *, is_wide=False):
    """Columns of x (m, l), already nearly orthonormal or zero, made so to round-off by one Cholesky QR round.

    With `is_wide`, the rows of x (l, m).
    """
    return _round(x, axis, 0.0, x.dtype, is_wide)[0]


def _round(x, axis, shift, dtype, is_wide=False):
    """One Cholesky QR round: (q, r (l, l) wide, flags of `_small_factor`)."""
    inverse, r, flags = _small_factor(gram(x.T if is_wide else x, axis, dtype=dtype), shift)
    return _times(x, inverse, is_wide), r, flags


def _times(x, factor, is_wide):
    """x @ factor for (m, l), factor.T @ x for (l, m): row-major either way."""
    factor = factor.astype(x.dtype)
    return products.row_major(products.matmul(factor.T, x) if is_wide else products.matmul(x, factor))


def _small_factor(g, shift):
    """Inverse and r of a Gram matrix g (l, l) = r.T @ r, columns first scaled to unit length.

    Returns the inverse (zero columns where g has them), r, and (is finite, g is near the identity).
    """
    size = g.shape[0]
    eye = jnp.eye(size, dtype=g.dtype)
    diagonal = jnp.diagonal(g)
    present = diagonal > 0
    scales = jnp.where(present, jax.lax.rsqrt(jnp.where(present, diagonal, 1)), 0)
    unit = jnp.where(eye > 0, 1 + shift, g * scales * scales[:, None])
    lower = jnp.linalg.cholesky(unit, symmetrize_input=False)
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True).T * scales[:, None]
    inverse = jnp.where(present, inverse, 0)
    lengths = jnp.where(present, jnp.sqrt(jnp.where(present, diagonal, 1)), 0)
    r = jnp.where(present[:, None], lower.T * lengths, 0)
    is_near = jnp.max(jnp.abs(g - jnp.where(present, eye, 0))) < DEVIATION
    return inverse, r, (jnp.all(jnp.isfinite(inverse)) & jnp.all(jnp.isfinite(diagonal)), is_near)


def _column_scales(x, axis):
    """(l,) powers of two that bring the largest entry of each column to [0.5, 1); 1 for zero columns."""
    largest = jnp.max(jnp.abs(x), axis=0)
    return unit_scale(largest if axis is None else jax.lax.pmax(largest, axis))


def _check_tall(x, axis):
    rows = x.shape[0] if axis is None else x.shape[0] * jax.lax.axis_size(axis)
    if x.ndim != 2 or rows < x.shape[1]:
        shape = (rows, *x.shape[1:])
        raise errors.ConfigError(f"QR of shape {shape}: needs a matrix with at least as many rows as columns")
