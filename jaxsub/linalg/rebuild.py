"""Models as coefficients and back, and what is lost, where one device has them or several share them.

rows     x (n, D), basis (k, D), mean (D,): their features may be shared; coefficients are the only sums
models   x (n, *shape), factors (k_m, d_m): models may be dealt out (`dealt`); nothing is sent
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub.linalg import dealt, products, unfold
from jaxsub.linalg.gram import FEATURES


@jax.jit
def project_rows(x, mean, basis):
    """(n, k) coefficients (x - mean) @ basis.T, in the wider dtype of x and the mean."""
    dtype = jnp.promote_types(x.dtype, mean.dtype)
    return products.matmul(x.astype(dtype) - mean.astype(dtype), basis.T.astype(dtype))


@functools.partial(jax.jit, static_argnames="is_shared")
def rebuild_rows(c, mean, basis, *, is_shared=False):
    """(n, D) rows mean + c @ basis; `is_shared`: by devices, each with features of its own."""
    dtype = jnp.promote_types(c.dtype, mean.dtype)
    rows = products.matmul(c.astype(dtype), basis.astype(dtype))
    return (rows if is_shared else products.row_major(rows)) + mean.astype(dtype)  # XLA gathers what is pinned


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
