"""Singular value decompositions of x (N, D): exact, from a Gram matrix, randomized, and in a single pass.

| function | right when | cost | values under |
|---|---|---|---|
| `thin_svd` | x is small | LAPACK on all of x | eps * s[0] are noise |
| `gram_svd` | one side is short, up to a few thousand | one product, one more for the long side's vectors | its floor |
| `randomized_svd` | both sides are long | `passes` products with l = rank + oversample vectors | eps * s[0] |
| `single_pass.single_pass_svd` | x comes once, in blocks | four thin products | its error estimate |

Entries of x should lie within 1e-15 and 1e15 for float32 (1e-140 and 1e150 for float64): multiply by a power of two
first, as statistics do; `thin_svd` takes more, from 1e-30 (1e-290), under which last digits are flushed to zero.

Components are rows of vt (k, D), singular values non-increasing, the largest entry of each row of vt positive; a
component that is not told from rounding has a zero row of vt and a zero column of u. Nothing is centred here:
pass rows that are. Call with x64 on: small matrices, energies and certificates are float64 (else errors.ConfigError).
On CPU call within `hostmemory.one_blas_thread()`, as the programs do: threads of LAPACK spin against XLA's otherwise.
With `axis`, inside shard_map with check_vma=False, D is sharded: u, s are replicated, vt and x are local columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxsub import errors, precision
from jaxsub.linalg import certificates, dealt, operands, orth, products, range_finder as ranges, sketch
from jaxsub.linalg.gram import FEATURES


class Svd(NamedTuple):
    """x ~ u @ diag(s) @ vt."""

    u: jax.Array  # (N, k) columns orthonormal or zero
    s: jax.Array  # (k,) non-increasing
    vt: jax.Array  # (k, D) rows orthonormal or zero


class GramSvd(NamedTuple):
    """An Svd from a Gram matrix, and what of it is signal."""

    u: jax.Array  # (N, k) columns orthonormal, or zero where not resolved
    s: jax.Array  # (min(N, D),) float64, all of them, non-increasing; those not resolved are noise
    vt: jax.Array  # (k, D) rows orthonormal, or zero where not resolved
    floor: jax.Array  # () float64 singular value under which the products' rounding drowns the rest
    is_resolved: jax.Array  # (min(N, D),) s > floor
    energy: jax.Array  # () float64 squared Frobenius norm of x


class RandomizedSvd(NamedTuple):
    """A truncated Svd and its certificate."""

    u: jax.Array  # (N, k)
    s: jax.Array  # (k,)
    vt: jax.Array  # (k, D)
    energy: jax.Array  # () float64 squared Frobenius norm of x
    tail: jax.Array  # () float64 energy - sum of s**2: the squared error of u s vt, exact but for rounding
    bound: jax.Array  # () float64 upper bound of the relative error |x - u s vt|_F / |x|_F, rounding included


@jax.jit
def thin_svd(x):
    """All singular values and vectors of a small matrix.

    Args:
        x: (N, D) any float dtype, on one device.

    Returns:
        Svd with k = min(N, D) in float32, or float64 for float64. Vectors of zero values are orthonormal too.

    Fails on: non-finite entries. Source: LAPACK gesdd; on CPU gesvd where that does not converge, as it may with
    hundreds of equal values (500 x 500 float32, OpenBLAS, one thread).
    """
    x = x.astype(orth.compute_dtype(x))
    u, s, vt = found = tuple(jnp.linalg.svd(x, full_matrices=False))
    if jax.default_backend() == "cpu":
        is_done = jnp.isfinite(s).all() | ~jnp.isfinite(x).all()
        u, s, vt = jax.lax.cond(is_done, lambda: found, lambda: _by_qr_iterations(x))
    u, vt = orth.fix_signs(vt, u)
    return Svd(u, s, vt)


def _by_qr_iterations(x):
    return tuple(jax.lax.linalg.svd(x, full_matrices=False, algorithm=jax.lax.linalg.SvdAlgorithm.QR))


def gram_svd(x, gram=None, *, rank=None, dtype=None, axis=None):
    """Singular values and vectors from the eigenproblem of the smaller Gram matrix, x @ x.T or x.T @ x.

    Args:
        x: (N, D) any float dtype; inside shard_map the local columns of N rows, N no larger than D in all.
        gram: the smaller Gram matrix of all columns, (N, N) x @ x.T or (D, D) x.T @ x, float64, where it is known with
            products of `dtype`; else it is made.
        rank: components k to return vectors of, at most min(N, D); None for all.
        dtype: "float32" or "float64", of the products; None lets `precision.compute_dtype` choose by their cost.
        axis: mesh axis of D, or None.

    Returns:
        GramSvd, vectors in float32 (float64 for float64 x).

    Raises:
        ConfigError: x64 off, an impossible rank, or sharded columns of a tall x.

    Fails on: values under the floor, 2.8e-3 of the largest with float32 products, 1e-7 to 1e-6 with float64 ones. They
    are flagged and have no vectors. Long vectors of values near the floor are divided by them and lose digits in
    proportion; Cholesky rounds restore their orthonormality.
    Source: Sirovich 1987, method of snapshots; floor: Trefethen and Bau 1997, lecture 31, and precision.gram_floor.
    """
    certificates.require_x64("gram_svd")
    num_rows, width = x.shape
    is_wide = num_rows <= width if axis is None else True
    columns = width if axis is None else width * jax.lax.axis_size(axis)
    size = min(num_rows, columns)
    if axis is not None and num_rows > columns:
        raise errors.ConfigError(f"gram_svd of ({num_rows}, {columns}): a tall x must not have sharded columns")
    rank = operands.require_rank(size if rank is None else rank, size, "x")
    work = num_rows * columns * size
    dtype = jnp.dtype(dtype or precision.compute_dtype(str(x.dtype), work))
    x = jax.device_put(x)  # once for both kernels
    gram = (orth.row_gram if is_wide else orth.gram)(x, axis, dtype=dtype) if gram is None else jnp.asarray(gram)
    return _from_gram(x, gram, rank=rank, dtype=dtype, axis=axis, is_wide=is_wide)


@functools.partial(jax.jit, static_argnames=("rank", "dtype", "axis", "is_wide"))
def _from_gram(x, gram, *, rank, dtype, axis, is_wide):
    vectors_dtype, size = orth.compute_dtype(x), len(gram)
    longest = max(x.shape) if axis is None else x.shape[1] * jax.lax.axis_size(axis)
    values, vectors = jnp.linalg.eigh((gram + gram.T) / 2)
    s = jnp.sqrt(jnp.maximum(values[::-1], 0.0))
    floor = precision.gram_floor(s[0], size, dtype.name)
    is_resolved = s > floor
    inverse = jnp.where(is_resolved, 1 / jnp.where(is_resolved, s, 1.0), 0.0)[:rank]
    short = jnp.where(is_resolved[:rank], vectors[:, ::-1][:, :rank], 0.0)
    scaled = (short * inverse).astype(vectors_dtype)
    # u_i.u_j of the long vectors errs by eps s_0^2 / (s_i s_j): near the floor they are no longer orthonormal.
    smallest = jnp.min(jnp.where(is_resolved[:rank], s[:rank], s[0]))
    loose = float(jnp.finfo(dtype).eps) / float(jnp.finfo(vectors_dtype).eps)
    limit = 4 * longest**0.5
    # And their product with x rounds by eps s_0 / s_i of its own dtype.
    is_loose = (loose * s[0] ** 2 > limit * smallest**2) | (s[0] > limit * smallest)
    if is_wide:
        vt = products.row_major(products.matmul(scaled.T, x.astype(vectors_dtype)))
        vt = jax.lax.cond(is_loose, lambda v: _tightened(v, axis, is_wide=True), lambda v: v, vt)
        u, vt = orth.fix_signs(vt, short.astype(vectors_dtype), axis=axis)
    else:
        scaled, vt = orth.fix_signs(short.T.astype(vectors_dtype), scaled)
        u = products.row_major(products.matmul(x.astype(vectors_dtype), scaled))
        u = jax.lax.cond(is_loose, _tightened, lambda v: v, u)
    return GramSvd(u, s, vt, floor, is_resolved, jnp.trace(gram))


@functools.partial(
    jax.jit, static_argnames=("rank", "oversample", "passes", "test", "range_finder", "small_svd", "axis")
)
def randomized_svd(
    x,
    key,
    *,
    rank,
    oversample=16,
    passes=4,
    test="gaussian",
    range_finder="power",
    small_svd=thin_svd,
    energy=None,
    axis=None,
):
    """Leading singular values and vectors of x from a few products with a random test matrix.

    Args:
        x: (N, D) any float dtype (computed in float32, or float64 for float64); inside shard_map its local columns.
        key: typed PRNG key; the same numbers are drawn whatever the sharding.
        rank: components k wanted, at most min(N, D), static.
        oversample: test vectors beyond the rank, l = min(rank + oversample, N, D), static. 10 and more with fast decay.
        passes: products of x with l vectors, at least 2, static; an even number starts and ends at opposite sides.
        test: name in `sketch.TESTS`, or a function of that signature, static.
        range_finder: name in `range_finder.RANGE_FINDERS`, or a function of that signature, static.
        small_svd: function of the (m, m) core to its Svd, static.
        energy: () float64 squared Frobenius norm of x if it is known; else x is read once more for it.
        axis: mesh axis of D, or None.

    Returns:
        RandomizedSvd. Values under 4 m eps s[0] are rounding: they come back as 0 with zero vectors.

    Raises:
        ConfigError: x64 off; an impossible rank, passes or name; a basis wider than x.

    Fails on: slow decay with few passes, where values come out low (never high but for rounding); the certificate
    says by how much the sum of squares falls short. Communicates N l numbers
    every second pass and a few l**2 where the long side is orthonormalised.
    Source: Halko, Martinsson, Tropp 2011, Algorithms 4.4 and 5.1; passes counted as in Bjarkason 2019.
    """
    certificates.require_x64("randomized_svd")
    num_rows, width = x.shape
    columns = width if axis is None else width * jax.lax.axis_size(axis)
    rank = operands.require_rank(rank, min(num_rows, columns), "x")
    if oversample < 0:
        raise errors.ConfigError(f"oversample={oversample}: expected 0 or more")
    total = certificates.energy(x, axis) if energy is None else energy
    x = x.astype(orth.compute_dtype(x))
    count = min(rank + oversample, num_rows, columns)
    start = 0 if axis is None else jax.lax.axis_index(axis) * width
    tests = sketch.named(test)(key, width, count, start=start).astype(x.dtype)
    basis, image = ranges.named(range_finder)(x, tests, passes=passes, axis=axis)
    size = basis.shape[1] if passes % 2 == 0 else basis.shape[0]
    if not rank <= size <= min(num_rows, columns):
        raise errors.ConfigError(f"a basis of {size} vectors for rank {rank} of ({num_rows}, {columns}): fewer passes?")
    if passes % 2 == 0:
        other, core = orth.cholesky_lq2(image, axis)
        u, s, vt = small_svd(core.T)
        u, vt = products.matmul(basis, u[:, :rank]), products.matmul(vt[:rank], other)
    else:
        other, core = orth.cholesky_qr2(image)
        u, s, vt = small_svd(core)
        u, vt = products.matmul(other, u[:, :rank]), products.matmul(vt[:rank], basis)
    # A solver that failed gives NaN, which stays one: it is no value under the rounding.
    is_signal = ~(s[:rank] <= 4 * size * float(jnp.finfo(x.dtype).eps) * s[0])
    s = jnp.where(is_signal, s[:rank], 0)
    u, vt = orth.fix_signs(jnp.where(is_signal[:, None], vt, 0), jnp.where(is_signal, u, 0), axis=axis)
    terms = num_rows if passes % 2 == 0 else columns
    tail, bound = certificates.tail_bound(total, s, terms, x.dtype)
    return RandomizedSvd(u, s, vt, total, tail, bound)


def of_shared(kernel, x, *more, **options):
    """`gram_svd` or `randomized_svd` of x (N, D), also where several devices share its features.

    Args:
        kernel: one of the two.
        x: on one device, or with its columns dealt to a mesh (`sharing.placed`).
        more: further arguments, whole on every device.
        options: keyword arguments of the kernel but `axis`.

    Returns:
        As the kernel; vt stays where its features are, and none are gathered but of a tall x.
    """
    mesh = dealt.mesh_of(x, 1)
    if mesh is None or x.shape[0] > x.shape[1]:
        return kernel(x, *more, **options)
    return _of_shared(x, *more, kernel=kernel, options=tuple(sorted(options.items())), mesh=mesh)


@functools.partial(jax.jit, static_argnames=("kernel", "options", "mesh"))
def _of_shared(x, *more, kernel, options, mesh):
    kind, wide = GramSvd if kernel is gram_svd else RandomizedSvd, P(None, FEATURES)
    specs = kind(**{name: wide if name == "vt" else P() for name in kind._fields})
    run = functools.partial(kernel, axis=FEATURES, **dict(options))
    in_specs = (wide, *[P()] * len(more))
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=False)(x, *more)


def _tightened(v, axis=None, *, is_wide=False):
    """Loose columns, or rows, orthonormal again; each freed of those before it, which are more exact.

    One round is not enough: a float32 product adds eps32 s_0 / s_j of the first vectors to vector j, which for values
    near the floor of float64 products is several times its length.
    """
    return orth.cholesky_round(orth.regularised(v, axis, is_wide=is_wide), axis, is_wide=is_wide)
