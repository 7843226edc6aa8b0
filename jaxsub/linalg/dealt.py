"""Arrays whose first axis, the models, is dealt to the devices of a mesh: each computes with whole models of its own.

Kernels that take such arrays ask `mesh_of` and send nothing but what they add up: small matrices. The first axis is
left free by them; models of zeros at its end fill the last device, and change no sum.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxsub import errors
from jaxsub.linalg.gram import FEATURES


def mesh_of(x, axis=0):
    """The mesh that an axis of `x`, its first, is dealt to; None where it is whole, and inside traced functions."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or not isinstance(x.sharding, NamedSharding):
        return None
    mesh, spec = x.sharding.mesh, tuple(x.sharding.spec)
    return mesh if mesh.size > 1 and spec[axis : axis + 1] == (FEATURES,) else None


def mesh_of_one(x):
    """A mesh of the first device that holds an array."""
    return Mesh(np.array(sorted(x.devices(), key=lambda d: d.id)[:1]), (FEATURES,))


def sums(local, mesh):
    """`local` of an array or pytree dealt to the mesh and of whole ones: the sum of all devices' results, on each."""
    return _mapped(lambda *given: jax.lax.psum(local(*given), FEATURES), mesh, P()) if mesh else local


def each(local, mesh):
    """`local` likewise: its results, whose first axis is that of the models, stay dealt."""
    return _mapped(local, mesh, P(FEATURES)) if mesh else local


def feature_sums(local, mesh, *specs):
    """`local` of arrays whose features a mesh shares as `specs` say: the sum of all devices' results, on each."""
    if mesh is None:
        return local
    return jax.shard_map(
        lambda *own: jax.lax.psum(local(*own), FEATURES), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
    )


def _mapped(local, mesh, out):
    def run(x, *whole):
        specs = (P(FEATURES), *[P()] * len(whole))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(x, *whole)

    return run


def require_free(axis, ndim, mesh):
    """Raises ConfigError for the first axis where it is dealt to devices."""
    if mesh is not None and axis % ndim == 0:
        raise errors.ConfigError("axis 0 is dealt to devices: only the others can be multiplied or reduced")
