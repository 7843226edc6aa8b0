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
            part = [jax.lax.dynamic_slice_in_dim(one, start, size, -1).astype(dtype) for one in (x, mean, basis)]
            return total + products.matmul(part[0] - part[1], part[2].T).astype(jnp.float64)

        return pieces.fold(add, x.shape[1], CHUNK, jnp.zeros((len(x), len(basis)), jnp.float64))

    if mesh is not None:
        wide = P(None, FEATURES)
        specs = wide, P(FEATURES), wide
        return jax.shard_map(
            lambda *own: jax.lax.psum(local(*own), FEATURES), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
        )(x, mean, basis).astype(dtype)
    return local(x, mean, basis).astype(dtype)


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

    def some(c):
        rows = [f.T.astype(dtype) for f in factors.values()]
        return unfold.chain(c.astype(dtype), rows, [axis + 1 for axis in factors]) + mean.astype(dtype)

    return unfold.in_pieces(some, c)


@functools.partial(jax.jit, static_argnames="mesh")
def missed_rows(x, c, mean, basis, *, mesh):
    """((n,) squared norms, (n,) squared distances to mean + c @ basis), float64, of x (n, *shape) on a mesh.

    Its second axis is shared by the devices, as is the last of mean (D,) and basis (k, D).
    """

    def local(x, c, mean, basis):
        found = jax.lax.map(lambda part: _squares(part[0], products.matmul(part[1], basis) + mean), (x, c))
        return jax.lax.psum(found, FEATURES)

    wide = P(None, FEATURES)
    x = jax.lax.with_sharding_constraint(x.reshape(len(x), -1), NamedSharding(mesh, wide))
    specs = wide, P(), P(FEATURES), wide
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(x, c, mean, basis)


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
            row, core = part[0], part[1][None]
            for axis, factor in factors.items():
                core = unfold.mode_product(core, factor.T, axis + 1)
            return _squares(row, core[0] + mean)

        return jax.lax.map(one, parts)

    return dealt.each(local, mesh)((x, c), mean, factors)


def _squares(row, rebuilt):
    wide = row.astype(jnp.float64)
    return jnp.sum(jnp.square(wide)), jnp.sum(jnp.square(wide - rebuilt.astype(jnp.float64)))
