"""Narrow storage: rounding twice is rounding once, what it costs is stated, bytes are those of the files."""

import os

import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.bundle import files, storage
from jaxsub.formats import safetensors
from tests.bundle import test_bundle, test_lora_bundle
from tests.selected import first

PAIRS = first([("int8", "int8"), ("bfloat16", ""), ("", "bfloat16"), ("int8", ""), ("", "int8")], 2)


@pytest.mark.parametrize("component", [0, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_near_and_done_once(dtype, component):
    rng = np.random.default_rng(0)
    array = (rng.standard_normal((40, 6, 5)) * np.exp(3 * rng.standard_normal((40, 6, 5)))).astype(dtype)
    array[3], array[:, 2, 2] = 0, 0
    for name in storage.DTYPES:
        once = storage.rounded(array, name, component=component)
        np.testing.assert_array_equal(storage.rounded(once, name, component=component), once)
        assert not once[3].any() and not once[:, 2, 2].any()
    axes = (1, 2) if component == 0 else 0
    step = np.abs(array).max(axes, keepdims=True) / 127
    off = np.abs(storage.rounded(array, "int8", component=component) - array)
    assert (off <= 0.501 * step).all() and off.max() > 0.4 * step.min()
    assert storage.rounded(array, "int8", component=component).dtype == dtype
    off = np.abs(storage.rounded(array, "bfloat16", component=component) - array)
    assert (off <= 2.0**-8 * np.abs(array)).all() and off.any()


def test_what_bfloat16_cannot_hold_is_refused():
    with pytest.raises(errors.ConfigError, match="1e\\+300"):
        storage.encode(np.array([[1e300]]), "bfloat16", component=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return test_bundle.collection(tmp_path_factory.mktemp("storage") / "models")


@pytest.mark.parametrize(("basis", "coefficients"), PAIRS)
def test_a_narrow_bundle_is_the_same_before_and_after_it_is_saved(folder, tmp_path, basis, coefficients):
    options = {"rank": 3, "layers": ["weight"]}
    made = jaxsub.fit(folder, tmp_path / "b", basis_dtype=basis, coefficient_dtype=coefficients, **options)
    found, full = jaxsub.load(tmp_path / "b"), jaxsub.fit(folder, **options)
    again = found.reconstruct(found.coefficients())
    for key, value in made.reconstruct(made.coefficients()).items():
        np.testing.assert_array_equal(again[key], value)
    for layer, whole in zip(found.layers, full.layers, strict=True):
        x = test_bundle.weights(folder, layer.name).astype(np.float64).reshape(12, -1)
        error = np.linalg.norm(again[layer.name].reshape(12, -1) - x, axis=1) / np.linalg.norm(x, axis=1)
        assert layer.figures["error_max"] == pytest.approx(error.max(), rel=1e-4)
        assert layer.figures["error_mean"] == pytest.approx(error.mean(), rel=1e-4)
        assert layer.figures["error_unrounded"] == pytest.approx(whole.figures["error_mean"], rel=1e-3)
    planted = found.layers[0].figures
    assert 2e-4 < planted["error_mean"] < 0.02 and planted["error_mean"] > planted["error_unrounded"]
    assert files.verify(tmp_path / "b") == []


def test_bytes_are_those_of_the_narrow_numbers(folder, tmp_path):
    made = jaxsub.fit(folder, tmp_path / "b", rank=3, layers=["a.weight"], basis_dtype="int8", coefficient_dtype="int8")
    count = made.accounting()
    assert count["mean"] == 2 * 80 and count["coefficients"] == 3 * 12 + 4 * 3
    tensors = safetensors.read(tmp_path / "b" / "layers" / "00000.safetensors")
    assert {n: t.dtype.name for n, t in tensors.items()} == {
        "mean": "bfloat16", "basis": "int8", "basis_scale": "float32", "singular_values": "float64",
    }  # fmt: skip
    assert count["basis"] == 3 * 80 + 4 * 3 + tensors["singular_values"].nbytes
    on_disk = sum(os.path.getsize(os.path.join(f, n)) for f, _, names in os.walk(tmp_path / "b") for n in names)
    assert count["total"] == on_disk


@pytest.mark.slow
@pytest.mark.parametrize(("basis", "coefficients"), PAIRS)
def test_errors_of_rounded_low_rank_updates_are_those_of_the_products(tmp_path, basis, coefficients):
    folder, updates = test_lora_bundle.adapters(tmp_path / "m")
    bundle = jaxsub.fit(folder, rank=3, basis_dtype=basis, coefficient_dtype=coefficients)
    rebuilt = bundle.reconstruct(bundle.coefficients())["layer.q"].astype(np.float64)
    error = np.sqrt(np.square(rebuilt - updates).sum(axis=(1, 2)) / np.square(updates).sum(axis=(1, 2)))
    assert bundle.layers[0].figures["error_max"] == pytest.approx(error.max(), rel=1e-3) and error.max() > 1e-4


@pytest.mark.slow
def test_a_budget_buys_more_components_in_narrow_numbers(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "m").mkdir()
    for n in range(24):
        values = (0.9 ** np.arange(24))[:, None] * rng.standard_normal((24, 1))
        basis = np.random.default_rng(9).standard_normal((24, 600))
        tensors = {"w": (values * basis).sum(0).astype(np.float32).reshape(20, 30)}
        safetensors.write(tmp_path / "m" / f"m{n}.safetensors", tensors)
    wide, narrow = (
        jaxsub.fit(str(tmp_path / "m"), budget_bytes=22_000, basis_dtype=dtype, coefficient_dtype=dtype)
        for dtype in ("", "int8")
    )
    for bundle in (wide, narrow):
        assert bundle.accounting()["total"] <= 22_000
    assert narrow.layers[0].subspace.rank > 2 * wide.layers[0].subspace.rank
    assert narrow.layers[0].figures["error_mean"] < 0.7 * wide.layers[0].figures["error_mean"]


def test_a_scale_of_the_wrong_shape_is_refused(folder, tmp_path, monkeypatch):
    made = jaxsub.fit(folder, rank=3, layers=["a.weight"], basis_dtype="int8")
    stored = files._contents

    def wrong(bundle):
        for name, tensors in stored(bundle):
            yield name, tensors | ({"basis_scale": np.ones(4, np.float32)} if "basis_scale" in tensors else {})

    monkeypatch.setattr(files, "_contents", wrong)
    made.save(tmp_path / "b")
    with pytest.raises(errors.InputError, match="does not fit its files"):
        jaxsub.load(tmp_path / "b")


def test_a_weight_of_one_number_is_the_same_before_and_after_it_is_saved(tmp_path):
    """Its basis is the unit vector, which 8 bits and a scale do not hold exactly."""
    (tmp_path / "m").mkdir()
    for n in range(3):
        safetensors.write(tmp_path / "m" / f"m{n}.safetensors", {"s": np.array([n + 0.3], np.float32)})
    made = jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=1, basis_dtype="int8")
    found, wanted = (b.layers[0].subspace.basis for b in (jaxsub.load(tmp_path / "b"), made))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("max_error", [0.0, 1e-9])
def test_float64_weights_are_kept_as_such_beside_a_narrow_basis(tmp_path, max_error):
    (tmp_path / "m").mkdir()
    x = np.random.default_rng(0).standard_normal((5, 6, 4))
    for n, one in enumerate(x):
        safetensors.write(tmp_path / "m" / f"m{n}.safetensors", {"w": one})
    jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=2, basis_dtype="bfloat16", max_error=max_error)
    bundle = jaxsub.load(tmp_path / "b")
    rebuilt = bundle.reconstruct(bundle.coefficients())["w"]
    assert np.linalg.norm(rebuilt - x) <= max_error * np.linalg.norm(x)
    assert bundle.layers[0].figures["error_max"] <= max_error


def test_names_that_are_no_text_are_refused_before_a_bundle_is_written(tmp_path):
    (tmp_path / "m").mkdir()
    try:
        for name in (b"x\xff", b"y", b"z"):
            path = os.path.join(os.fsencode(tmp_path / "m"), name + b".safetensors")
            safetensors.write(os.fsdecode(path), {"w": np.arange(6, dtype=np.float32)})
    except OSError:
        pytest.skip("this file system has text names only")
    with pytest.raises(errors.ConfigError, match="no UTF-8"):
        jaxsub.fit(str(tmp_path / "m"), tmp_path / "b", rank=1)
