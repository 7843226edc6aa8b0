"""Streams of models against all of them at once: errors under their bounds, and where keeping only k rows fails."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import errors, placement
from jaxsub.linalg import angles, incremental, reference_geometry as reference
from tests.linalg.matrices import place

pytestmark = pytest.mark.usefixtures("x64")


def stack(values, d, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    n = len(values)
    u = np.linalg.qr(rng.standard_normal((n, n)))[0]
    v = np.linalg.qr(rng.standard_normal((d, n)))[0].T
    return (u * values) @ v + offset * rng.standard_normal(d)


SPECTRA = {
    "exact rank 8": np.where(np.arange(64) < 8, 1.0, 0.0),
    "rank 8 and noise": np.where(np.arange(64) < 8, 1.0, 0.01),
    "decay": 0.9 ** np.arange(64),
    "slow decay": 1 / np.sqrt(1 + np.arange(64.0)),
    "flat": np.ones(64),
}


def run(x, *, rank, rows, dtype, batches=(16, 16, 16, 16), devices=1):
    mesh = placement.make_mesh(devices)
    stream = incremental.start(x.shape[1], rows=rows, dtype=dtype)
    start = 0
    for size in batches:
        batch = place(x[start : start + size], mesh)
        stream = incremental.update(stream, batch, mesh=mesh)
        start += size
    return stream, incremental.finish(stream, rank=rank, mesh=mesh)


def largest_angle(basis, exact):
    return float(np.sin(angles.principal_angles(np.asarray(basis, np.float64), exact)[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-12)])
def test_a_stream_that_fits_is_exact(devices, dtype, tolerance):
    x = stack(0.8 ** np.arange(24), 8 * 800, offset=3).astype(np.float32)
    stream, found = run(x, rank=6, rows=24, dtype=dtype, batches=(8, 1, 15), devices=devices)
    values, basis, mean = reference.principal_components(x, 6)
    np.testing.assert_allclose(found.singular_values, values[:6], rtol=tolerance)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14, atol=1e-14)
    assert largest_angle(found.basis, basis) < 10 * tolerance
    assert stream.energy == pytest.approx(np.square(values).sum(), rel=tolerance)
    peaks = np.take_along_axis(np.asarray(found.basis), np.abs(found.basis).argmax(1)[:, None], 1)
    assert (peaks > 0).all()
    overlap = np.asarray(found.basis) @ np.asarray(found.basis).T
    np.testing.assert_allclose(overlap, np.eye(6), atol=1e-6 if dtype == "float32" else 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stated_errors_are_upper_bounds(name, rows, dtype, seed):
    x = stack(SPECTRA[name], 512, seed, offset=1).astype(np.float32)
    _, found = run(x, rank=8, rows=rows, dtype=dtype)
    values, exact, mean = reference.principal_components(x, 8)
    basis = np.asarray(found.basis, np.float64)
    short = values[:8] ** 2 - np.asarray(found.singular_values) ** 2
    assert (short <= found.energy_error).all() and (short >= -found.energy_error).all()
    y = x - mean
    residual = np.square(y - y @ basis.T @ basis).sum()
    best = np.square(values[8:]).sum()
    assert best <= residual + 1e-14 * np.square(values).sum() and residual <= found.residual
    assert largest_angle(basis[np.square(basis).sum(1) > 0.5], exact) <= found.angle + 1e-6
    assert found.angle <= 1
    # Not a vacuous bound: with k extra rows it is near the truth where the spectrum has a gap.
    if name == "rank 8 and noise" and rows == 16:
        assert found.residual < 1.5 * residual and found.angle < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("d", [300, 20_000])
@pytest.mark.parametrize("name", SPECTRA)
def test_rounding_is_a_quarter_of_what_is_allowed(name, d):
    """Nothing is truncated here: all the error there is comes from float32 products."""
    x = np.abs(stack(SPECTRA[name], d)).astype(np.float32)
    stream, found = run(x, rank=64, rows=64, dtype="float32")
    values = reference.principal_components(x, 1)[0]
    assert stream.discarded < 1e-10 * stream.energy
    assert np.abs(np.square(found.singular_values) - values**2).max() < stream.rounding / 4
    assert abs(stream.energy - np.square(values).sum()) < stream.rounding / 4


@pytest.mark.slow
def test_twice_the_rows_find_what_exactly_k_rows_lose():
    pytest.importorskip("sklearn")
    from sklearn.decomposition import IncrementalPCA

    values = np.maximum(np.where(np.arange(128) < 24, 0.8 ** np.arange(128), 0), 1e-4)
    x = stack(values, 1024, offset=0.5).astype(np.float32)
    exact = reference.principal_components(x, 16)
    batches = (16,) * 8
    _, ours = run(x, rank=16, rows=32, dtype="float32", batches=batches)
    _, weak = run(x, rank=16, rows=16, dtype="float32", batches=batches)
    theirs = IncrementalPCA(n_components=16, batch_size=16).fit(x)
    error, weak_error, their_error = (largest_angle(b, exact[1]) for b in (ours.basis, weak.basis, theirs.components_))
    assert error < 1e-4
    assert weak_error > 0.1 and their_error > 0.1
    # The same algorithm as theirs with k rows: the same singular values.
    np.testing.assert_allclose(weak.singular_values, theirs.singular_values_, rtol=1e-4)


@pytest.mark.slow
def test_a_large_common_base_does_not_cancel():
    x = stack(0.5 ** np.arange(32), 400)
    base = 1e4 * np.random.default_rng(5).standard_normal(400) / np.sqrt(400)
    x = x + base
    _, found = run(x, rank=4, rows=8, dtype="float64", batches=(8,) * 4)
    values, basis, _ = reference.principal_components(x, 4)
    assert largest_angle(found.basis, basis) < 2e-3
    np.testing.assert_allclose(found.singular_values, values[:4], rtol=1e-4)
    # The weak variant takes one pass of raw moments: float32 sums of squares minus N mean mean.T.
    y = x.astype(np.float32)
    raw = y.T @ y - len(y) * np.outer(y.mean(0), y.mean(0))
    weak = np.linalg.eigh(raw.astype(np.float64))[1][:, -4:].T
    assert largest_angle(weak, basis) > 0.5


@pytest.mark.slow
def test_order_and_size_of_batches_do_not_show_where_all_fits():
    x = stack(0.8 ** np.arange(24), 640)
    found = [
        run(y, rank=5, rows=24, dtype="float64", batches=b)[1]
        for y, b in ((x, (24,)), (x, (1,) * 24), (x[::-1].copy(), (10, 14)))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other.singular_values, found[0].singular_values, rtol=1e-12)
        np.testing.assert_allclose(other.basis, found[0].basis, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_degenerate_streams(offset):
    same = np.full((6, 64), offset)
    stream, found = run(same, rank=3, rows=6, dtype="float64", batches=(1, 3, 2))
    assert (np.asarray(found.basis) == 0).all()
    np.testing.assert_allclose(found.singular_values, 0, atol=1e-14)  # rounding of the mean
    assert found.residual < 1e-27 and stream.num_models == 6 and found.angle == 1
    _, found = run(stack(np.ones(1), 64), rank=1, rows=1, dtype="float64", batches=(1,))
    assert found.singular_values[0] == 0 and np.isfinite(found.basis).all()
    two = stack(np.ones(2), 64)
    _, found = run(two, rank=2, rows=2, dtype="float64", batches=(1, 1))
    assert found.singular_values[0] == pytest.approx(np.linalg.norm(two[0] - two[1]) / np.sqrt(2))
    assert found.singular_values[1] < 1e-7


@pytest.mark.slow
def test_bfloat16_models_and_zero_columns():
    import ml_dtypes

    x = stack(0.7 ** np.arange(16), 600, offset=0.1).astype(ml_dtypes.bfloat16)
    padded = np.pad(x, ((0, 0), (0, 40)))
    _, found = run(padded, rank=4, rows=16, dtype="float32", batches=(8, 8), devices=8)
    values, basis, _ = reference.principal_components(x.astype(np.float64), 4)
    np.testing.assert_allclose(found.singular_values, values[:4], rtol=1e-5)
    assert (np.asarray(found.basis)[:, 600:] == 0).all()
    assert largest_angle(np.asarray(found.basis)[:, :600], basis) < 1e-4


def test_one_all_reduce_an_update_one_compilation_and_donation():
    mesh = placement.make_mesh(8)
    stream = incremental.start(8 * 4096, rows=6, dtype="float32")
    shardings = jax.tree.map(lambda p: NamedSharding(mesh, p), incremental._SPECS, is_leaf=lambda p: isinstance(p, P))
    stream = jax.device_put(stream, shardings)
    batch = place(np.ones((4, 8 * 4096), np.float32), mesh)
    text = incremental._update.lower(stream, batch, mesh=mesh).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    incremental._update.clear_cache()
    for _ in range(3):
        before, stream = stream, incremental.update(stream, batch, mesh=mesh)
    assert incremental._update._cache_size() == 1
    assert before.rows.is_deleted()


def test_refusals():
    mesh = placement.make_mesh(1)
    stream = incremental.start(16, rows=4, dtype="float64")
    for shape in ((0, 16), (2, 15), (16,)):
        with pytest.raises(errors.ConfigError, match="batch has shape"):
            incremental.update(stream, np.ones(shape), mesh=mesh)
    with pytest.raises(errors.ConfigError, match="rank is 5, expected an integer from 1 to 4"):
        incremental.finish(stream, rank=5, mesh=mesh)
    with pytest.raises(errors.ConfigError, match="rows is 0"):
        incremental.start(16, rows=0, dtype="float64")
