"""Tucker decompositions of a dense tensor: HOSVD, ST-HOSVD and HOOI, each with a certificate of its error.

    X  ~  core x_0 U_0.T x_1 U_1.T ...,     U_m (k_m, d_m) with orthonormal rows,     core = X x_0 U_0 x_1 U_1 ...

An axis without a factor is left as it is: a stack of models with the models axis free is the paper's order-2 HOSVD,
and HOOI of it is JD-Full. Nothing is centred here; a mean is the caller's to subtract.

Where the first axis is dealt to devices (`dealt`) it stays free, and devices exchange Gram matrices and norms only.

The fits are loops on the host over kernels compiled once a shape. Ranks by number without a residual pass
(`certify="norms"`) need no number on the host, so they can be traced, vmapped and jitted.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import errors
from jaxsub.linalg import dealt, leading, mode_gram as grams, orth, pieces, products, ranking, unfold

ROUNDING = 4.0  # eps a reduced axis that rounding may take off the squared norms; test_tucker.py, many trials
# The same where LAPACK finds the directions in the dtype of the products: they are orthonormal to 20 eps only
# (measured from d = 6 to 511); float64 ones rounded to float32 are so to its last bit.
LAPACK_ROUNDING = 24.0
CLOSE = 16.0  # errors whose squares are under this many times the rounding are measured by a residual pass


class Tucker(NamedTuple):
    """A Tucker decomposition and what is known of its error; errors are relative to the norm of the tensor."""

    core: jax.Array  # (k_0, ..., k_last) in the dtype of the products; d_m on a free axis
    factors: tuple  # (k_m, d_m) orthonormal rows, largest entry of each positive; None on a free axis
    energies: tuple  # float64 squared singular values of the unfolding met at each axis: all, or the k_m leading ones
    totals: tuple  # () float64 sum of all of them
    floors: tuple  # () float64 value under which an energy is noise
    error: jax.Array  # () float64 relative error, from norms or, where it is small, from the residual
    certificate: jax.Array  # () float64 bound that rounding does not break: never less than the true relative error
    lower: jax.Array  # () no decomposition of these ranks has a smaller relative error (E12)
    upper: jax.Array  # () root of the sum of the tails: bounds the error (E12), ST-HOSVD attains it
    num_passes: int  # reads of the full tensor
    sweeps: tuple  # relative error after each sweep of HOOI, the start first; empty elsewhere


class _Mode(NamedTuple):
    factor: jax.Array
    energies: jax.Array
    total: jax.Array
    floor: jax.Array


def hosvd(x, *, ranks=None, energy=None, error=None, axes=None, dtype="float32", method="auto", certify="auto"):
    """Truncated higher-order SVD: each factor from the mode Gram of the full tensor.

    Args:
        x: tensor (d_0, ..., d_last) of any float dtype.
        ranks: for each axis its rank, or None to leave the axis free.
        energy: tau in (0, 1], or one for each of `axes`: the fewest directions whose energies are at least this share
            of the axis's own total (E4).
        error: epsilon >= 0: the axes share epsilon**2 |X|**2, so the result is within epsilon, up to the floor of the
            products; see `ranking.Choice`. Exactly one of `ranks`, `energy`, `error`.
        axes: axes to reduce with `energy` or `error`; default all.
        dtype: "float32" or "float64", the dtype of the products.
        method: of `leading.leading`; ranks that are chosen take the whole spectrum from LAPACK.
        certify: "norms" (no further pass, traceable; resolves relative errors down to 1e-3 in float32), "residual"
            (one more pass; down to 1e-5), or "auto": residual only where the norms do not resolve the error.

    Returns:
        Tucker. The error is at most sqrt(m) times that of the best decomposition of these ranks.
        A zero tensor gives rank 1 where ranks are chosen, zero energies and error 0.

    Raises:
        ConfigError: if a rank, tau or epsilon is impossible, or not exactly one rule is given.

    Fails on: energies under 64 eps(dtype) of the largest, which are noise (Gram path): see `floors`.

    Source: De Lathauwer, De Moor and Vandewalle 2000, SIAM J. Matrix Anal. 21(4), property 10 (the error bounds).
    """
    rule = ranking.Rule.create(x.shape, ranks, energy, error, axes)
    modes, choice = {}, ranking.Choice(rule, x.shape)
    for axis in rule.short_last(x.shape):
        modes[axis] = _directions(x, axis, choice, dtype, method, norm=None, thin=False)
    core = unfold.mode_products(x, _factors(x, modes), dtype=dtype)
    return _finish(x, core, modes, dtype, certify, num_passes=len(modes) + 1)


def sthosvd(
    x, *, ranks=None, energy=None, error=None, axes=None, order=None, dtype="float32", method="auto", certify="auto"
):
    """Sequentially truncated HOSVD: each factor from the tensor that the factors before it have shrunk.

    Arguments as in `hosvd`, and:
        order: the axes to reduce, in the order in which it is done. Default: the order with the fewest operations
            where ranks are given (at most six axes), else short axes last and small before large.

    Returns:
        Tucker. `energies` are of the shrunk tensors, `upper` equals the error; both errors are at most sqrt(m) times
        the best. The first axis read costs two passes; what follows works on the shrunk tensor.

    Raises:
        ConfigError: as `hosvd`, or if `order` does not name the axes to reduce.

    Fails on: as `hosvd`.

    Source: Vannieuwenhoven, Vandebril and Meerbergen 2012, SIAM J. Sci. Comput. 34(2), algorithm 1 and theorem 5.1.
    Departure: where a shrunk unfolding is four times as high as wide, QR and SVD replace its Gram matrix.
    """
    rule = ranking.Rule.create(x.shape, ranks, energy, error, axes)
    y, norm, modes, choice = x, None, {}, ranking.Choice(rule, x.shape)
    for axis in rule.order(x.shape, order):
        found = _directions(y, axis, choice, dtype, method, norm=norm, thin=y is not x)
        norm = found.total if norm is None else norm
        y = unfold.mode_product(y, found.factor, axis, dtype=dtype)
        modes[axis] = found
    return _finish(x, y, modes, dtype, certify, num_passes=2, norm=norm)


def hooi(x, *, sweeps=20, tolerance=1e-6, dtype="float32", method="auto", certify="auto", **ranks):
    """Higher-order orthogonal iteration: alternating best factors from an ST-HOSVD start, never worse than it.

    With axis 0 a free models axis this is JD-Full (E39): min over orthonormal U, V of sum_n |W_n - U.T S_n V|**2.

    Arguments as in `sthosvd` (which chooses the ranks if they are not given), and:
        sweeps: most sweeps over the axes, >= 1.
        tolerance: stop when a sweep lowers the squared relative error by less than this share of it.

    Returns:
        Tucker; `sweeps` holds the errors, `energies` and `lower` are those of the start. One pass an axis and sweep.

    Raises:
        ConfigError: as `sthosvd`, or if `sweeps` is less than 1.

    Fails on: several local optima: it finds one near the start, not always the best. It stops by numbers on the host
    and cannot be traced.

    Source: De Lathauwer, De Moor and Vandewalle 2000, SIAM J. Matrix Anal. 21(4):1324; Kolda and Bader 2009, figure
    4.4; JD-Full: Gabrielsson et al. 2024. Departure: axes of full rank keep their factor, any basis serves.
    """
    if sweeps < 1:
        raise errors.ConfigError(f"sweeps = {sweeps}; HOOI takes at least one sweep")
    start = sthosvd(x, dtype=dtype, method=method, certify="norms", **ranks)
    axes = [a for a, f in enumerate(start.factors) if f is not None and f.shape[0] < f.shape[1]]
    norm = functools.reduce(jnp.maximum, [t for t in start.totals if t is not None])  # of the axis reduced first
    best, core, passes = list(start.factors), start.core, 2
    squares = [_square_error(core, norm)]
    for _ in range(sweeps if len(axes) else 0):
        factors = list(best)
        for axis in axes:
            y = unfold.mode_products(x, factors, skip=axis, dtype=dtype)
            gram = grams.mode_gram(y, axis=axis, dtype=dtype)
            rank = factors[axis].shape[0]
            factors[axis] = leading.leading(gram, rank=rank, dtype=dtype, method=method).vectors
        new = unfold.mode_product(y, factors[axes[-1]], axes[-1])
        passes += len(axes)
        square = _square_error(new, norm)
        before = float(squares[-1])
        if not float(square) < before:
            break  # rounding, or the iteration's check was lenient: keep what is better
        best, core = factors, new
        squares.append(square)
        if before - float(square) <= tolerance * float(square) or len(axes) == 1:
            break
    modes = {
        a: _Mode(f, start.energies[a], start.totals[a], start.floors[a]) for a, f in enumerate(best) if f is not None
    }
    found = _finish(x, core, modes, dtype, certify, num_passes=passes, norm=norm)
    return found._replace(sweeps=tuple(jnp.sqrt(s) for s in squares), upper=start.upper)


def reconstruct(found, *, index=slice(None)):
    """The tensor that a decomposition stands for, core x_m U_m.T, in the dtype of the core.

    Args:
        found: Tucker.
        index: of the leading axis: a slice of it is reconstructed without the rest.

    Returns:
        (n, d_1, ..., d_last).
    """
    first, *others = found.factors
    core = found.core[index] if first is None else unfold.mode_product(found.core, first.T[index], 0)
    return unfold.mode_products(core, (None, *others), transpose=True)


def residual_square(x, core, factors, *, dtype):
    """|X - core x_m U_m.T|**2 entry by entry, () float64: one pass, one slice of the leading axis at a time.

    Args:
        x: tensor.
        core: as in `Tucker`.
        factors: as in `Tucker`.
        dtype: dtype of the products; sums are float64.
    """
    return _residual_square(x, core, factors, dtype=dtype, mesh=dealt.mesh_of(x))


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def _residual_square(x, core, factors, *, dtype, mesh=None):
    first, *others = factors

    def local(parts):
        x, core = parts

        def one(n, total):
            if first is None:
                part = jax.lax.dynamic_index_in_dim(core, n, 0, keepdims=True)
            else:
                row = jax.lax.dynamic_slice_in_dim(first, n, 1, axis=1).T
                part = unfold.mode_product(core, row, 0)
            whole = unfold.mode_products(part, (None, *others), transpose=True)[0]
            gone = pieces.part(x, n, 1)[0].astype(dtype) - whole
            return total + jnp.sum(jnp.square(gone.astype(jnp.float64)))

        return jax.lax.fori_loop(0, x.shape[0], one, jnp.zeros((), jnp.float64))

    return dealt.sums(local, mesh)((x, core))


def _directions(x, axis, choice, dtype, method, *, norm, thin):
    size = x.shape[axis]
    rest = math.prod(x.shape) // size
    rank = choice.rule.ranks.get(axis)
    thin = thin and 4 * rest <= size and (rank is None or rank <= rest)
    if thin:
        values, total, vectors, floor = _thin(x, axis=axis, dtype=dtype, mesh=dealt.mesh_of(x))
    else:
        gram = grams.mode_gram(x, axis=axis, dtype=dtype)
        values, total, vectors, floor = leading.leading(gram, rank=rank or size, dtype=dtype, method=method)
    if rank is None:
        rank = choice.rank(axis, values, total if norm is None else norm)
    return _Mode(_first(vectors, rank=rank), values, total, floor)


@functools.partial(jax.jit, static_argnames="rank")
def _first(rows, *, rank):
    return rows[:rank]


@functools.partial(jax.jit, static_argnames=("axis", "dtype", "mesh"))
def _thin(x, *, axis, dtype, mesh):
    """Energies, their sum, directions and floor of an unfolding higher than wide, through its triangular factor.

    One that is dealt comes together on every device: it has under a quarter of the numbers of its Gram matrix.
    """
    if mesh is not None:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
    q, r = jnp.linalg.qr(unfold.unfold(x, axis).astype(dtype))
    u, s, _ = jnp.linalg.svd(r)
    energies = jnp.square(s.astype(jnp.float64))
    floor = (len(r) * jnp.finfo(dtype).eps) ** 2 * energies[0]
    return energies, jnp.sum(energies), orth.fix_signs(products.matmul(u.T, q.T)), floor


def _rounding(size, dtype):
    """Share of the squared norm that rounding may take off along one axis of this size."""
    is_rough = jnp.dtype(dtype) == jnp.float64 or size >= leading.ITERATE_FROM
    return (LAPACK_ROUNDING if is_rough else ROUNDING) * float(jnp.finfo(dtype).eps)


def _factors(x, modes):
    return tuple(modes[a].factor if a in modes else None for a in range(x.ndim))


def _square_error(core, norm):
    return _one_minus(core, norm, mesh=dealt.mesh_of(core))


@functools.partial(jax.jit, static_argnames="mesh")
def _one_minus(core, norm, *, mesh):
    kept = dealt.sums(lambda x: jnp.sum(jnp.square(x.astype(jnp.float64))), mesh)(core)
    return jnp.maximum(1 - kept / jnp.where(norm > 0, norm, 1), 0) * (norm > 0)


def _finish(x, core, modes, dtype, certify, *, num_passes, norm=None):
    if certify not in ("auto", "norms", "residual"):
        raise errors.ConfigError(f"certify = {certify!r}; auto, norms or residual")
    factors = _factors(x, modes)
    norm = modes[min(modes)].total if norm is None else norm
    rounding = sum(_rounding(m.factor.shape[1], dtype) for m in modes.values())
    square, left = _square_error(core, norm), None
    if certify == "residual" or (certify == "auto" and float(square) < CLOSE * rounding and float(norm) > 0):
        left = residual_square(x, core, factors, dtype=dtype)
        num_passes += 1
    ranks, energies, totals = zip(*[(m.factor.shape[0], m.energies, m.total) for m in modes.values()], strict=True)
    error, certificate, lower, upper = _errors(energies, totals, norm, square, left, rounding, ranks=ranks)
    slots = range(x.ndim)
    return Tucker(
        core=core,
        factors=factors,
        energies=tuple(modes[a].energies if a in modes else None for a in slots),
        totals=tuple(modes[a].total if a in modes else None for a in slots),
        floors=tuple(modes[a].floor if a in modes else None for a in slots),
        error=error,
        certificate=certificate,
        lower=lower,
        upper=upper,
        num_passes=num_passes,
        sweeps=(),
    )


@functools.partial(jax.jit, static_argnames="ranks")
def _errors(energies, totals, norm, square, left, rounding, *, ranks):
    """Error, certificate and both bounds; `square` is of the norms, `left`, where it is known, of the residual."""
    safe, rounding = jnp.where(norm > 0, norm, 1.0), jnp.where(norm > 0, rounding, 0.0)
    tails = [(total - jnp.sum(found[:rank])) / safe for found, total, rank in zip(energies, totals, ranks, strict=True)]
    lower = jnp.sqrt(jnp.clip(jnp.max(jnp.stack(tails)) - rounding, 0, None))
    upper = jnp.sqrt(jnp.clip(sum(tails) + rounding, 0, None))
    if left is None:
        return jnp.sqrt(square), jnp.sqrt(square + rounding), lower, upper
    error = jnp.sqrt(left / safe)
    return error, error + rounding, lower, upper
