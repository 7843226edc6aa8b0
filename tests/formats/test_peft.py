"""Scales, orientations and refusals of PEFT folders; exact expected deltas, and PEFT itself where it is installed."""

import json
import math

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import peft, safetensors

RNG = np.random.default_rng(0)
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "v"]}


def factor(*shape):
    """Small integers: products are exact in float32."""
    return RNG.integers(-3, 4, shape).astype(np.float32)


def tensors(layers=("l.0.q", "l.0.v"), r=2, i=5, o=3):
    found = {}
    for layer in layers:
        found[f"{PREFIX}{layer}.lora_A.weight"] = factor(r, i)
        found[f"{PREFIX}{layer}.lora_B.weight"] = factor(o, r)
    return found


def save(folder, arrays=None, **fields):
    """An adapter folder; fields set to `...` are left out of the configuration."""
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not ...}
    folder.mkdir(exist_ok=True)
    safetensors.write(folder / "adapter_model.safetensors", tensors() if arrays is None else arrays)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def delta(model, layer):
    """Delta-W in the stored orientation, float64."""
    pair = model.adapters[layer]
    a, b = (formats.read(model, t).astype(np.float64) for t in (pair.a, pair.b))
    product = pair.scale * (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1))
    product = product.T if pair.transposed else product.reshape(pair.shape)
    assert product.shape == pair.shape
    return product


def refused(folder, words, key=None):
    with pytest.raises(errors.InputError, match=words) as caught:
        formats.open_model(folder)
    assert caught.value.rule in ("H13", "H6")
    assert key is None or caught.value.key == key
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "scale"), [({}, 3), ({"use_rslora": True}, 6 / math.sqrt(2)), ({"lora_alpha": 1.5}, 0.75)]
)
def test_scale(tmp_path, fields, scale):
    arrays = tensors()
    model = formats.open_model(save(tmp_path, arrays, **fields))
    assert set(model.adapters) == {"l.0.q", "l.0.v"} and not model.tensors
    a, b = (arrays[f"{PREFIX}l.0.q.lora_{s}.weight"] for s in "AB")
    np.testing.assert_allclose(delta(model, "l.0.q"), scale * (b.astype(np.float64) @ a), rtol=1e-15)
    assert model.adapters["l.0.q"].rank == 2
    assert model.metadata["r"] == "2"


@pytest.mark.parametrize(
    ("ranks", "alphas", "scale"),
    [
        ({"v": 4}, {}, 6 / 4),
        ({"v": 4}, {"v": 2}, 2 / 4),
        ({"l.0.v": 4}, {"q": 9}, 6 / 4),
        ({r"l\.\d+\.v": 4}, {r"^l\.0\.v": 1}, 1 / 4),
        ({"v": 4, "l.0.v": 9}, {}, 6 / 4),  # the first match wins
        ({"0.v": 4}, {".v": 100}, 6 / 4),  # a key starts at a dot or at the beginning: ".v" matches nothing
        ({"^v": 9, "v": 4}, {}, 6 / 4),
    ],
)
def test_rank_and_alpha_patterns(tmp_path, ranks, alphas, scale):
    arrays = tensors(["l.0.q"]) | tensors(["l.0.v"], r=4)
    model = formats.open_model(save(tmp_path, arrays, rank_pattern=ranks, alpha_pattern=alphas))
    assert model.adapters["l.0.v"].scale == scale
    assert model.adapters["l.0.q"].scale == (9 if "q" in alphas else 6) / 2


def test_pattern_key_is_no_suffix_of_a_longer_word(tmp_path):
    arrays = tensors(["l.q", "l.xq"])
    model = formats.open_model(save(tmp_path, arrays, target_modules=None, alpha_pattern={"q": 20}))
    assert [model.adapters[n].scale for n in ("l.q", "l.xq")] == [10, 3]


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a|a)*b", "a?" * 30 + "a" * 30, "(", "(?=q)", r"(q)\1", "x" * 600, ".*.*.*.*.*", "(a|a)" * 40]
)
def test_hostile_patterns_are_refused_in_no_time(tmp_path, pattern):
    arrays = tensors(["a" * 60 + ".q", "l.v"])
    refused(save(tmp_path, arrays, rank_pattern={pattern: 3}), "adapter_config.json.*rank_pattern")


def test_fan_in_fan_out_embedding_and_convolution(tmp_path):
    arrays = tensors(["q"]) | {
        f"{PREFIX}e.lora_embedding_A": factor(2, 7),
        f"{PREFIX}e.lora_embedding_B": factor(4, 2),
        f"{PREFIX}c.lora_A.weight": factor(2, 3, 3, 3),
        f"{PREFIX}c.lora_B.weight": factor(5, 2, 1, 1),
    }
    for fan in (False, True):
        model = formats.open_model(save(tmp_path, arrays, target_modules=["q", "e", "c"], fan_in_fan_out=fan))
        a, b = (arrays[f"{PREFIX}q.lora_{s}.weight"] for s in "AB")
        np.testing.assert_array_equal(delta(model, "q"), 3 * (b @ a).T if fan else 3 * b @ a)
        assert model.adapters["q"].shape == ((5, 3) if fan else (3, 5))
        a, b = (arrays[f"{PREFIX}e.lora_embedding_{s}"] for s in "AB")
        np.testing.assert_array_equal(delta(model, "e"), 3 * (b @ a).T)
        a, b = (arrays[f"{PREFIX}c.lora_{s}.weight"] for s in "AB")
        np.testing.assert_array_equal(delta(model, "c"), 3 * np.einsum("orxy,rcij->ocij", b, a))
        assert model.adapters["c"].shape == (5, 3, 3, 3)


def test_adapter_name_left_in_the_key_and_saved_modules(tmp_path):
    arrays = {
        f"{PREFIX}q.lora_A.default.weight": factor(2, 5),
        f"{PREFIX}q.lora_B.default.weight": factor(3, 2),
        f"{PREFIX}classifier.weight": factor(2, 2),
        f"{PREFIX}bn.running_mean": factor(2),
    }
    model = formats.open_model(save(tmp_path, arrays, target_modules=["q"], modules_to_save=["classifier"]))
    assert list(model.adapters) == ["q"]
    assert list(model.tensors) == ["classifier.weight"]
    assert list(model.skipped) == ["bn.running_mean"]
    np.testing.assert_array_equal(
        formats.read(model, model.tensors["classifier.weight"]), arrays[f"{PREFIX}classifier.weight"]
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 3), ("r", "2"), ("r", True), ("r", 2.0), ("r", 0), ("r", ...), ("r", 10**9),
        ("lora_alpha", ...), ("lora_alpha", "6"), ("lora_alpha", None), ("lora_alpha", False),
        ("use_rslora", "yes"), ("fan_in_fan_out", 1), ("rank_pattern", [1]), ("alpha_pattern", "q"),
        ("target_modules", {"q": 1}), ("target_modules", ["x", "y"]), ("target_modules", [1]),
        ("peft_type", "LOHA"), ("peft_type", "ADALORA"), ("peft_type", "VERA"), ("peft_type", ...), ("peft_type", 1),
        ("use_dora", True), ("lora_bias", True), ("use_qalora", True), ("use_bdlora", {"a": 1}),
        ("alora_invocation_tokens", [1]), ("kasa_config", {"a": 1}), ("arrow_config", {"a": 1}),
        ("velora_config", {"a": 1}), ("monteclora_config", {"a": 1}), ("target_parameters", ["x"]),
        ("layer_replication", [[0, 1]]), ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
        ("base_model_name_or_path", 3), ("task_type", ["x"]),
    ],
)  # fmt: skip
def test_configuration_faults_name_the_field(tmp_path, field, value):
    message = refused(save(tmp_path, **{field: value}), "adapter_config.json", field)
    assert message.count(";") >= 1  # what to do about it


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_alpha_must_be_finite(tmp_path, text):
    folder = save(tmp_path)
    config = (folder / "adapter_config.json").read_text().replace('"lora_alpha": 6', f'"lora_alpha": {text}')
    (folder / "adapter_config.json").write_text(config)
    refused(folder, "adapter_config.json")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_accepted(tmp_path, init):
    assert formats.open_model(save(tmp_path, init_lora_weights=init)).warnings == ()


def test_tensor_faults_name_the_module(tmp_path):
    good, a, b = tensors(), f"{PREFIX}l.0.q.lora_A.weight", f"{PREFIX}l.0.q.lora_B.weight"
    cases = {
        "no lora_A": {k: v for k, v in good.items() if k != a},
        "no lora_B": {k: v for k, v in good.items() if k != b},
        "inner sizes": {**good, b: factor(3, 4)},
        "make no matrix": {**good, a: factor(2)},
        "wider than one": {**good, a: factor(2, 3, 3, 3), b: factor(5, 2, 3, 3)},
        "floats expected": {**good, a: factor(2, 5).astype(np.int32)},
        "twice": {**good, f"{PREFIX}l.0.q.lora_A.other.weight": factor(2, 5)},
    }
    for words, arrays in cases.items():
        assert "l.0.q" in refused(save(tmp_path, arrays), words)


@pytest.mark.parametrize(
    "key", ["q.lora_magnitude_vector", "q.lora_B.bias", "q.hada_w1_a", "q.lokr_w1", "q.token_adapter.x", "q.lora_E"]
)
def test_tensors_of_other_adapters_are_refused_by_name(tmp_path, key):
    refused(save(tmp_path, {**tensors(), PREFIX + key: factor(3)}), "another kind of adapter", PREFIX + key)


def test_keys_without_the_prefix_are_refused(tmp_path):
    refused(save(tmp_path, {"q.lora_A.weight": factor(2, 5), "q.lora_B.weight": factor(3, 2)}), "does not start with")


def test_missing_files(tmp_path):
    (save(tmp_path / "a") / "adapter_config.json").unlink()
    refused(tmp_path / "a", "adapter_config.json: is not there")
    (save(tmp_path / "b") / "adapter_model.safetensors").unlink()
    refused(tmp_path / "b", "adapter_model.safetensors: is not there")


def test_warnings(tmp_path):
    zero = {k: v * 0 if "lora_B" in k else v for k, v in tensors().items()}
    assert any("no effect" in w for w in formats.open_model(save(tmp_path / "a", zero)).warnings)
    zero[f"{PREFIX}l.0.v.lora_B.weight"][-1, -1] = 1
    assert formats.open_model(save(tmp_path / "b", zero)).warnings == ()
    (warning,) = formats.open_model(save(tmp_path / "c", use_new_thing=True)).warnings
    assert "use_new_thing" in warning
    (warning,) = formats.open_model(save(tmp_path / "d", tensors(["q", "v", "k"]))).warnings
    assert "target_modules" in warning and "k" in warning
    several = save(tmp_path / "e", target_modules=["q", "v", "qkv_proj"])  # one list for several architectures
    (warning,) = formats.open_model(several).warnings
    assert "target_modules lists qkv_proj" in warning


def test_zero_is_looked_for_in_all_of_a_large_factor(tmp_path):
    b = np.zeros((600_000, 2), np.float32)
    arrays = {f"{PREFIX}q.lora_A.weight": factor(2, 2), f"{PREFIX}q.lora_B.weight": b}
    assert formats.open_model(save(tmp_path / "a", arrays, target_modules=["q"])).warnings
    b[-1, -1] = 1
    assert not formats.open_model(save(tmp_path / "b", arrays, target_modules=["q"])).warnings


def test_configurations_do_not_leak_between_files_of_one_header(tmp_path):
    arrays = tensors()
    first = formats.open_model(save(tmp_path / "a", arrays, lora_alpha=2))
    second = formats.open_model(save(tmp_path / "b", arrays, lora_alpha=4))
    assert (first.adapters["l.0.q"].scale, second.adapters["l.0.q"].scale) == (1, 2)
    refused(save(tmp_path / "c", arrays, r=4), "says rank 4")
    assert second.adapters["l.0.q"].a.extent.file.path.startswith(str(tmp_path / "b"))


def test_torch_adapter_file(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = tensors()
    (save(tmp_path, arrays) / "adapter_model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, tmp_path / "adapter_model.bin")
    a, b = (arrays[f"{PREFIX}l.0.q.lora_{s}.weight"] for s in "AB")
    np.testing.assert_array_equal(delta(formats.open_model(tmp_path), "l.0.q"), 3 * b @ a)


ADAPTERS = {
    "blocks.0.q": (factor(2, 6), factor(4, 2), 4, 2),
    "blocks.1.q": (factor(3, 6), factor(4, 3), 5, 3),
    "blocks.10.q": (factor(2, 6), factor(4, 2), 1.5, 2),
}


def test_write_then_read(tmp_path):
    peft.write(tmp_path / "x", ADAPTERS, base_model="org/base", labels={"task": "7"})
    model = formats.open_model(tmp_path / "x")
    assert (model.metadata["base_model_name_or_path"], model.metadata["task"], model.warnings) == ("org/base", "7", ())
    for layer, (a, b, alpha, r) in ADAPTERS.items():
        np.testing.assert_array_equal(delta(model, layer), alpha / r * (b.astype(np.float64) @ a))
    with pytest.raises(ValueError, match="rank 3"):
        peft.write(tmp_path / "y", {"q": (factor(2, 6), factor(4, 2), 4, 3)})


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_is_written_and_agrees_on_every_delta(tmp_path, rslora):
    library, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    def base():
        layer = lambda: torch.nn.ModuleDict({"q": torch.nn.Linear(6, 4, bias=False)})  # noqa: E731
        return torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({n: layer() for n in ("0", "1", "10")})})

    def check(folder, model):
        ours = formats.open_model(folder)
        assert set(ours.adapters) == set(ADAPTERS)
        for layer in ADAPTERS:
            theirs = model.base_model.model.get_submodule(layer).get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(delta(ours, layer), theirs, rtol=1e-5, atol=1e-5)

    peft.write(tmp_path / "ours", ADAPTERS)
    if not rslora:
        check(tmp_path / "ours", library.PeftModel.from_pretrained(base(), tmp_path / "ours"))
    patterns = {"rank_pattern": {"1.q": 3}, "alpha_pattern": {r"^blocks\.\d0\.q": 7}}
    config = library.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q"], use_rslora=rslora, init_lora_weights=False, **patterns
    )
    model = library.get_peft_model(base(), config)
    model.save_pretrained(tmp_path / "theirs")
    check(tmp_path / "theirs", model)
