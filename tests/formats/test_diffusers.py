"""LoRA files of diffusers: scales from the header's metadata, refusals, writing; PEFT itself where it is installed."""

import json
import math
import os

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import diffusers, safetensors
from tests.formats.lora_files import delta, factor, opened, rebuilt

KEY = "lora_adapter_metadata"
Q, V, TEXT = "unet.down.0.to_q", "unet.down.0.to_v", "text_encoder.layers.0.q_proj"
FIELDS = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}


def pair(layer, r=2, i=5, o=3):
    return {f"{layer}.lora_A.weight": factor(r, i), f"{layer}.lora_B.weight": factor(o, r)}


ARRAYS = pair(Q) | pair(V) | pair(TEXT)


def described(fields):
    return {"format": "pt", KEY: json.dumps(fields)}


def refused(tmp_path, words, fields=None, *, arrays=None, key=None, metadata=None):
    with pytest.raises(errors.InputError, match=words) as caught:
        opened(tmp_path, ARRAYS if arrays is None else arrays, metadata or (fields and described(fields)))
    assert caught.value.rule == "H13" and caught.value.hint
    assert key is None or caught.value.key == key


# Scales -----------------------------------------------------------------------------------------------------------


def test_without_metadata_alpha_is_the_rank_of_each_layer(tmp_path):
    arrays = pair(Q, r=2) | pair(V, r=4) | pair("transformer.x", r=3) | pair("text_encoder_2.y", r=1)
    model = opened(tmp_path, arrays)
    assert model.format == "diffusers" and not model.tensors
    assert {k: (p.rank, p.scale) for k, p in model.adapters.items()} == {
        Q: (2, 1), V: (4, 1), "transformer.x": (3, 1), "text_encoder_2.y": (1, 1)
    }  # fmt: skip
    np.testing.assert_array_equal(delta(model, Q), arrays[f"{Q}.lora_B.weight"] @ arrays[f"{Q}.lora_A.weight"])


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({}, (3, 3, 0.5)),
        ({"unet.use_rslora": True}, (6 / math.sqrt(2), 6 / math.sqrt(2), 0.5)),
        ({"unet.alpha_pattern": {"to_v": 2}}, (3, 1, 0.5)),
        ({"unet.alpha_pattern": {r"^down\.0\.to_v": 2}, "text_encoder.alpha_pattern": {"to_v": 9}}, (3, 1, 0.5)),
        ({"unet.r": 9, "unet.rank_pattern": {"to_q": 2, "to_v": 2}}, (3, 3, 0.5)),
        ({"unet.target_modules": ["to_q", "to_v"], "unet.peft_type": "LORA"}, (3, 3, 0.5)),
        ({"unet.lora_alpha": 0.5}, (0.25, 0.25, 0.5)),
    ],
)
def test_scales_of_the_metadata(tmp_path, fields, scales):
    found = opened(tmp_path, ARRAYS, described(FIELDS | fields)).adapters
    assert tuple(found[layer].scale for layer in (Q, V, TEXT)) == pytest.approx(scales, rel=1e-15)
    assert list(found) == [t.removesuffix(".lora_A.weight") for t in sorted(ARRAYS) if "lora_A" in t]


def test_a_component_without_metadata_has_the_rank_as_alpha(tmp_path):
    found = opened(tmp_path, ARRAYS, described({"unet.r": 2, "unet.lora_alpha": 6})).adapters
    assert (found[Q].scale, found[TEXT].scale) == (3, 1)


def test_metadata_does_not_leak_between_files_of_the_same_tensors(tmp_path):
    one, two = (
        opened(tmp_path, ARRAYS, described(FIELDS | {"unet.lora_alpha": a}), f"{a}.safetensors") for a in (2, 4)
    )
    assert (one.adapters[Q].scale, two.adapters[Q].scale) == (1, 2)


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 4), (0.0, 1), (1.0, 0.5)])
def test_alphas_beside_the_factors(tmp_path, alpha, scale):
    layer = "diffusion_model.blocks.0.q"  # as ComfyUI names it
    arrays = pair(layer) | pair("diffusion_model.blocks.0.v") | {f"{layer}.alpha": np.float16(alpha)}
    found = opened(tmp_path, arrays).adapters
    assert (found[layer].scale, found["diffusion_model.blocks.0.v"].scale) == (scale, 1)


def test_convolutions_and_adapter_names(tmp_path):
    arrays = {"unet.c.lora_A.default.weight": factor(2, 5, 3, 3), "unet.c.lora_B.default.weight": factor(4, 2, 1, 1)}
    model = opened(tmp_path, arrays, described({"unet.r": 2, "unet.lora_alpha": 1}))
    b, a = arrays["unet.c.lora_B.default.weight"], arrays["unet.c.lora_A.default.weight"]
    np.testing.assert_array_equal(delta(model, "unet.c"), 0.5 * np.einsum("orxy,rcij->ocij", b, a))


def test_folders_with_one_such_file_are_one_model(tmp_path):
    opened(tmp_path, ARRAYS, described(FIELDS), "pytorch_lora_weights.safetensors")
    model = formats.open_model(tmp_path)
    assert model.format == "diffusers" and model.adapters[Q].scale == 3


def test_warnings(tmp_path):
    zero = {k: v * 0 if "lora_B" in k else v for k, v in ARRAYS.items()}
    assert any("no effect" in w for w in opened(tmp_path, zero).warnings)
    (warning,) = opened(tmp_path, ARRAYS, described(FIELDS | {"unet.use_new": 1})).warnings
    assert "use_new" in warning and "unet" in warning


# Hostile files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 3), ("r", "2"), ("r", True), ("r", 0), ("r", ...), ("lora_alpha", ...), ("lora_alpha", "6"),
        ("lora_alpha", None), ("use_dora", True), ("lora_bias", True), ("peft_type", "LOHA"), ("rank_pattern", [1]),
        ("alpha_pattern", {"to_q": "x"}), ("rank_pattern", {"(a+)+": 2}), ("use_rslora", "yes"),
        ("init_lora_weights", "pissa"), ("target_modules", ["x", "y"]),
    ],
)  # fmt: skip
def test_metadata_faults_name_component_and_field(tmp_path, field, value):
    fields = {k: v for k, v in (FIELDS | {f"unet.{field}": value}).items() if v is not ...}
    key = "unet.to_q" if isinstance(value, dict) and "to_q" in value else f"unet.{field}"
    refused(tmp_path, "m.safetensors", fields, key=key)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"unet.r": NaN}', '{"unet.r": 2, "unet.r": 2}', '{"unet.r": 1e999}', "[" * 500],
)
def test_metadata_that_is_no_strict_json_object(tmp_path, text):
    refused(tmp_path, KEY, metadata={KEY: text})


FAULTS = {
    "no lora_A": {k: v for k, v in ARRAYS.items() if k != f"{Q}.lora_A.weight"},
    "no lora_B": {k: v for k, v in ARRAYS.items() if k != f"{Q}.lora_B.weight"},
    "inner sizes": ARRAYS | {f"{Q}.lora_B.weight": factor(3, 4)},
    "a factor twice": ARRAYS | {f"{Q}.lora_A.default.weight": factor(2, 5)},
    "another kind of adapter": ARRAYS | {f"{Q}.lora_magnitude_vector": factor(3)},
    "no LoRA factor": ARRAYS | {"unet.conv_in.weight": factor(3)},
    "a layer that is not there": ARRAYS | {"unet.x.alpha": np.float32(1)},
    "is -1.0": ARRAYS | {f"{Q}.alpha": np.float32(-1)},
    "is nan": ARRAYS | {f"{Q}.alpha": np.float32(np.nan)},
    "has shape": ARRAYS | {f"{Q}.alpha": factor(2)},
}


@pytest.mark.parametrize("words", FAULTS)
def test_tensor_faults_are_refused_by_name(tmp_path, words):
    refused(tmp_path, words, arrays=FAULTS[words])


def test_two_scales_are_one_too_many(tmp_path):
    refused(tmp_path, "gives the scale too", FIELDS, arrays=ARRAYS | {f"{Q}.alpha": np.float32(1)}, key=f"{Q}.alpha")


def test_factors_of_unknown_places_have_no_scale(tmp_path):
    for layer in ("m.q", "base_model.model.unet.q"):
        with pytest.raises(errors.InputError, match="factor of an adapter"):
            opened(tmp_path, pair(layer) | pair(Q))


# Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metadata", [None, described(FIELDS)])
def test_written_again_unchanged_is_the_same(tmp_path, dtype, metadata):
    arrays = {k: v.astype(dtype) for k, v in ARRAYS.items()}
    model = opened(tmp_path, arrays, metadata)
    formats.rewrite(model, tmp_path / "new.safetensors", {})
    again = safetensors.read(tmp_path / "new.safetensors")
    assert {k: (v.dtype, v.tobytes()) for k, v in again.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in arrays.items()
    }
    assert safetensors.open_metadata(tmp_path / "new.safetensors") == (metadata or {})
    scales = [
        {k: p.scale for k, p in formats.open_model(f).adapters.items()}
        for f in (model.path, tmp_path / "new.safetensors")
    ]
    assert scales[0] == scales[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "fields",
    [
        None, FIELDS, {"unet.r": 2, "unet.lora_alpha": 6},
        FIELDS | {"unet.use_rslora": True, "unet.alpha_pattern": {"to_v": 5}, "unet.init_lora_weights": "gaussian"},
    ],
)  # fmt: skip
def test_rebuilt_layers_have_scale_one_and_the_others_are_kept(tmp_path, fields, dtype):
    arrays = {k: v.astype(dtype) for k, v in ARRAYS.items()}
    model = opened(tmp_path, arrays, fields and described(fields))
    a, b = factor(3, 5), factor(3, 3)
    formats.rewrite(model, tmp_path / "new.safetensors", {Q: (a, b)})
    again, found = safetensors.read(tmp_path / "new.safetensors"), formats.open_model(tmp_path / "new.safetensors")
    assert set(again) == set(arrays) and {v.dtype for v in again.values()} == {np.dtype(dtype)}
    assert all(again[k].tobytes() == v.tobytes() for k, v in arrays.items() if not k.startswith(Q))
    np.testing.assert_array_equal(delta(found, Q), b.astype("f8") @ a)
    assert {k: found.adapters[k].scale for k in (V, TEXT)} == {k: model.adapters[k].scale for k in (V, TEXT)}
    table = json.loads(found.metadata[KEY])
    assert {"unet", "text_encoder"} == {key.split(".")[0] for key in table}  # of a component left out, PEFT takes r = 8
    assert all(table[f"{c}.peft_type"] == "LORA" and table[f"{c}.target_modules"] for c in ("unet", "text_encoder"))
    assert table.get("unet.init_lora_weights", True) is True


def test_alphas_beside_the_factors_stay_there(tmp_path):
    arrays = ARRAYS | {f"{Q}.alpha": np.float16(4)}
    formats.rewrite(opened(tmp_path, arrays), tmp_path / "new.safetensors", {Q: (factor(3, 5), factor(3, 3))})
    again, found = safetensors.read(tmp_path / "new.safetensors"), formats.open_model(tmp_path / "new.safetensors")
    assert again[f"{Q}.alpha"] == 3 and again[f"{Q}.alpha"].dtype == np.float16 and KEY not in found.metadata
    assert found.adapters[Q].scale == 1


def test_components_that_diffusers_does_not_know_get_no_metadata(tmp_path):
    arrays = pair("diffusion_model.q") | pair(Q)
    new = (factor(3, 5), factor(3, 3))
    formats.rewrite(opened(tmp_path, arrays), tmp_path / "new.safetensors", {Q: new, "diffusion_model.q": new})
    found = formats.open_model(tmp_path / "new.safetensors")
    assert KEY not in found.metadata and {p.scale for p in found.adapters.values()} == {1}
    assert {p.rank for p in found.adapters.values()} == {3}


def test_rebuilt_convolutions_keep_their_axes(tmp_path):
    arrays = {"unet.c.lora_A.weight": factor(2, 5, 3, 2), "unet.c.lora_B.weight": factor(4, 2, 1, 1)}
    a, b = factor(3, 30), factor(4, 3)
    formats.rewrite(opened(tmp_path, arrays), tmp_path / "new.safetensors", {"unet.c": (a, b)})
    found = formats.open_model(tmp_path / "new.safetensors")
    np.testing.assert_array_equal(delta(found, "unet.c"), (b @ a).reshape(4, 5, 3, 2))


def write_collection(folder, dtype):
    """Six files of one subspace, of different ranks and alphas; id -> Delta-W of `Q`."""
    plane, products = np.random.default_rng(9), {}
    u, v = plane.standard_normal((11, 2)), plane.standard_normal((2, 7))
    os.makedirs(folder)
    for n in range(6):
        rng, rank = np.random.default_rng(n), 2 + n % 2
        a, b = rng.standard_normal((rank, 2)) @ v, u @ rng.standard_normal((2, rank))
        arrays = {f"{Q}.lora_A.weight": a.astype(dtype), f"{Q}.lora_B.weight": b.astype(dtype)}
        fields = {"unet.r": rank, "unet.lora_alpha": 2 * n + 1, "unet.use_rslora": n == 3}
        safetensors.write(folder / f"m{n}.safetensors", arrays, described(fields) if n else None)
        scale = (2 * n + 1) / (rank**0.5 if n == 3 else rank) if n else 1
        products[f"m{n}"] = scale * (b @ a)
    return products


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_collection_is_fitted_projected_and_written(tmp_path, dtype):
    products = write_collection(tmp_path / "m", dtype)
    again = rebuilt(tmp_path)
    assert [g.name for g in again.groups] == [Q] and [r.id for r in again.refs] == list(products)
    tolerance = 5e-3 if dtype == "float16" else 1e-4
    for ref, model in zip(again.refs, again.models, strict=True):
        assert (model.format, model.adapters[Q].scale, model.adapters[Q].rank) == ("diffusers", 1, 2)
        expected = products[ref.id]
        np.testing.assert_allclose(delta(model, Q), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
def test_peft_scales_as_the_written_metadata_says(tmp_path):
    """What diffusers does with a file: LoraConfig of a component's fields, injected, then the state dict."""
    library, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    layers = {"unet.a.q": 2, "unet.a.v": 4, "unet.b.q": 3}
    arrays = {k: v for layer, r in layers.items() for k, v in pair(layer, r).items()}
    fields = {"unet.r": 2, "unet.lora_alpha": 6, "unet.rank_pattern": {"a.v": 4, "b.q": 3}}
    model = opened(tmp_path, arrays, described(fields | {"unet.target_modules": ["q", "v"]}))
    for given, own in (
        (model, model.path),
        (opened(tmp_path, arrays, None, "n.safetensors"), tmp_path / "n.safetensors"),
    ):
        formats.rewrite(given, tmp_path / "new.safetensors", {"unet.a.v": (factor(1, 5), factor(3, 1))})
        new = formats.open_model(tmp_path / "new.safetensors")
        table = json.loads(new.metadata[KEY])
        config = library.LoraConfig(**{k.removeprefix("unet."): v for k, v in table.items()})
        linear = lambda: torch.nn.Linear(5, 3, bias=False)  # noqa: E731
        a, b = torch.nn.ModuleDict({"q": linear(), "v": linear()}), torch.nn.ModuleDict({"q": linear()})
        net = library.inject_adapter_in_model(config, torch.nn.ModuleDict({"a": a, "b": b}), "default")
        state = {k.removeprefix("unet."): torch.from_numpy(v) for k, v in safetensors.read(new.path).items()}
        library.set_peft_model_state_dict(net, state, "default")
        for layer in layers:
            theirs = net.get_submodule(layer.removeprefix("unet.")).get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(delta(new, layer), theirs, rtol=1e-6)
            if layer != "unet.a.v":
                np.testing.assert_array_equal(delta(new, layer), delta(formats.open_model(own), layer))


def test_readers_claim_no_path():
    assert not diffusers.claims("x.safetensors")
