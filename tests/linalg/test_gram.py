"""Gram kernels against float64 twins, on one and on eight devices, where cancellation would show."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsub import hostmemory, placement, spectrum
from jaxsub.linalg import gram, pieces, products, reference
from tests.linalg.matrices import lora_sums, place
from tests.selected import first


def run_dense(x, devices, dtype):
    mesh = placement.make_mesh(devices)
    with jax.enable_x64(True):
        placed = place(x, mesh)
        weights = np.zeros((0, len(x)), np.float32)
        return jax.device_get(gram.dense_gram(placed, weights, mesh=mesh, dtype=dtype)[0])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    "shape",
    first(zip([(7, 512), (259, 2048), (130, 4096), (2, 64), (131, 3 * 4096 + 64), (33, 8 * 5000)], strict=True), 2),
)
def test_dense_sums_equal_the_twin(shape, devices):
    x = (np.random.default_rng(0).standard_normal(shape) + 1).astype(np.float32)
    sums, expected = run_dense(x, devices, "float64"), reference.dense_sums(x)
    # The kernel's mean is a float64 mean of float32 numbers: all that differs is the order of sums.
    for got, want in zip(sums, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11 * np.abs(want).max())


@pytest.mark.parametrize("devices", [1, 8])
def test_fourth_moments_of_many_columns_are_estimates_within_sampling_error(devices):
    rng = np.random.default_rng(8)
    columns = devices * 17 * 4096 - 4000
    x = np.zeros((6, devices * 17 * 4096), np.float32)  # zero columns at the end
    scales = 1 + 0.3 * np.sin(np.arange(columns) / 700)  # columns are not alike
    x[:, :columns] = rng.standard_normal((6, columns)) * scales
    mesh = placement.make_mesh(devices)
    with jax.enable_x64(True):
        placed = place(x, mesh)
        weights = np.zeros((0, 6), np.float32)
        sums = jax.device_get(gram.dense_gram(placed, weights, mesh=mesh, dtype="float32")[0])
    exact = reference.dense_sums(x)
    np.testing.assert_allclose(sums.gram, exact[0], rtol=0, atol=1e-5 * exact[0].max())
    assert (sums.row_fourths != exact[4]).all()  # sampled, or this test shows nothing
    errors = [np.max(np.abs(got / want - 1)) for got, want in zip(sums[4:], exact[4:], strict=True)]
    assert max(errors) < 0.12 / np.sqrt(devices)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-6), ("float64", 1e-10)])
def test_a_common_base_does_not_cancel(dtype, tolerance):
    rng = np.random.default_rng(1)
    base = rng.standard_normal(8192)
    x = (base + 1e-4 * rng.standard_normal((16, 8192))).astype(np.float32)
    y = x.astype(np.float64) - x.astype(np.float64).mean(0)
    exact = y @ y.T
    got = spectrum.centred(run_dense(x, 1, dtype).gram)
    assert np.abs(got - exact).max() < tolerance * exact.max()
    # The weak variant: the raw float32 Gram matrix, centred afterwards.
    weak = spectrum.centred((x @ x.T).astype(np.float64))
    assert np.abs(weak - exact).max() > 0.1 * exact.max()


def test_float32_sums_over_many_features_keep_float64_accuracy():
    x = np.random.default_rng(2).standard_normal((8, 2**19), dtype=np.float32) + np.float32(3)
    exact = reference.dense_sums(x)[3]
    got = run_dense(x, 1, "float32").row_sums
    assert np.abs(got / exact - 1).max() < 2e-7
    weak = np.array([np.add.accumulate(row)[-1] for row in x[:2]])  # a running float32 sum
    assert np.abs(weak / exact[:2] - 1).max() > 1e-6


@pytest.mark.parametrize("devices", [1, 8])
def test_combinations_are_principal_directions_of_models_near_a_base(devices):
    rng = np.random.default_rng(6)
    columns = 8 * 4096 + 64
    x = (rng.standard_normal(columns) + 1e-4 * rng.standard_normal((16, columns))).astype(np.float32)
    y = x.astype(np.float64) - x.astype(np.float64).mean(0)
    values, vectors = np.linalg.eigh(y @ y.T)
    weights = (vectors[:, :-5:-1] / np.sqrt(values[:-5:-1])).T
    mesh = placement.make_mesh(devices)
    with jax.enable_x64(True):
        placed = place(x, mesh)
        found = np.asarray(gram.combinations(placed, weights, mesh=mesh, dtype="float32"), np.float64)
    assert np.abs(found - weights @ y).max() < 2e-5 * np.abs(weights @ y).max()
    assert np.abs(found @ found.T - np.eye(4)).max() < 1e-5
    weak = (weights.astype(np.float32) @ x).astype(np.float64)  # exact in theory: the weights sum to zero
    assert np.abs(weak - weights @ y).max() > 3e-4 * np.abs(weights @ y).max()


@pytest.mark.parametrize("devices", [1, 8])
def test_mixtures_are_of_the_centred_rows(devices):
    x = np.random.default_rng(6).standard_normal((9, 8 * 5000)).astype(np.float32) + 2
    weights = np.random.default_rng(7).standard_normal((4, 9)).astype(np.float32)
    mesh = placement.make_mesh(devices)
    with jax.enable_x64(True):
        placed = place(x, mesh)
        got = np.asarray(gram.dense_gram(placed, weights, mesh=mesh, dtype="float32")[1])
    want = weights.astype(np.float64) @ (x - x.astype(np.float64).mean(0))
    assert np.abs(got - want).max() < 2e-6 * np.abs(want).max()


def test_zero_columns_do_not_show():
    x = np.random.default_rng(3).standard_normal((5, 512)).astype(np.float32)
    padded = np.zeros((5, 1024), np.float32)
    padded[:, :512] = x
    for got, want in zip(run_dense(padded, 1, "float64"), run_dense(x, 1, "float64"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_one_all_reduce_a_block_and_no_gather():
    mesh = placement.make_mesh(8)
    x = place(np.ones((16, 8 * 4096), np.float32), mesh)
    with jax.enable_x64(True):
        weights = np.ones((4, 16), np.float32)
        text = gram._dense_gram.lower(x, weights, np.int32(0), width=4096, mesh=mesh, dtype="float32")
        text = text.compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") <= 1


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("num_models", first([33, 3, 70]))
def test_lora_gram_equals_dense_products(num_models, dtype, tolerance, devices):
    rng = np.random.default_rng(4)
    r, i, o = 4, 64, 128
    a, b = rng.standard_normal((num_models, r, i)), rng.standard_normal((num_models, o, r))
    a[::3, 2:] = 0  # mixed ranks are zero rows
    b[::3, :, 2:] = 0
    a, b = a.astype(np.float32), b.astype(np.float32)
    expected = reference.lora_gram(a.astype(np.float64), b.astype(np.float64), np.ones(num_models))
    mesh = placement.make_mesh(devices)
    sums = lora_sums(a, np.swapaxes(b, 1, 2), mesh, dtype)
    assert np.abs(sums.gram - expected).max() < tolerance * np.abs(expected).max()
    overlap = np.square(np.einsum("nor,mos->nmrs", b.astype(np.float64), b.astype(np.float64))).sum((2, 3))
    assert np.abs(sums.b_overlap - overlap).max() < tolerance * overlap.max()
    flat = a.astype(np.float64).reshape(num_models, -1)
    assert np.abs(sums.a_cosines - flat @ flat.T).max() < tolerance * np.abs(flat @ flat.T).max()
    for found, x in ((sums.a_gram, a), (sums.b_gram, np.swapaxes(b, 1, 2))):
        np.testing.assert_allclose(found, np.einsum("nri,nsi->nrs", x.astype(np.float64), x), atol=1e-3)


@pytest.fixture
def has_tiles(monkeypatch):
    monkeypatch.setattr(products, "takes", lambda dtype: dtype == "bfloat16")


@pytest.mark.parametrize("devices", [1, 8])
def test_factors_of_16_bits_are_multiplied_as_they_are(has_tiles, devices):
    rng, mesh = np.random.default_rng(4), placement.make_mesh(devices)
    a, bt = (rng.standard_normal((33, 4, d)).astype(ml_dtypes.bfloat16).astype(np.float32) for d in (64, 128))
    expected = reference.lora_gram(a.astype(np.float64), np.swapaxes(bt, 1, 2).astype(np.float64), np.ones(33))
    sums = lora_sums(a, bt, mesh, "float32", stored="bfloat16")
    assert np.abs(sums.gram - expected).max() < 2e-6 * expected.max()
    double = lora_sums(a, bt, mesh, "float64", stored="bfloat16")
    assert np.abs(double.gram - expected).max() < 1e-12 * expected.max()  # float64 stays what it is
    wider = rng.standard_normal(a.shape).astype(np.float32)
    exact = reference.lora_gram(wider.astype(np.float64), np.swapaxes(bt, 1, 2).astype(np.float64), np.ones(33))
    assert np.abs(lora_sums(wider, bt, mesh, "float32").gram - exact).max() < 2e-6 * exact.max()
    wrong = lora_sums(wider, bt, mesh, "float32", stored="bfloat16")  # said of what it is not true of
    assert np.abs(wrong.gram - exact).max() > 1e-4 * exact.max()


@pytest.mark.skipif("amx_bf16" not in products._flags(), reason="this processor has no tiles")
def test_no_float32_copy_stands_between_16_bit_factors_and_their_product():
    factors, table = jax.ShapeDtypeStruct((64, 16, 256), jnp.float32), np.zeros((1, 3, 2), np.int32)
    given = {"size": 32, "own": 64, "mesh": placement.make_mesh(1), "dtype": "float32", "factor": "bfloat16"}
    with jax.enable_x64(True):
        text = gram._lora_gram.lower(factors, factors, table, **given).compile().as_text()
        turned = jax.jit(lambda x: jnp.matmul(x, (2 * x).T, preferred_element_type=jnp.float32))
        other = turned.lower(jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)).compile().as_text()
    assert re.findall(r"(\w+)\[512,256\]\S* parameter", text) == ["bf16"] * 4
    assert re.findall(r"(\w+)\[64,256\]\S* parameter", other).count("f32") == 2  # why rows are named as such


def test_eight_devices_equal_one():
    x = np.random.default_rng(5).standard_normal((40, 8 * 4096)).astype(np.float32)
    one, eight = run_dense(x, 1, "float32"), run_dense(x, 8, "float32")
    # float32 products of 4096 terms, summed in float64: eps32 * sqrt(4096) of an entry's scale, |x_i| |x_j|
    assert np.abs(one.gram - eight.gram).max() < 8e-6 * np.abs(one.gram).max()


@pytest.mark.slow
@pytest.mark.parametrize("width", [17 * 4096 + 64, 16 * 4096, 37 * 4096 - 64])
def test_pieces_side_by_side_equal_one_program(width, monkeypatch):
    monkeypatch.setattr(hostmemory, "cores", lambda: 2)
    mesh, rng = placement.make_mesh(1), np.random.default_rng(9)
    x = rng.standard_normal((130, width), np.float32) + 1
    weights = rng.standard_normal((3, 130)).astype(np.float32)
    assert gram.num_pieces(width, mesh) == 2 and gram.num_pieces(width, placement.make_mesh(8)) == 1
    with jax.enable_x64(True):
        given = {"width": width, "mesh": mesh, "dtype": "float32"}
        one, mixed = jax.device_get(gram._dense_gram(jax.device_put(x), weights, np.int32(0), **given))
        found, joined = jax.device_get(gram.dense_gram(jax.device_put(x), weights, mesh=mesh, dtype="float32"))
    assert np.abs(joined - mixed).max() < 2e-6 * np.abs(mixed).max()
    for name, got, want in zip(gram.DenseSums._fields, found, one, strict=True):
        tolerance = 0.1 if name in gram.DenseSums._fields[4:] else 1e-6  # fourth moments are of samples
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=name)
    exact = reference.dense_sums(x)[0]
    assert np.abs(found.gram - exact).max() < 3e-6 * exact.max()


@pytest.mark.parametrize("count, programs", [(3, 2), (32, 2), (33, 0)])
def test_few_combinations_are_made_side_by_side(count, programs, monkeypatch):
    monkeypatch.setattr(hostmemory, "cores", lambda: 2)
    ran, side_by_side = [], pieces.side_by_side
    monkeypatch.setattr(pieces, "side_by_side", lambda k, x, number: ran.append(number) or side_by_side(k, x, number))
    rng, mesh = np.random.default_rng(11), placement.make_mesh(1)
    x = rng.standard_normal((130, 16 * 4096 + 72), np.float32) + 100
    weights = rng.standard_normal((count, 130)).astype(np.float32)
    with jax.enable_x64(True):
        found = np.asarray(gram.combinations(jax.device_put(x), weights, mesh=mesh, dtype="float32"))
    want = weights.astype(np.float64) @ (x - x.astype(np.float64).mean(0))
    assert sum(ran) == programs
    assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()  # of a mean a hundred times as large
