"""Models as coefficients and back, and what is lost, where one device has them or several share them.

rows     x (n, D), basis (k, D), mean (D,): their features may be shared; coefficients are the only sums
models   x (n, *shape), factors (k_m, d_m): models may be dealt out (`dealt`); nothing is sent
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxsub.linalg import dealt, pieces, products, unfold
from jaxsub.linalg.gram import CHUNK, FEATURES


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def project_rows(x, mean, basis, *, dtype, mesh=None):
    """(n, k) coefficients (x - mean) @ basis.T of x (n, *shape), in the wider of `dtype` and the mean's.

    In chunks of features whose sums are float64: no second copy of x, and one float32 product over millions of features
    is a hundred times less exact. `mesh`: that shares the features of all three.
    """
    dtype = jnp.promote_types(dtype, mean.dtype)

    def local(x, mean, basis):
        def add(start, size, total):
            part = [pieces.part(one, start, size, axis=-1).astype(dtype) for one in (x, mean, basis)]
            return total + products.matmul(part[0] - part[1], part[2].T).astype(jnp.float64)

        return pieces.fold(add, x.shape[1], CHUNK, jnp.zeros((len(x), len(basis)), jnp.float64))

    wide = P(None, FEATURES)
    return dealt.feature_sums(local, mesh, wide, P(FEATURES), wide)(_rows(x), mean, basis).astype(dtype)


def _rows(x):
    """(n, D) rows of x (n, *shape): inside a traced function they are no copy."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


@functools.partial(jax.jit, static_argnames="is_shared")
def rebuild_rows(c, mean, basis, *, is_shared=False):
    """(n, D) rows mean + c @ basis; `is_shared`: by devices, each with features of its own."""
    dtype = jnp.promote_types(c.dtype, mean.dtype)
    rows = products.matmul(c.astype(dtype), basis.astype(dtype))
    return (rows if is_shared else products.row_major(rows)) + mean.astype(dtype)  # XLA gathers what is pinned


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def project_models(x, mean, factors, *, dtype, mesh=None):
    """(n, k...) cores of models x (n, *shape), as they are or dealt to a mesh, in the wider of `dtype` and the mean's.

    Args:
        x: models, a few at a time: no second copy of them.
        mean: broadcasts to `shape`.
        factors: weight axis -> (k_m, d_m) rows.
        mesh: of `dealt.mesh_of(x)`.
    """
    dtype = jnp.promote_types(dtype, mean.dtype)

    def local(x, mean, factors):
        def some(z):
            z = z.astype(dtype) - mean.astype(dtype)
            return unfold.chain(z, [f.astype(dtype) for f in factors.values()], [axis + 1 for axis in factors])

        return unfold.in_pieces(some, x)

    return dealt.each(local, mesh)(x, mean, factors)


@jax.jit
def rebuild_models(c, mean, factors):
    """(n, *shape) models of cores c (n, k...), in the wider dtype of c and the mean; see `project_models`."""
    dtype = jnp.promote_types(c.dtype, mean.dtype)

    mean, factors = mean.astype(dtype), {axis: f.astype(dtype) for axis, f in factors.items()}
    return unfold.in_pieces(lambda c: _whole(c.astype(dtype), mean, factors), c)


def _whole(c, mean, factors):
    """Models of cores, all of one dtype."""
    return unfold.chain(c, [f.T for f in factors.values()], [axis + 1 for axis in factors]) + mean


@functools.partial(jax.jit, static_argnames="mesh")
def missed_rows(x, c, mean, basis, *, mesh=None):
    """((n,) squared norms, (n,) squared distances to mean + c @ basis), float64, of the first n models of x.

    Args:
        x: (N, *shape).
        c: (n, k); models are rebuilt in the wider of its dtype and the mean's, a chunk of features at a time. None:
            the mean stands for all of x.
        mean, basis: (D,) and (k, D).
        mesh: that shares the second axis of x, and the last of the mean and the basis.
    """
    dtype, count = (mean.dtype, len(x)) if c is None else (jnp.promote_types(c.dtype, mean.dtype), len(c))

    def local(x, c, mean, basis):
        def add(start, size, sums):
            wide = pieces.box(x, (0, start), (count, size)).astype(jnp.float64)
            rebuilt = pieces.part(mean, start, size).astype(dtype)
            if c is not None:
                part = pieces.part(basis, start, size, axis=1).astype(dtype)
                rebuilt += products.row_major(products.matmul(c.astype(dtype), part))
            found = jnp.square(wide), jnp.square(wide - rebuilt.astype(jnp.float64))
            return tuple(s + jnp.sum(f, axis=1) for s, f in zip(sums, found, strict=True))

        return pieces.fold(add, x.shape[1], CHUNK, (jnp.zeros(count, jnp.float64),) * 2)

    wide = P(None, FEATURES)
    return dealt.feature_sums(local, mesh, wide, P(), P(FEATURES), wide)(_rows(x), c, mean, basis)


@functools.partial(jax.jit, static_argnames="mesh")
def missed_models(x, c, mean, factors, *, mesh=None):
    """The same of models x (N, *shape) and cores c (n, k...), one model at a time; dealt to a mesh it stays dealt.

    Args:
        x, c: models, of which the first n count, and coefficients; of a mesh as many of both. c None: the mean alone.
        mean: broadcasts to `shape`.
        factors: weight axis -> (k_m, d_m) rows.
        mesh: of `dealt.mesh_of(x)`.
    """
    dtype = mean.dtype if c is None else jnp.promote_types(c.dtype, mean.dtype)

    def local(parts, mean, factors):
        x, c = parts
        mean, factors = mean.astype(dtype), {axis: f.astype(dtype) for axis, f in factors.items()}

        def one(n):
            wide = pieces.part(x, n, 1)[0].astype(jnp.float64)
            rebuilt = mean if c is None else _whole(pieces.part(c, n, 1).astype(dtype), mean, factors)[0]
            return jnp.sum(jnp.square(wide)), jnp.sum(jnp.square(wide - rebuilt.astype(jnp.float64)))

        return jax.lax.map(one, jnp.arange(len(x if c is None else c)))

    return dealt.each(local, mesh)((x, c), mean, factors)
