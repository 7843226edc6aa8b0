"""Projections and rebuilds of sharded models exchange coefficients alone, never weights."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import placement, subspace
from jaxsub.linalg import products
from jaxsub.linalg.gram import FEATURES
from tests.linalg import compiled

N, K, D = 12, 5, 4096


def on_eight(x):
    return jax.device_put(x, NamedSharding(placement.make_mesh(8), P(*[None] * (x.ndim - 1), FEATURES)))


def test_coefficients_are_summed_and_weights_stay_where_they_are(monkeypatch):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((D, K)))[0].T.astype(np.float32)
    mean, x = rng.standard_normal(D).astype(np.float32), rng.standard_normal((N, D)).astype(np.float32)
    sharded = [on_eight(a) for a in (x, mean, basis)]
    project = subspace._project_rows.lower(*sharded).compile()
    assert compiled.executed(project.as_text()) == [("all-reduce", 4 * N * K)]
    found = project(*sharded)
    np.testing.assert_allclose(found, (x - mean) @ basis.T, atol=1e-4)
    monkeypatch.setattr(products, "row_major", lambda x: x)  # as on accelerators; XLA gathers what is pinned on CPU
    rebuild = jax.jit(subspace._rebuild_rows.__wrapped__).lower(found, *sharded[1:]).compile()
    assert compiled.executed(rebuild.as_text()) == []
    again = rebuild(found, *sharded[1:])
    assert again.addressable_shards[0].data.shape == (N, D // 8)
    np.testing.assert_allclose(again, np.asarray(found) @ basis + mean, atol=1e-5)
