"""Tucker decompositions of a stack of low-rank updates W_n = scale_n B_n A_n that never form a product B_n A_n.

    W_n  ~  U.T S_n V,     U (k_o, o), V (k_i, i) with orthonormal rows shared by all models,     S_n = U W_n V.T

Everything rests on one rewriting: with P_n = (B_n.T B_n)^(1/2), r x r, the small stack T_n = scale_n P_n A_n (r, i)
has W_n.T W_n = T_n.T T_n. So C_in = sum_n W_n.T W_n is a mode Gram of T (N, r, i), C_out that of B_n (A_n A_n.T)^(1/2).
All results depend on the updates alone: B_n -> B_n R, A_n -> R^-1 A_n changes nothing but rounding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors, precision
from jaxsub.linalg import dealt, leading, mode_gram as grams, products, ranking, symmetric, unfold

ROUNDING = 8.0  # eps that rounding may add to a relative residual; test_factored.py, many trials
# The same for factors that LAPACK finds in the dtype of the products, as in `tucker`: 8.04 were seen at 5 x 64.
LAPACK_ROUNDING = 24.0
BLOCK = 512  # rows of the mean update formed at once


class FactoredTucker(NamedTuple):
    """Shared factors and cores of a stack of low-rank updates; errors are relative to the norm of the stack."""

    cores: jax.Array  # (N, k_o, k_i) S_n = U W_n V.T; minus their mean if the fit is centred
    factors: tuple  # U (k_o, o), V (k_i, i): orthonormal rows, largest entry of each positive
    energies: tuple  # for U and V: float64 eigenvalues of C_out and C_in, all or the leading k
    totals: tuple  # () float64 their sums, both the squared norm of the stack
    floors: tuple  # () float64 value under which an energy is noise
    error: jax.Array  # () float64 relative error, from the parts outside the factors: nothing cancels
    certificate: jax.Array  # () float64 bound that rounding does not break
    lower: jax.Array  # () no factors of these ranks have a smaller relative error (E12)
    upper: jax.Array  # () root of the sum of both tails: bounds the error of HOSVD (E12)
    num_passes: int  # reads of all A and B
    sweeps: tuple  # relative error after each sweep of `hooi`, the start first; empty after `hosvd`


def mode_gram(a, b, scales, *, side, centred=False, dtype="float32"):
    """C_in = sum_n W_n.T W_n or C_out = sum_n W_n W_n.T of W_n = scale_n B_n A_n (E19).

    Args:
        a: (N, r, i) right factors; mixed ranks padded with zero rows (exact).
        b: (N, o, r) left factors.
        scales: (N,) alpha / r of each adapter. All three may be dealt to devices, which exchange the result alone.
        side: "in" or "out".
        centred: of W_n minus the mean update. By C - N M.T M: where the mean holds all but a share eps(dtype) of the
            energy, what is left is rounding.
        dtype: "float32" or "float64", the dtype of the products.

    Returns:
        (i, i) or (o, o) float64. Cost N r d**2 / 2 multiply-adds, centred once more N r o i for the mean in row blocks.

    Raises:
        ConfigError: if the shapes do not belong together, or `side` is not one of the two.

    Fails on: factors of a pair whose columns are parallel to within sqrt(eps(dtype)): B.T B is formed (its columns
    scaled to unit norm first, so factors of very different size lose nothing).
    """
    _check(a, b, scales)
    if side not in ("in", "out"):
        raise errors.ConfigError(f"side = {side!r}; in or out")
    return _gram(a, b, jnp.asarray(scales), side=side, centred=centred, dtype=dtype, mesh=_mesh(a, centred))


def _mesh(a, centred):
    """The mesh that models are dealt to, or None; the mean of updates is made on one device."""
    mesh = dealt.mesh_of(a)
    if mesh is not None and centred:
        raise errors.ConfigError("a centred fit takes low-rank updates of one device")
    return mesh


@functools.partial(jax.jit, static_argnames=("side", "centred", "dtype", "mesh"))
def _gram(a, b, scales, other=None, *, side, centred, dtype, mesh):
    """`mode_gram`; with `other` (k, d), directions of the other side, of what the updates are in their span."""

    def turned(a, b, other):
        if side == "out":
            a, b = jnp.swapaxes(b, 1, 2), jnp.swapaxes(a, 1, 2)
        return a, b if other is None else products.einsum("kd,ndr->nkr", other, b.astype(dtype))

    def local(parts, other=None):
        a, b, scales = parts
        return grams.mode_gram(_small_stack(*turned(a, b, other), scales, dtype), axis=2, dtype=dtype)

    whole = () if other is None else (other,)
    gram = dealt.sums(local, mesh)((a, b, scales), *whole)
    return gram - _mean_gram(*turned(a, b, other), scales, dtype) if centred else gram


def _small_stack(a, b, scales, dtype):
    """T (N, r, i) with T_n.T T_n = W_n.T W_n."""
    a, b = a.astype(dtype), b.astype(dtype)
    norms = jnp.sqrt(jnp.sum(jnp.square(b), axis=1))
    safe = jnp.where(norms > 0, norms, 1)
    unit = b / safe[:, None, :]
    inner = products.einsum("nor,nos->nrs", unit, unit).astype(jnp.float64)
    values, vectors = jnp.linalg.eigh(inner)
    root = products.einsum("nrk,nk,nsk->nrs", vectors, jnp.sqrt(jnp.maximum(values, 0)), vectors)
    root = (root * (scales.astype(jnp.float64)[:, None] * norms)[:, None, :]).astype(dtype)
    return products.row_major(products.einsum("nrs,nsi->nri", root, a))


def _mean_gram(a, b, scales, dtype):
    """N M.T M (i, i) of the mean update M, formed a block of rows at a time."""
    right, left = _mean_factors(a, b, scales, dtype)
    rows = left.shape[0]

    def piece(start, number):
        block = jax.lax.dynamic_slice_in_dim(left, start, number)
        return products.row_major(products.row_major(products.matmul(block, right)).T)

    size = right.shape[1]
    sums = symmetric.zeros(size, jnp.float64)
    return symmetric.assemble(grams.accumulate_pieces(rows, min(BLOCK, rows), 1, piece, sums), size)


def _mean_factors(a, b, scales, dtype):
    """(N r, i) and (o, N r) whose product, summed over models, is sqrt(N) times the mean update."""
    num_models, rank, size = a.shape
    weights = scales.astype(dtype) / jnp.sqrt(jnp.asarray(num_models, dtype))
    left = jnp.transpose(b.astype(dtype) * weights[:, None, None], (1, 0, 2)).reshape(b.shape[1], num_models * rank)
    return a.astype(dtype).reshape(num_models * rank, size), products.row_major(left)


def hosvd(a, b, scales, *, ranks=None, energy=None, error=None, centred=False, dtype="float32", method="auto"):
    """HOSVD of a stack of low-rank updates with the models axis free: leading directions of C_out and C_in.

    Args:
        a: (N, r, i), see `mode_gram`.
        b: (N, o, r).
        scales: (N,).
        ranks: (k_o, k_i).
        energy: tau in (0, 1]: the fewest directions with this share of the energy, on each side (E4).
        error: epsilon >= 0: the sides share epsilon**2 of the squared norm, see `ranking.Choice`. Exactly one of the
            three.
        centred: subtract the mean update first (in the cores and everywhere).
        dtype: "float32" or "float64", the dtype of the products.
        method: of `leading.leading`.

    Returns:
        FactoredTucker. The error is at most sqrt(2) times the best of these ranks.

    Raises:
        ConfigError: if a rank, tau or epsilon is impossible, or not exactly one rule is given.

    Source: De Lathauwer, De Moor and Vandewalle 2000; gauge-invariant operators of methods E19.
    """
    _check(a, b, scales)
    scales = jnp.asarray(scales)
    sizes = (b.shape[1], a.shape[2])
    rule = ranking.Rule.create(sizes, ranks, energy, error)
    if len(rule.axes) < 2:
        raise errors.ConfigError(f"ranks {ranks}; both sides of an update are reduced")
    found, choice = {}, ranking.Choice(rule, sizes)
    for axis in rule.short_last(sizes):
        gram = mode_gram(a, b, scales, side=("out", "in")[axis], centred=centred, dtype=dtype)
        rank = rule.ranks.get(axis, sizes[axis])
        one = leading.leading(gram, rank=rank, dtype=dtype, method=method)
        if not rule.ranks:
            one = one._replace(vectors=one.vectors[: choice.rank(axis, one.values, one.total)])
        found[axis] = one
    found = [found[0], found[1]]
    return _finish(a, b, scales, found, found[0].total, centred, dtype, num_passes=3)


def hooi(a, b, scales, *, sweeps=20, tolerance=1e-6, centred=False, dtype="float32", method="auto", **ranks):
    """JD-Full (E39) of low-rank updates: min over orthonormal U, V of sum_n |W_n - U.T S_n V|**2, alternating.

    Arguments as in `hosvd`, which is the start, and:
        sweeps: most sweeps, >= 1, each of two passes over the factors.
        tolerance: stop when a sweep lowers the squared error by less than this share of it.

    Returns:
        FactoredTucker, never with a larger error than the start; `energies` and bounds are those of the start.

    Raises:
        ConfigError: as `hosvd`, or if `sweeps` is less than 1.

    Fails on: several local optima: it finds one near the start. Not traceable, it stops by numbers on the host.

    Source: Gabrielsson et al. 2024 (JD-Full), which is HOOI of De Lathauwer et al. 2000 with a free axis.
    """
    if sweeps < 1:
        raise errors.ConfigError(f"sweeps = {sweeps}; at least one")
    best = hosvd(a, b, scales, centred=centred, dtype=dtype, method=method, **ranks)
    scales, history, passes = jnp.asarray(scales), [best.error], best.num_passes
    start = best
    for _ in range(sweeps):
        u, v = best.factors
        if u.shape[0] == u.shape[1] and v.shape[0] == v.shape[1]:
            break
        pairs = []
        for side, other in (("out", v), ("in", None)):
            other = pairs[0].vectors if other is None else other
            # y_n = W_n V.T is a low-rank update with the right factor A_n V.T: the same Gram matrix, a small side.
            how = {"centred": centred, "dtype": dtype, "mesh": _mesh(a, centred)}
            gram = _gram(a, b, scales, other, side=side, **how)
            rank = (u if side == "out" else v).shape[0]
            pairs.append(leading.leading(gram, rank=rank, dtype=dtype, method=method))
        passes += 2
        new = _finish(a, b, scales, pairs, best.totals[0], centred, dtype, num_passes=passes)._replace(
            totals=best.totals
        )
        before, after = float(best.error) ** 2, float(new.error) ** 2
        if not after < before:
            break  # rounding: keep what is better
        best = new
        history.append(new.error)
        if before - after <= tolerance * after:
            break
    return best._replace(
        energies=start.energies,
        totals=start.totals,
        floors=start.floors,
        lower=start.lower,
        upper=start.upper,
        num_passes=passes,
        sweeps=tuple(history),
    )


def cores(a, b, scales, u, v, *, centred=False):
    """S_n = U W_n V.T (N, k_o, k_i) in the dtype of `u` (k_o, o) and `v` (k_i, i); minus their mean if `centred`."""
    return _cores(a, b, jnp.asarray(scales), u, v, centred=centred, mesh=_mesh(a, centred))


@functools.partial(jax.jit, static_argnames=("centred", "mesh"))
def _cores(a, b, scales, u, v, *, centred, mesh):
    def local(parts, u, v):
        a, b, scales = parts
        left = products.einsum("ko,nor->nkr", u, b.astype(u.dtype)) * scales.astype(u.dtype)[:, None, None]
        right = products.einsum("nri,li->nrl", a.astype(u.dtype), v)
        return products.einsum("nkr,nrl->nkl", left, right)

    found = dealt.each(local, mesh)((a, b, scales), u, v)
    return found - jnp.mean(found, axis=0) if centred else found


def residual_square(a, b, scales, u, v, *, centred):
    """sum_n |W_n - U.T U W_n V.T V|**2, () float64, as |(1 - P_U) W|**2 + |P_U W (1 - P_V)|**2: nothing cancels.

    Centred it is less N times the same of the mean update. Products in the dtype of `u`, sums in float64.
    """
    return _residual_square(a, b, scales, u, v, centred=centred, mesh=_mesh(a, centred))


@functools.partial(jax.jit, static_argnames=("centred", "mesh"))
def _residual_square(a, b, scales, u, v, *, centred, mesh):
    dtype = u.dtype

    def local(parts, u, v):
        a, b, scales = parts
        a, b = a.astype(dtype), b.astype(dtype)
        inside = products.einsum("ko,nor->nkr", u, b)
        outside_b = b - products.einsum("ko,nkr->nor", u, inside)
        outside_a = a - products.einsum("nrl,li->nri", products.einsum("nri,li->nrl", a, v), v)
        total = jnp.zeros((), jnp.float64)
        for left, right in ((outside_b, a), (inside, outside_a)):
            total += jnp.sum(jnp.square(_small_stack(right, left, scales, dtype).astype(jnp.float64)))
            if centred:
                total -= _mean_square(right, left, scales, dtype)
        return total

    return jnp.maximum(dealt.sums(local, mesh)((a, b, scales), u, v), 0)


def _mean_square(a, b, scales, dtype):
    right, left = _mean_factors(a, b, scales, dtype)
    rows = left.shape[0]
    size = unfold.divisor(rows, BLOCK)

    def one(j, total):
        block = jax.lax.dynamic_slice_in_dim(left, j * size, size)
        return total + jnp.sum(jnp.square(products.matmul(block, right).astype(jnp.float64)))

    return jax.lax.fori_loop(0, rows // size, one, jnp.zeros((), jnp.float64))


def _finish(a, b, scales, found, norm, centred, dtype, *, num_passes):
    u, v = (one.vectors for one in found)
    size = max(u.shape[1], v.shape[1])
    # The mean is taken off after the products: what rounding leaves is a share of the energy with the mean.
    raw = _raw_square(a, b, scales, dtype=dtype) if centred else None
    is_rough = jnp.dtype(dtype) == jnp.float64 or size >= leading.ITERATE_FROM
    rounding = (LAPACK_ROUNDING if is_rough else ROUNDING) * float(jnp.finfo(dtype).eps)
    square = residual_square(a, b, scales, u, v, centred=centred)
    floor = precision.gram_floor(1.0, size, dtype) ** 2
    values, totals = [one.values for one in found], [one.total for one in found]
    more = _errors(values, totals, norm, raw, square, rounding, floor, ranks=(len(u), len(v)))
    return FactoredTucker(
        cores=cores(a, b, scales, u, v, centred=centred),
        factors=(u, v),
        energies=tuple(one.values for one in found),
        totals=tuple(one.total for one in found),
        **more,
        num_passes=num_passes,
        sweeps=(),
    )


@functools.partial(jax.jit, static_argnames="ranks")
def _errors(values, totals, norm, raw, square, rounding, floor, *, ranks):
    """Floors, error, certificate and bounds; `raw` is the energy with the mean, None where that is not taken off."""
    norm = jnp.maximum(norm, 0)
    safe = jnp.where(norm > 0, norm, 1.0)
    lost, raw = (0.0, norm) if raw is None else (rounding * raw, raw)
    tails = [total - jnp.sum(one[:rank]) for one, total, rank in zip(values, totals, ranks, strict=True)]
    tails, shares = jnp.stack(tails) / safe, rounding * raw / safe
    return {
        "floors": tuple(jnp.maximum(floor * one[0], lost) for one in values),
        "error": jnp.sqrt(square / safe),
        "certificate": jnp.sqrt((square + lost) / safe) + rounding * jnp.sqrt(raw / safe),
        "lower": jnp.sqrt(jnp.clip(jnp.max(tails) - shares, 0, None)),
        "upper": jnp.sqrt(jnp.clip(jnp.sum(tails) + shares, 0, None)),
    }


@functools.partial(jax.jit, static_argnames="dtype")
def _raw_square(a, b, scales, *, dtype):
    return jnp.sum(jnp.square(_small_stack(a, b, scales, dtype).astype(jnp.float64)))


def _check(a, b, scales):
    fits = a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    if not fits or np.shape(scales) != a.shape[:1] or 0 in a.shape + b.shape:
        raise errors.ConfigError(
            f"factors of shapes {a.shape} and {b.shape} with scales {np.shape(scales)}; "
            "(N, r, i), (N, o, r) and (N,), none empty"
        )
