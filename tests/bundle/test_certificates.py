"""Certificates of bundles against errors by NumPy from what the files hold: no bound is under the truth."""

import itertools
import json

import numpy as np
import pytest

import jaxsub
from jaxsub.formats import safetensors
from jaxsub.pipelines import update
from tests.selected import first

N = 12
SHAPE = (24, 30)


def write(folder, x, first=0):
    folder.mkdir(exist_ok=True)
    for n, w in enumerate(x):
        safetensors.write(str(folder / f"m{first + n:02d}.safetensors"), {"w": np.float32(w)})


def models(rng, count, mean):
    basis = rng.standard_normal((3, *SHAPE))
    shared = np.tensordot(rng.standard_normal((count, 3)), basis, 1)
    return np.float32(mean * rng.standard_normal(SHAPE) + shared + 0.1 * rng.standard_normal((count, *SHAPE)))


def error(bundle, x):
    """Relative to what the bundle's mean leaves."""
    (layer,) = bundle.layers
    again = np.asarray(bundle.reconstruct(bundle.coefficients())["w"], np.float64)
    mean = np.asarray(layer.subspace.mean, np.float64).reshape(-1, *SHAPE)
    return np.linalg.norm(x - again) / np.linalg.norm(x - mean)


@pytest.mark.parametrize("decomposition", first(["gram", "hosvd"], 1))
@pytest.mark.parametrize(
    "narrow", first([(("int8", ""),), (("", ""),), (("bfloat16", ""),), (("", "int8"),), (("int8", "bfloat16"),)], 2)
)
def test_a_bound_counts_what_storing_adds(tmp_path, decomposition, narrow):
    rng = np.random.default_rng(0)
    for mean, rank in itertools.product((0.0, 50.0), (3, N - 1)):
        place = tmp_path / f"{mean:.0f}.{rank}"
        x = models(rng, N, mean)
        write(tmp_path / f"models{mean:.0f}.{rank}", x)
        options = {
            "rank": rank,
            "decomposition": decomposition,
            "basis_dtype": narrow[0],
            "coefficient_dtype": narrow[1],
        }
        jaxsub.fit(str(tmp_path / f"models{mean:.0f}.{rank}"), str(place), **options)
        bundle = jaxsub.load(str(place))
        found, certificate = error(bundle, x), bundle.layers[0].subspace.certificate
        assert found <= certificate.bound <= 1.02 * found + 3e-4, (mean, rank)
        assert certificate.relative_error == pytest.approx(found, rel=0.01, abs=3e-4)


@pytest.mark.parametrize("narrow", first(["int8", "", "bfloat16"]))
@pytest.mark.parametrize("change", first(["both", "added", "removed"]))
def test_a_bound_holds_where_models_come_and_go(tmp_path, narrow, change):
    rng = np.random.default_rng(1)
    x = models(rng, N + 4, 5.0)
    write(tmp_path / "old", x[:N])
    write(tmp_path / "new", x[N:], N)
    jaxsub.fit(str(tmp_path / "old"), str(tmp_path / "bundle"), rank=N - 1, basis_dtype=narrow)
    given = {"collection": (str(tmp_path / "new"),), "rank": 9} if change != "removed" else {}
    given |= {"remove": ("m00", "m01")} if change != "added" else {}
    made = update.run(update.Config(bundle=str(tmp_path / "bundle"), captured=1.0, **given))
    kept = [int(i[1:]) for i in made.model_ids]
    truth = error(made, x[kept])
    assert truth <= made.layers[0].subspace.certificate.bound


@pytest.mark.parametrize("decomposition", first(["gram", "hosvd"], 1))
def test_an_update_of_a_whole_bundle_has_the_errors_of_a_fit_of_all(tmp_path, decomposition):
    """Models near a mean far larger than what they differ by: nearly all of their norm is outside the frame."""
    rng = np.random.default_rng(2)
    x = np.float32(10 * rng.standard_normal(SHAPE) + 0.5 * rng.standard_normal((16, *SHAPE)))
    write(tmp_path / "all", x)
    write(tmp_path / "old", x[:10])
    write(tmp_path / "new", x[10:], 10)
    most, rank = (9, 9) if decomposition == "gram" else (30, 12)
    jaxsub.fit(str(tmp_path / "old"), str(tmp_path / "bundle"), rank=most, decomposition=decomposition)
    config = update.Config(
        bundle=str(tmp_path / "bundle"), collection=(str(tmp_path / "new"),), captured=1.0, rank=rank
    )
    made, want = update.run(config), jaxsub.fit(str(tmp_path / "all"), rank=rank, decomposition=decomposition)
    assert "exact" in update.table(made) or decomposition == "hosvd"
    if made.provenance["updates"][-1]["layers"]["w"]["how"] == "refitted":
        for figure in ("error_mean", "error_max"):
            assert made.layers[0].figures[figure] == pytest.approx(want.layers[0].figures[figure], rel=1e-3)


@pytest.mark.slow
def test_a_bound_counts_cores_that_are_cut_to_a_rank(tmp_path):
    rng, products = np.random.default_rng(3), []
    for n in range(20):
        folder = tmp_path / "models" / f"m{n:02d}"
        folder.mkdir(parents=True)
        a, b = (np.float32(rng.standard_normal(s) * 0.5 ** np.arange(8).reshape(s[0] == 8 and (8, 1) or (1, 8)))
                for s in ((8, 30), (24, 8)))  # fmt: skip
        products.append(b.astype(np.float64) @ a)
        key = "base_model.model.q.lora_{}.weight"
        safetensors.write(str(folder / "adapter_model.safetensors"), {key.format("A"): a, key.format("B"): b})
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    made = jaxsub.fit(str(tmp_path / "models"), str(tmp_path / "bundle"), budget_bytes=16000)
    (layer,) = made.layers
    assert layer.halves and layer.halves[0].shape[2] < 8  # cut
    again = np.asarray(made.reconstruct(made.coefficients())[layer.name], np.float64)
    truth = np.linalg.norm(again - products) / np.linalg.norm(products)
    assert truth <= layer.subspace.certificate.bound <= 1.01 * truth
