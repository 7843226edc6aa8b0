"""Files of kohya-ss and older diffusers: scales, refusals, writing."""

import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest

import jaxsub
from jaxsub import errors, formats
from jaxsub.formats import kohya, safetensors
from tests.formats.lora_files import ALPHA, DOWN, STEM, UP, delta, factor, loha, opened, pair, rebuilt, stored


def refused(tmp_path, arrays, words, key=None, metadata=None, rule="H13"):
    with pytest.raises(errors.InputError, match=words) as caught:
        opened(tmp_path, arrays, metadata)
    assert caught.value.rule == rule and caught.value.hint
    assert key is None or caught.value.key == key


# Scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (0, 1), (2, 1), (1, 0.5), (6, 3), (0.25, 0.125), (1e-3, 5e-4)])
def test_scale_is_alpha_over_rank_and_one_without(tmp_path, alpha, scale):
    arrays = pair(alpha=alpha)
    model = opened(tmp_path, arrays)
    assert (model.format, list(model.adapters), dict(model.tensors)) == ("kohya", [STEM], {})
    assert (model.adapters[STEM].rank, model.adapters[STEM].shape) == (2, (3, 5))
    np.testing.assert_allclose(delta(model, STEM), scale * (arrays[UP].astype("f8") @ arrays[DOWN]), rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "int32"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_any_number_type(tmp_path, dtype, shape):
    array = np.full(shape, 8, getattr(ml_dtypes, dtype, dtype))
    assert opened(tmp_path, {**pair(), ALPHA: array}).adapters[STEM].scale == 4


def test_ranks_and_alphas_differ_by_layer(tmp_path):
    arrays = pair("a", r=2, alpha=4) | pair("b", r=4, alpha=2) | pair("c", r=3) | pair("d", r=1, alpha=7)
    found = opened(tmp_path, arrays).adapters
    assert {k: (p.rank, p.scale) for k, p in found.items()} == {"a": (2, 2), "b": (4, 0.5), "c": (3, 1), "d": (1, 7)}


def test_files_of_one_header_keep_their_own_alphas(tmp_path):
    arrays = pair()
    first, second = (opened(tmp_path, {**arrays, ALPHA: np.float32(a)}, name=f"{a}.safetensors") for a in (2, 6))
    assert (first.adapters[STEM].scale, second.adapters[STEM].scale) == (1, 3)
    assert second.adapters[STEM].a.extent.file.path.endswith("6.safetensors")


def test_what_follows_from_a_header_is_worked_out_once(tmp_path, monkeypatch):
    calls, make = [], kohya._make_plan
    monkeypatch.setattr(kohya, "_make_plan", lambda content: calls.append(1) or make(content))
    arrays = pair("worked_out_once", alpha=1)
    models = [opened(tmp_path, arrays, name=f"{n}.safetensors") for n in range(3)]
    assert len(calls) == 1 and len({m.adapters["worked_out_once"].a.extent.file for m in models}) == 3


@pytest.mark.parametrize(
    "ends",
    [("lora.down.weight", "lora.up.weight"), ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), None],
)
def test_older_spellings(tmp_path, ends):
    stem = "unet.mid_block.attentions.0.processor.to_q"
    names = [f"{stem}.{end}" for end in ends] if ends else [f"{stem}_lora.down.weight", f"{stem}_lora.up.weight"]
    arrays = dict(zip(names, (factor(2, 5), factor(3, 2)), strict=True))
    model = opened(tmp_path, arrays)
    np.testing.assert_array_equal(delta(model, stem), arrays[names[1]] @ arrays[names[0]])
    assert opened(tmp_path, arrays | {f"{stem}.alpha": np.float32(6)}).adapters[stem].scale == 3


def test_convolutions(tmp_path):
    wide, point = "lora_unet_conv1", "lora_unet_conv2"
    arrays = {
        f"{wide}.lora_down.weight": factor(2, 5, 3, 3), f"{wide}.lora_up.weight": factor(4, 2, 1, 1),
        f"{point}.lora_down.weight": factor(2, 5, 1, 1), f"{point}.lora_up.weight": factor(4, 2, 1, 1),
        f"{wide}.alpha": np.float32(1),
    }  # fmt: skip
    model = opened(tmp_path, arrays)
    a, b = arrays[f"{wide}.lora_down.weight"], arrays[f"{wide}.lora_up.weight"]
    np.testing.assert_array_equal(delta(model, wide), 0.5 * np.einsum("orxy,rcij->ocij", b, a))
    assert (model.adapters[wide].shape, model.adapters[point].shape) == ((4, 5, 3, 3), (4, 5, 1, 1))


def test_differences_as_they_are(tmp_path):
    arrays = {f"{STEM}.diff": factor(3, 5), f"{STEM}.diff_b": factor(3), "n.w_norm": factor(4), "n.b_norm": factor(4)}
    model = opened(tmp_path, arrays)
    assert (model.format, set(model.tensors)) == ("kohya", {STEM, f"{STEM}.diff_b", "n", "n.b_norm"})
    np.testing.assert_array_equal(delta(model, STEM), arrays[f"{STEM}.diff"])
    np.testing.assert_array_equal(delta(model, "n.b_norm"), arrays["n.b_norm"])
    mixed = opened(tmp_path, arrays | pair("other"))
    assert len(mixed.tensors) == 4 and list(mixed.adapters) == ["other"]


def test_other_safetensors_files_stay_raw(tmp_path):
    for arrays in ({"w.diff": factor(2, 2), "v": factor(2)}, {"diff": factor(2)}, {"m.alpha": np.float32(1)}):
        model = opened(tmp_path, arrays)
        assert model.format == "safetensors" and set(model.tensors) == set(arrays)


# Hostile files ----------------------------------------------------------------------------------------------------


GOOD = pair(alpha=2)


FAULTS = {
    "no lora_up": {DOWN: GOOD[DOWN]},
    "and no lora_down": {UP: GOOD[UP], ALPHA: GOOD[ALPHA]},
    "nothing that it scales": {**GOOD, "x.alpha": np.float32(1)},
    "inner sizes 2 and 4 differ": {**GOOD, UP: factor(3, 4)},
    "make no matrix": {**GOOD, DOWN: factor(2)},
    "wider than one": {DOWN: factor(2, 5, 3, 3), UP: factor(4, 2, 3, 3)},
    "has shape \\[2\\]": {**GOOD, ALPHA: factor(2)},
    "has shape \\[1, 1\\]": {**GOOD, ALPHA: factor(1, 1)},
    "has dtype bool": {**GOOD, ALPHA: np.array(True)},
    "is nan, a finite": {**GOOD, ALPHA: np.float32(np.nan)},
    "is inf, a finite": {**GOOD, ALPHA: np.float16(np.inf)},
    "is -1.0, a finite": {**GOOD, ALPHA: np.float32(-1)},
    "lora_down twice": {**GOOD, f"{STEM}.lora.down.weight": factor(2, 5)},
    "2 kinds of update: diff, lora": {**GOOD, f"{STEM}.diff": factor(3, 5)},
    "2 kinds of update: hada, lora": GOOD | stored(loha()[0]),
    "an update twice": {**GOOD, "n.diff": factor(3), "n.w_norm": factor(3)},
    "DoRA, which needs the base": {**GOOD, f"{STEM}.dora_scale": factor(3, 1)},
    "of OFT": {"x.oft_blocks": factor(2, 2, 2)},
    "of GLoRA": {**GOOD, "x.a1.weight": factor(2, 2)},
    "of IA3": {**GOOD, "x.on_input": factor(1)},
    "changes the base": {**GOOD, "x.reshape_weight": factor(2)},
    "textual inversion": {**GOOD, "bundle_emb.word.string_to_param.*": factor(2, 2)},
    "of another family": {**GOOD, "unet.x.lora_A.weight": factor(2, 2)},
    "no part of an update": {**GOOD, "classifier.weight": factor(2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("words", FAULTS)
def test_faults_are_refused_by_name(tmp_path, words):
    refused(tmp_path, FAULTS[words], words)


def test_factors_that_are_no_floats_are_refused(tmp_path):
    refused(tmp_path, GOOD | {UP: factor(3, 2).astype("i4")}, "floats expected", rule="H6")


def test_metadata_of_the_other_family_is_refused(tmp_path):
    refused(tmp_path, GOOD, "alphas of their own", metadata={"lora_adapter_metadata": json.dumps({"unet.r": 2})})


def test_one_bad_file_is_set_aside_and_named(tmp_path):
    for n in range(4):
        safetensors.write(tmp_path / f"m{n}.safetensors", pair(alpha=-1 if n == 2 else n + 1))
    found = jaxsub.open_collection(str(tmp_path))
    assert [r.id for r in found.refs] == ["m0", "m1", "m3"]
    assert [(q["id"], q["layer"], q["rule"]) for q in found.quarantined] == [("m2", ALPHA, "H13")]


def test_zero_updates_are_named(tmp_path):
    assert any("no effect" in w for w in opened(tmp_path, {**GOOD, UP: GOOD[UP] * 0}).warnings)
    assert opened(tmp_path, GOOD).warnings == ()


# Writing ----------------------------------------------------------------------------------------------------------


METADATA = {"ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_tag": "x", "modelspec.title": "t"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_again_unchanged_is_the_same(tmp_path, dtype):
    arrays = pair("a", alpha=1) | pair("b", r=4) | stored(loha()[0], "c", 3) | {"d.diff": factor(2, 2)}
    arrays = {name: array.astype(getattr(ml_dtypes, dtype, dtype)) for name, array in arrays.items()}
    model = opened(tmp_path, arrays, METADATA)
    formats.rewrite(model, tmp_path / "new.safetensors", {})
    again = safetensors.read(tmp_path / "new.safetensors")
    assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in again.items()} == {
        k: (v.dtype, v.shape, v.tobytes()) for k, v in arrays.items()
    }
    assert safetensors.open_metadata(tmp_path / "new.safetensors") == METADATA
    found = formats.open_model(tmp_path / "new.safetensors")
    assert {k: p.scale for k, p in found.adapters.items()} == {k: p.scale for k, p in model.adapters.items()}
    assert formats.ending(model) == ".safetensors"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rebuilt_layers_have_scale_one_and_the_others_are_kept(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    arrays = {k: v.astype(dtype) for k, v in (pair("a", alpha=1) | pair("b", alpha=5) | pair("c")).items()}
    model, (a, b) = opened(tmp_path, arrays, METADATA), (factor(3, 5), factor(3, 3))
    formats.rewrite(model, tmp_path / "new.safetensors", {"a": (a, b), "c": (a, b)})
    again, found = safetensors.read(tmp_path / "new.safetensors"), formats.open_model(tmp_path / "new.safetensors")
    assert set(again) == {*arrays, "c.alpha"} and list(found.adapters) == ["a", "b", "c"]
    for layer in "ac":
        assert again[f"{layer}.alpha"] == 3 and again[f"{layer}.alpha"].shape == ()
        np.testing.assert_array_equal(delta(found, layer), b.astype("f8") @ a)
    assert {v.dtype for v in again.values()} == {dtype}
    assert all(again[k].tobytes() == v.tobytes() for k, v in arrays.items() if k.startswith("b."))
    assert found.adapters["b"].scale == 2.5
    assert found.metadata["ss_network_dim"] == found.metadata["ss_network_alpha"] == "Dynamic"
    assert found.metadata["ss_tag"] == "x"


def test_alpha_is_written_wider_where_its_dtype_would_round_it(tmp_path):
    arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in pair(i=300, o=300, alpha=2).items()}
    model = opened(tmp_path, arrays)
    formats.rewrite(model, tmp_path / "new.safetensors", {STEM: (factor(257, 300), factor(300, 257))})
    again = safetensors.read(tmp_path / "new.safetensors")
    assert (again[ALPHA], again[ALPHA].dtype) == (257, np.float32)  # bfloat16 would say 256
    assert formats.open_model(tmp_path / "new.safetensors").adapters[STEM].scale == 1


def test_uniform_rank_and_alpha_are_numbers_again(tmp_path):
    model = opened(tmp_path, pair("a", alpha=1) | pair("b", alpha=1), METADATA)
    new = (factor(3, 5), factor(3, 3))
    formats.rewrite(model, tmp_path / "new.safetensors", {"a": new, "b": new})
    found = safetensors.open_metadata(tmp_path / "new.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", "3")


def test_older_spellings_get_no_alpha_they_had_not(tmp_path):
    arrays = {"x_lora.down.weight": factor(2, 5), "x_lora.up.weight": factor(3, 2)}
    for more, scale in (({}, set()), ({"x.alpha": np.float32(1)}, {"x.alpha"})):
        model = opened(tmp_path, arrays | more)
        formats.rewrite(model, tmp_path / "new.safetensors", {"x": (factor(4, 5), factor(3, 4))})
        assert set(safetensors.read(tmp_path / "new.safetensors")) - set(arrays) == scale
        assert formats.open_model(tmp_path / "new.safetensors").adapters["x"].scale == 1


def test_rebuilt_convolutions_keep_their_axes(tmp_path):
    arrays = {DOWN: factor(2, 5, 3, 2), UP: factor(4, 2, 1, 1), ALPHA: np.float32(8)}
    a, b = factor(3, 30), factor(4, 3)
    formats.rewrite(opened(tmp_path, arrays), tmp_path / "new.safetensors", {STEM: (a, b)})
    again = safetensors.read(tmp_path / "new.safetensors")
    assert (again[DOWN].shape, again[UP].shape) == ((3, 5, 3, 2), (4, 3, 1, 1))
    np.testing.assert_array_equal(
        delta(formats.open_model(tmp_path / "new.safetensors"), STEM), (b @ a).reshape(4, 5, 3, 2)
    )


def test_hashes_are_of_the_new_tensors(tmp_path):
    hashes = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x0"}
    arrays = {**pair(i=200_000, o=300_000, alpha=1)}
    model = opened(tmp_path, arrays, METADATA | hashes)
    formats.rewrite(model, tmp_path / "new.safetensors", {STEM: (factor(2, 200_000), factor(300_000, 2))})
    raw, found = (tmp_path / "new.safetensors").read_bytes(), safetensors.open_metadata(tmp_path / "new.safetensors")
    start = 8 + int.from_bytes(raw[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    # The old hash is of the file with the ss_ entries alone, as kohya-ss computes it.
    own = {k: v for k, v in found.items() if k.startswith("ss_")}
    safetensors.write(tmp_path / "own.safetensors", safetensors.read(tmp_path / "new.safetensors"), own)
    window = (tmp_path / "own.safetensors").read_bytes()[0x100000:0x110000]
    assert len(window) == 0x10000 and found["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]
    formats.rewrite(opened(tmp_path, arrays), tmp_path / "none.safetensors", {})
    assert safetensors.open_metadata(tmp_path / "none.safetensors") == {}


def test_values_that_the_stored_dtype_cannot_hold_are_refused(tmp_path):
    model = opened(tmp_path, {k: v.astype(np.float16) for k, v in GOOD.items()})
    with pytest.raises(errors.InputError, match="more than float16 holds"):
        formats.rewrite(model, tmp_path / "new.safetensors", {STEM: (factor(1, 5), np.full((3, 1), 1e12))})
    assert not os.path.exists(tmp_path / "new.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_collection_is_fitted_projected_and_written(tmp_path, dtype):
    plane = np.random.default_rng(9)
    u, v, basis = plane.standard_normal((11, 2)), plane.standard_normal((2, 7)), plane.standard_normal((2, 6, 4))
    products, ids = {}, []
    os.makedirs(tmp_path / "m")
    for n in range(6):
        rng = np.random.default_rng(n)
        rank, alpha = (2, 1.0) if n % 2 else (3, 6.0)
        down, up = rng.standard_normal((rank, 2)) @ v, u @ rng.standard_normal((2, rank))
        half = np.tensordot(rng.standard_normal(2), basis, 1)
        w1a, values, w1b = np.linalg.svd(half, full_matrices=False)
        arrays = {
            DOWN: down, UP: up, ALPHA: np.array(alpha),
            "lora_te_k.hada_w1_a": w1a, "lora_te_k.hada_w1_b": values[:, None] * w1b,
            "lora_te_k.hada_w2_a": np.full((6, 4), 0.5), "lora_te_k.hada_w2_b": np.full((4, 4), 0.5),
        }  # fmt: skip
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        safetensors.write(tmp_path / "m" / f"m{n}.safetensors", arrays, {"ss_network_dim": str(rank)})
        products[f"m{n}"] = alpha / rank * (up @ down), half
        ids.append(f"m{n}")
    found = jaxsub.open_collection(str(tmp_path / "m"))
    assert [(g.name, g.parametrisation) for g in found.groups] == [("lora_te_k", "dense"), (STEM, "lora")]
    again = rebuilt(tmp_path)
    assert [(g.name, g.parametrisation) for g in again.groups] == [("lora_te_k", "dense"), (STEM, "lora")]
    assert [r.id for r in again.refs] == ids
    for ref, model in zip(again.refs, again.models, strict=True):
        product, half = products[ref.id]
        tolerance = 5e-3 if dtype == "float16" else 1e-4
        assert model.format == "kohya" and model.adapters[STEM].scale == 1
        np.testing.assert_allclose(delta(model, STEM), product, atol=tolerance * np.abs(product).max())
        np.testing.assert_allclose(delta(model, "lora_te_k"), half, atol=tolerance * np.abs(half).max())
        assert model.metadata["ss_network_dim"] == "2"


def test_readers_claim_no_path():
    assert not kohya.claims("x.safetensors")
