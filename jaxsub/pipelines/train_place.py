"""Where a training lies on several devices: runs, batches or weights are shared over one mesh axis."""

import jax
import numpy as np

from jaxsub.training import steps


def runs(given, axes, mesh, shard):
    """Runs on a mesh: leaves of runs shared over their leading axis, of weights over their longest axis, or copied."""
    spec = jax.sharding.PartitionSpec
    name, count = mesh.axis_names[0], mesh.size

    def put(leaf, axis):
        where = [None] * leaf.ndim
        if shard == "runs" and axis == 0 and leaf.shape[0] % count == 0:
            where[0] = name
        elif shard == "features" and leaf.ndim:
            sizes = [0 if axis == 0 and a == 0 else s if s % count == 0 else 0 for a, s in enumerate(leaf.shape)]
            if max(sizes):
                where[int(np.argmax(sizes))] = name
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec(*where)))

    frozen, data = (
        jax.tree.unflatten(
            jax.tree.structure(tree), [put(x, a) for x, a in zip(jax.tree.leaves(tree), own, strict=True)]
        )
        for tree, own in zip(given[:2], axes, strict=True)
    )
    return steps.Runs(frozen, data, put(given.keys, 0 if given.keys.ndim else None), put(given.rates, 0))


def state(found, mesh, shard):
    """A State on a mesh: runs shared over it, or the same on every device."""
    spec = jax.sharding.PartitionSpec
    name, count = mesh.axis_names[0], len(found.best_score)

    def put(leaf):
        is_shared = shard == "runs" and leaf.ndim and leaf.shape[0] == count and count % mesh.size == 0
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec(name) if is_shared else spec()))

    return jax.tree.map(put, found)
