"""Models as coefficients and back, and what is lost, where one device has them or several share them.

rows     x (n, D), basis (k, D), mean (D,): their features may be shared; coefficients are the only sums
models   x (n, *shape), factors (k_m, d_m): models may be dealt out (`dealt`); nothing is sent
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub.linalg import dealt, pieces, products, unfold
from jaxsub.linalg.gram import CHUNK, FEATURES


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def project_rows(x, mean, basis, *, dtype, mesh=None):
    """(n, k) coefficients (x - mean) @ basis.T of x (n, D), in the wider of `dtype` and the mean's.

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
    return dealt.feature_sums(local, mesh, wide, P(FEATURES), wide)(x, mean, basis).astype(dtype)


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
def missed_rows(x, c, mean, basis, *, mesh):
    """((n,) squared norms, (n,) squared distances to mean + c @ basis), float64, of x (n, *shape) on a mesh.

    Its second axis is shared by the devices, as is the last of mean (D,) and basis (k, D).
    """

    def local(x, c, mean, basis):
        return jax.lax.map(lambda part: _squares(part[0], products.matmul(part[1], basis) + mean), (x, c))

    wide = P(None, FEATURES)
    x = jax.lax.with_sharding_constraint(x.reshape(len(x), -1), NamedSharding(mesh, wide))
    return dealt.feature_sums(local, mesh, wide, P(), P(FEATURES), wide)(x, c, mean, basis)


@functools.partial(jax.jit, static_argnames="mesh")
def missed_models(x, c, mean, factors, *, mesh):
    """The same of models x (n, *shape) dealt to a mesh and their cores c (n, k...); stays dealt.

    Args:
        x, c: models and coefficients, one model at a time: no second copy of x.
        mean: broadcasts to `shape`.
        factors: weight axis -> (k_m, d_m) rows.
        mesh: of `dealt.mesh_of(x)`.
    """

    def local(parts, mean, factors):
        def one(part):
            return _squares(part[0], _whole(part[1][None], mean, factors)[0])

        return jax.lax.map(one, parts)

    return dealt.each(local, mesh)((x, c), mean, factors)


def _squares(row, rebuilt):
    wide = row.astype(jnp.float64)
    return jnp.sum(jnp.square(wide)), jnp.sum(jnp.square(wide - rebuilt.astype(jnp.float64)))
