"""Weights at both ends of what their dtypes hold: what a bundle says of them, and gives back, is true."""

import dataclasses

import numpy as np
import pytest

import jaxsub
from jaxsub import bundle as bundles, errors, formats, plugins
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import fit_streamed, project, update
from tests.linalg.test_ratios import DTYPES

SCALES = [
    ("float32", 3.4e38), ("float32", 1e-37), ("float32", 1e-41), ("bfloat16", 3.3e38), ("bfloat16", 1e-38),
    ("bfloat16", 1e30), ("float16", 65000.0), ("float16", 1e-5), ("float64", 1e280), ("float64", 1e-280),
]  # fmt: skip
DENSE = [name for name in plugins.available("decompositions") if not name.startswith("lora")]
SHAPE, COUNT = (12, 8), 9


def stack(dtype, largest, seed=0, scatter=0.01):
    """(N, *SHAPE) of three directions about a mean, the largest entry being `largest`, and the same in float64."""
    rng = np.random.default_rng(seed)
    x = np.tensordot(
        rng.standard_normal((COUNT, 3)) * [3, 2, 1], np.random.default_rng(7).standard_normal((3, *SHAPE)), 1
    )
    x = x + 2 + scatter * rng.standard_normal(x.shape)
    x = (x / np.abs(x).max() * largest).astype(DTYPES[dtype])
    return x, x.astype(np.float64)


def save(folder, x):
    folder.mkdir()
    for n, model in enumerate(x):
        safetensors.write(folder / f"m{n}.safetensors", {"w": model})
    return str(folder)


def relative(found, wide):
    """(n,) errors in units of the models' norms, and none of the squares leaves float64."""
    unit = np.abs(wide).max()
    off, norms = ((np.asarray(a, np.float64) / unit).reshape(len(wide), -1) for a in (found - wide, wide))
    return np.linalg.norm(off, axis=1) / np.linalg.norm(norms, axis=1)


def require_true(made, wide, folder, unit):
    """The bundle's statements hold for what it rebuilds, before and after its files; projecting gives the same."""
    (layer,) = made.layers
    rebuilt = made.reconstruct(made.coefficients())["w"]
    found = relative(rebuilt, wide)
    assert np.isfinite(rebuilt).all()
    np.testing.assert_allclose(layer.figures["error_max"], found.max(), rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(layer.figures["error_mean"], found.mean(), rtol=1e-3, atol=2e-6)
    made.save(folder / "b")
    again = jaxsub.load(folder / "b")
    np.testing.assert_array_equal(again.reconstruct(again.coefficients())["w"], rebuilt)
    others = again.project(jaxsub.open_collection(str(folder / "c"))).values["w"]
    np.testing.assert_allclose(others / unit, layer.values / unit, atol=1e-6 * np.abs(layer.values / unit).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype", "largest"),
    [(method, *scale) for method in DENSE for scale in SCALES],
)
def test_statements_are_true_at_both_ends(tmp_path, method, dtype, largest):
    x, wide = stack(dtype, largest)
    made = jaxsub.fit(save(tmp_path / "c", x), decomposition=method, rank=3)
    require_true(made, wide, tmp_path, largest)
    if method == "gram":
        assert made.layers[0].figures["error_max"] < (0.1 if dtype == "bfloat16" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "largest"), SCALES[:6])
def test_a_fit_in_two_reads_is_as_true(tmp_path, monkeypatch, dtype, largest):
    monkeypatch.setattr(fit_streamed, "allowed", lambda config: 1)
    monkeypatch.setattr(fit_streamed, "_require_memory", lambda *_: None)
    x, wide = stack(dtype, largest)
    made = jaxsub.fit(save(tmp_path / "c", x), rank=3)
    require_true(made, wide, tmp_path, largest)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "largest"), SCALES)
def test_models_are_written_and_added_as_they_are(tmp_path, dtype, largest):
    """All directions are kept: files come back to the rounding of their dtype, also those of strangers and new ones."""
    x, wide = stack(dtype, largest, scatter=0)
    jaxsub.fit(save(tmp_path / "c", x), str(tmp_path / "f"), rank=COUNT - 1)
    bundle = str(tmp_path / "f" / "bundle") if (tmp_path / "f" / "bundle").exists() else str(tmp_path / "f")
    project.run(
        project.Config(bundle=bundle, collection=(str(tmp_path / "c"),), write_models=str(tmp_path / "w")),
        workdir=str(tmp_path / "p"),
    )
    eps = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-20, "float64": 2**-40}[dtype]
    tiny = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24, "float64": 0.0}[dtype] / largest
    for n in range(COUNT):
        again = formats.open_model(tmp_path / "w" / f"m{n}.safetensors")
        array = formats.read(again, again.tensors["w"])
        assert array.dtype == x.dtype
        assert np.abs(array.astype(np.float64) / largest - wide[n] / largest).max() <= eps + tiny
    fresh, wide_fresh = stack(dtype, largest * 0.9, seed=1, scatter=0)
    save(tmp_path / "n", fresh)
    for n in range(COUNT):
        (tmp_path / "n" / f"m{n}.safetensors").rename(tmp_path / "n" / f"new{n}.safetensors")
    update.run(update.Config(bundle=bundle, collection=(str(tmp_path / "n"),)), str(tmp_path / "u"))
    place = next(p.parent for p in sorted((tmp_path / "u").rglob("manifest.json")))
    more = jaxsub.load(place)
    rebuilt = more.reconstruct(more.coefficients())["w"]
    off = np.abs(rebuilt / largest - np.concatenate([wide, wide_fresh]) / largest).max()
    assert off < 0.02 and np.isfinite(rebuilt).all()


def test_float64_models_keep_their_digits_through_a_projection(tmp_path):
    x, _ = stack("float64", 1.0, scatter=0)
    jaxsub.fit(save(tmp_path / "c", x), str(tmp_path / "f"), rank=COUNT - 1)
    models = (str(tmp_path / "c"),)
    project.run(project.Config(str(tmp_path / "f"), models, write_models=str(tmp_path / "w")), str(tmp_path / "p"))
    for n in range(COUNT):
        again = formats.open_model(tmp_path / "w" / f"m{n}.safetensors")
        assert np.abs(formats.read(again, again.tensors["w"]) - x[n]).max() < 1e-14


@pytest.mark.parametrize("largest", [1.7e308, 1e-300])
def test_numbers_that_leave_float64_no_room_are_refused_by_name(tmp_path, largest):
    folder = save(tmp_path / "c", stack("float64", largest)[0])
    with pytest.raises(errors.InputError, match=r"m\d\.safetensors, w: .*(no room|are zero)") as caught:
        jaxsub.fit(folder, rank=3)
    assert caught.value.rule == "N5"
    if largest > 1:
        plain = jaxsub.fit(save(tmp_path / "d", stack("float64", 1.0)[0]), rank=3)
        with pytest.raises(errors.InputError, match="no room"):
            plain.project(jaxsub.open_collection(folder))


def test_narrow_storage_of_extreme_numbers_is_refused(tmp_path):
    folder = save(tmp_path / "c", stack("float32", 1e-40)[0])
    with pytest.raises(errors.ConfigError, match="need float64, not bfloat16"):
        jaxsub.fit(folder, rank=2, basis_dtype="bfloat16")


def adapters(folder, sizes, seed=0):
    """Adapters whose A, B and alpha are of these sizes; (N, o, i) updates in units of their product, float64."""
    size_a, size_b, alpha = sizes
    shared, rng = np.random.default_rng(5), np.random.default_rng(seed)
    left, right = shared.standard_normal((9, 3)), shared.standard_normal((3, 11))
    wide = []
    for n in range(8):
        a, b = rng.standard_normal((2, 3)) @ right, left @ rng.standard_normal((3, 2))
        a, b = (a * size_a).astype(np.float32), (b * size_b).astype(np.float32)
        peft.write(str(folder / f"m{n}"), {"q": (a, b, alpha, 2)})
        wide.append(b.astype(np.float64) / size_b @ (a.astype(np.float64) / size_a) / 2)
    return np.array(wide)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hooi", "hosvd"])
@pytest.mark.parametrize("max_error", [-1.0, 0.0])
@pytest.mark.parametrize(
    "sizes", [(1e30, 1e30, 4.0), (1e-30, 1e-30, 4.0), (1.0, 1.0, 1e100), (1e-35, 1e3, 1e-60), (1e20, 1e-20, 1e12)]
)
def test_low_rank_updates_of_any_size(tmp_path, method, max_error, sizes):
    wide = adapters(tmp_path / "c", sizes)
    unit = float(np.prod(sizes))
    made = jaxsub.fit(str(tmp_path / "c"), decomposition=method, rank=3, max_error=max_error)
    made.save(tmp_path / "b")
    again = jaxsub.load(tmp_path / "b")
    for one in (made, again):
        a, b = one.reconstruct_factors(one.coefficients())["q"]
        found = b.astype(np.float64) / unit @ a.astype(np.float64)
        assert relative(found, wide).max() < 2e-6
        values = one.project(jaxsub.open_collection(str(tmp_path / "c"))).values["q"]
        np.testing.assert_allclose(values / unit, one.layers[0].values / unit, atol=1e-5)
    assert made.layers[0].figures["error_max"] < 2e-6


@pytest.mark.slow
def test_updates_whose_squares_are_no_numbers_are_refused(tmp_path):
    adapters(tmp_path / "c", (1.0, 1.0, 1e180))
    with pytest.raises(errors.InputError, match="holds updates of a scale of") as caught:
        jaxsub.fit(str(tmp_path / "c"), rank=3)
    assert caught.value.rule == "N5" and caught.value.key == "q"


@pytest.mark.slow
def test_coefficients_stay_narrow_where_there_is_room(tmp_path):
    made = jaxsub.fit(save(tmp_path / "c", stack("float32", 1.0)[0]), rank=2)
    space = made.layers[0].subspace
    assert space.project(np.ones((1, *SHAPE))).dtype == space.reconstruct(np.ones((1, 2))).dtype == np.float32
    assert dataclasses.is_dataclass(space) and isinstance(made, bundles.Bundle)
