"""Projections and rebuilds of sharded models exchange coefficients alone, never weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import placement, subspace
from jaxsub.linalg import rebuild, svd
from jaxsub.linalg.gram import FEATURES
from tests.linalg import compiled
from tests.selected import first

N, K, D = 12, 5, 4096


def on_eight(x):
    return jax.device_put(x, NamedSharding(placement.make_mesh(8), P(*[None] * (x.ndim - 1), FEATURES)))


def test_coefficients_are_summed_and_weights_stay_where_they_are():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((D, K)))[0].T.astype(np.float32)
    mean, x = rng.standard_normal(D).astype(np.float32), rng.standard_normal((N, D)).astype(np.float32)
    sharded = [on_eight(a) for a in (x, mean, basis)]
    with jax.enable_x64(True):
        project = rebuild.project_rows.lower(*sharded, dtype="float32", mesh=placement.make_mesh(8)).compile()
        assert compiled.executed(project.as_text()) == [("all-reduce", 8 * N * K)]
        found = project(*sharded)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (x - mean) @ basis.T, atol=1e-4)
    text = rebuild.rebuild_rows.lower(found, *sharded[1:], is_shared=True).compile().as_text()
    assert compiled.executed(text) == []
    space = subspace.LinearSubspace(sharded[1], sharded[2], None, (D,), None, None)
    again = space.reconstruct(found)
    assert again.addressable_shards[0].data.shape == (N, D // 8)
    np.testing.assert_allclose(again, np.asarray(found) @ basis + mean, atol=1e-5)


def test_what_is_missed_is_two_numbers_a_model():
    rng = np.random.default_rng(1)
    x, mean = rng.standard_normal((N, 64, 64)).astype(np.float32), rng.standard_normal(D).astype(np.float32)
    basis, c = rng.standard_normal((K, D)).astype(np.float32), rng.standard_normal((N, K)).astype(np.float32)
    mesh = placement.make_mesh(8)
    there = jax.device_put(x, NamedSharding(mesh, P(None, FEATURES)))
    with jax.enable_x64(True):
        text = rebuild.missed_rows.lower(there, c, on_eight(mean), on_eight(basis), mesh=mesh).compile().as_text()
    assert compiled.executed(text) == [("all-reduce", 2 * 8 * N)]
    one = subspace.LinearSubspace(jnp.asarray(mean), jnp.asarray(basis), None, (64, 64), None, None)
    many = subspace.LinearSubspace(on_eight(mean), on_eight(basis), None, (64, 64), None, None)
    for wanted, found in zip(subspace.missed(one, x, c), subspace.missed(many, there, c), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", first(["gram_svd", "randomized_svd"]))
def test_components_of_shared_features_exchange_squares_of_short_sides_alone(name):
    kernel = getattr(svd, name)
    options = {"gram_svd": {"rank": 3, "dtype": "float32"}, "randomized_svd": {"rank": 3, "oversample": 4}}[name]
    more = () if name == "gram_svd" else (jax.random.key(0),)
    rng = np.random.default_rng(2)
    x = on_eight(
        (rng.standard_normal((N, 3)) @ rng.standard_normal((3, D)) * 9 + rng.standard_normal((N, D))).astype("f4")
    )
    given = {"kernel": kernel, "options": tuple(options.items()), "mesh": placement.make_mesh(8)}
    with jax.enable_x64(True):
        sent = compiled.executed(svd._of_shared.lower(x, *more, **given).compile().as_text())
        assert {name for name, _ in sent} == {"all-reduce"} and max(size for _, size in sent) <= 8 * N * N
        one = svd.of_shared(kernel, jnp.asarray(np.asarray(x)), *more, **options)
        before = svd._of_shared._cache_size()
        many = svd.of_shared(kernel, x, *more, **options)
    assert svd._of_shared._cache_size() == before + 1
    assert many.vt.addressable_shards[0].data.shape == (3, D // 8)
    np.testing.assert_allclose(many.s[:3], one.s[:3], rtol=1e-4)
    np.testing.assert_allclose(many.vt, one.vt, atol=2e-3)
