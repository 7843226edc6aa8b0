"""Orthonormalisation: over the range of conditions, of dependent and zero columns, on one and on eight devices."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import errors, placement
from jaxsub.linalg import orth, reference_svd as reference
from tests.linalg.compiled import collective_sizes
from tests.linalg.matrices import planted
from tests.selected import first

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def deviation(q):
    """(largest entry of |q.T q - I|, zero columns aside; their number)."""
    q = np.asarray(q, np.float64)
    present = np.any(q != 0, axis=0)
    return np.abs(q.T @ q - np.diag(present.astype(float))).max(initial=0), int((~present).sum())


def sharded(function, x, devices=8):
    mesh = placement.make_mesh(devices)
    rows = P("features", None)
    run = jax.jit(
        jax.shard_map(
            lambda x: function(x, axis="features"), mesh=mesh, in_specs=rows, out_specs=(rows, P()), check_vma=False
        )
    )
    return run, jax.device_put(x, NamedSharding(mesh, rows))


pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("dtype", first(["float32", "float64"]))
@pytest.mark.parametrize("condition", first([1e3, 1e14, 1, 1e6, 1e9], 2))
@pytest.mark.parametrize("method", ["cholesky_qr2", "tsqr", "cholesky_lq2"])
def test_orthonormal_and_exact_at_every_condition(method, condition, dtype):
    x = planted(400, 24, np.logspace(0, -np.log10(condition), 24))[0].astype(dtype)
    if method == "cholesky_lq2":
        q, r = orth.cholesky_lq2(x.T)
        q = q.T
    else:
        q, r = getattr(orth, method)(x)
    assert q.dtype == r.dtype == dtype
    assert deviation(q)[0] < 40 * EPS[dtype]
    residual = np.abs(np.asarray(q, np.float64) @ np.asarray(r, np.float64) - x).max()
    assert residual < 100 * EPS[dtype] * np.abs(x).max()
    assert np.all(np.triu(r) == r) and np.all(np.diag(r) >= 0)


@pytest.mark.slow
def test_a_single_round_fails_at_condition_1e6():
    x = planted(400, 24, np.logspace(0, -6, 24))[0].astype(np.float32)
    narrow = orth.cholesky_round(jnp.asarray(x))  # its Gram matrix in float32: not even finite
    wide = orth._round(jnp.asarray(x), None, 0.0, jnp.float64)[0]
    assert not deviation(narrow)[0] < 1e-3 and not deviation(wide)[0] < 1e-3
    assert deviation(orth.cholesky_qr2(x)[0])[0] < 40 * EPS["float32"]


@pytest.mark.slow
def test_without_float64_sums_the_fallback_takes_over():
    x = planted(400, 24, np.logspace(0, -6, 24))[0].astype(np.float32)
    with jax.enable_x64(False):
        assert deviation(orth.cholesky_qr2(x)[0])[0] < 40 * EPS["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("devices", [1, 8])
def test_dependent_columns_are_zero_and_the_rest_orthonormal(dtype, devices):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((160, 6)).astype(dtype)
    x[:, 1] = 2 * x[:, 0]
    x[:, 3] = 0
    x[:, 5] = x[:, 2]
    x[150:] = 0  # padding
    run, placed = sharded(orth.cholesky_qr2, x, devices)
    q, r = (np.asarray(a, np.float64) for a in run(placed))
    assert deviation(q) == (pytest.approx(0, abs=10 * EPS[dtype]), 3)
    assert np.flatnonzero(~q.any(axis=0)).tolist() == [1, 3, 5]
    assert np.abs(q @ r - x).max() < 100 * EPS[dtype] and np.abs(q[150:]).max() < 10 * EPS[dtype]
    want, _ = reference.qr(x, 1e-5)
    assert np.abs(q - want).max() < 50 * EPS[dtype]


def test_zero_tiny_and_huge_columns():
    x = np.zeros((64, 5), np.float32)
    x[:, 1], x[:7, 2], x[:9, 4] = 1, 1e-30, 1e30
    q, r = orth.cholesky_qr2(x)
    assert deviation(q) == (pytest.approx(0, abs=1e-6), 2)
    rest = np.abs(np.asarray(q, np.float64) @ np.asarray(r, np.float64) - x).max(0)
    assert np.all(rest <= 1e-6 * np.abs(x).max(0))
    q, r = orth.cholesky_qr2(np.zeros((64, 5), np.float32))
    assert not np.any(q) and not np.any(r)


@pytest.mark.parametrize(("shape",), first(zip([(9, 8), (1, 1), (7, 1), (5, 5)])))
def test_small_shapes_equal_the_twin(shape):
    x = np.random.default_rng(1).standard_normal(shape)
    for method in (orth.qr, orth.tsqr, orth.cholesky_qr2):
        q, r = method(x)
        want_q, want_r = reference.qr(x)
        np.testing.assert_allclose(q, want_q, atol=1e-11)
        np.testing.assert_allclose(r, want_r, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    x = np.random.default_rng(2).standard_normal((300, 8)).astype(dtype)
    for method in (orth.qr, orth.tsqr, orth.cholesky_qr2):
        q, r = method(x)
        wide = method(x.astype(np.float32))
        assert q.dtype == np.float32 and np.array_equal(q, wide[0]) and np.array_equal(r, wide[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", [orth.cholesky_qr2, orth.tsqr])
@pytest.mark.parametrize("condition", [1e2, 1e9])
def test_eight_devices_equal_one_and_gather_nothing_long(method, condition):
    x = planted(8 * 512, 16, np.logspace(0, -np.log10(condition), 16))[0].astype(np.float32)
    run, placed = sharded(method, x)
    q, r = run(placed)
    single = method(x)
    assert deviation(q)[0] < 40 * EPS["float32"]
    assert np.abs(r - single[1]).max() < 200 * EPS["float32"] * np.abs(r).max()
    assert collective_sizes(run.lower(placed)) <= {16 * 16, 8 * 16 * 16, 16, 1}


def test_the_common_path_adds_up_two_small_matrices():
    mesh = placement.make_mesh(8)
    rows = P("features", None)
    x = jax.device_put(np.ones((64, 4), np.float32), NamedSharding(mesh, rows))
    run = jax.jit(
        jax.shard_map(
            lambda x: orth.regularised(x, "features"), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
        )
    )
    text = run.lower(x).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 2
    assert "all-gather" not in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 3])
def test_nearly_parallel_vectors_stay_finite(rank, dtype):
    """Rounding of their Gram matrix can be more than a shift of l eps; then a larger one is taken."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((60, 5, rank)) * 1e-3 ** np.arange(rank)
    x = (left @ rng.standard_normal((60, rank, 4096))).astype(dtype)
    with jax.enable_x64(True):
        run = jax.jit(lambda y: orth.regularised(y, is_wide=True))
        found = np.stack([np.asarray(run(y), np.float64) for y in x])
    values = np.linalg.svd(found, compute_uv=False) if np.isfinite(found).all() else np.inf
    # The last direction is rounding, up to 2.3 long; those of x keep their length.
    assert np.max(values) < 4 and values[:, 0].min() > 0.99


def test_wide_input_is_refused():
    with pytest.raises(errors.ConfigError, match="at least as many rows as columns"):
        orth.cholesky_qr2(np.ones((3, 4), np.float32))


@pytest.mark.parametrize("devices", [1, 8])
def test_signs(devices):
    vt = np.array([[1, -3, 2, 0, 0, 0, 0, 0], [2, -2, 1, 0, 0, 0, 0, 0], [-1] + [0] * 7, [0] * 8], np.float32)
    u = np.ones((2, 4), np.float32)
    mesh = placement.make_mesh(devices)
    run = jax.shard_map(
        lambda v: orth.fix_signs(v, u, axis="features"),
        mesh=mesh, in_specs=P(None, "features"), out_specs=(P(), P(None, "features")), check_vma=False,
    )  # fmt: skip
    turned, fixed = jax.jit(run)(vt)
    np.testing.assert_array_equal(fixed, reference.fix_signs(vt))
    np.testing.assert_array_equal(turned[0], [-1, 1, -1, 1])
    np.testing.assert_array_equal(orth.fix_signs(jnp.asarray(vt)), fixed)


def test_one_compilation_a_shape():
    before = orth.cholesky_qr2._cache_size()
    for seed in range(3):
        orth.cholesky_qr2(jnp.asarray(np.random.default_rng(seed).standard_normal((77, 3)), jnp.float32))
    assert orth.cholesky_qr2._cache_size() == before + 1


def test_sums_of_many_float32_products_are_kept_in_float64(rows=200_000):
    x = np.random.default_rng(0).standard_normal((rows, 40)).astype("f4")
    found = np.asarray(orth.gram(x, dtype="float32"))
    exact = x.astype(float).T @ x
    assert found.dtype == "float64" and np.linalg.norm(found - exact) < 1e-7 * np.linalg.norm(exact)
