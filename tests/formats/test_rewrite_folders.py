"""Hugging Face folders written again: the layers that are given arrive, all else stays to the bit; peers load it."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import safetensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def tensors():
    rng = np.random.default_rng(5)
    return {
        FIRST: {
            "h.0.w": rng.standard_normal((4, 6)).astype(np.float32),
            "h.0.rotary.inv_freq": np.array([np.nan, 1.0], np.float32),  # a buffer: not read as a weight
            "h.0.ids": np.arange(5),
        },
        SECOND: {
            "h.1.w": rng.standard_normal((4, 6)).astype(ml_dtypes.bfloat16),
            "bias": np.array([np.nan, -0.0, 3.0], np.float16),
            "eight": rng.standard_normal((3,)).astype(ml_dtypes.float8_e4m3fn),
            "flags": np.array([True, False]),
        },
    }


def sharded(folder, metadata=None):
    os.makedirs(folder)
    stored = tensors()
    for name, content in stored.items():
        safetensors.write(folder / name, content, {"format": "pt"} if metadata is None else metadata)
    index = {"metadata": {"total_parameters": 66, "total_size": 1}}
    index["weight_map"] = {key: name for name, content in stored.items() for key in content}
    (folder / INDEX).write_text(json.dumps(index))
    for name, text in {"config.json": '{"a": 1}', "tokenizer.json": "{}", "tokenizer.model": "x"}.items():
        (folder / name).write_text(text)
    for name in ("modeling_x.py", "training_args.bin", "state.pkl", "tf_model.h5", "flax_model.msgpack.index.json"):
        (folder / name).write_text("raise SystemExit")
    return folder


def bits(array):
    return array.dtype.name, array.shape, array.tobytes()


def test_identity_keeps_every_byte_of_the_weights(tmp_path):
    old, new = sharded(tmp_path / "old"), tmp_path / "new"
    formats.rewrite(formats.open_model(old), new, {})
    for name in (FIRST, SECOND, "config.json", "tokenizer.json", "tokenizer.model"):
        assert (new / name).read_bytes() == (old / name).read_bytes()
    assert {*os.listdir(new)} == {FIRST, SECOND, INDEX, "config.json", "tokenizer.json", "tokenizer.model"}
    index = json.loads((new / INDEX).read_text())
    assert index["weight_map"] == json.loads((old / INDEX).read_text())["weight_map"]
    total = sum(a.nbytes for content in tensors().values() for a in content.values())
    assert index["metadata"] == {"total_parameters": 66, "total_size": total}
    assert formats.open_model(new).warnings == ()


def test_layers_arrive_in_their_dtype_and_the_rest_stays(tmp_path):
    old, new = sharded(tmp_path / "old"), tmp_path / "new"
    layers = {"h.0.w": np.full((4, 6), 2.5), "h.1.w": np.arange(24.0).reshape(6, 4).T + 0.001}
    formats.rewrite(formats.open_model(old), new, layers)
    for name, content in tensors().items():
        found = safetensors.read(new / name)
        for key, array in content.items():
            assert bits(found[key]) == bits(layers[key].astype(array.dtype) if key in layers else array), key


def test_values_that_overflow_leave_no_model(tmp_path):
    model = formats.open_model(sharded(tmp_path / "old"))
    with pytest.raises(errors.InputError, match="bias: .*more than float16 holds"):
        formats.rewrite(model, tmp_path / "new", {"bias": np.full(3, 1e6)})
    assert os.listdir(tmp_path) == ["old"]  # the first shard alone would pass for a model


def test_header_without_a_format_gets_one_and_keeps_the_rest(tmp_path):
    folder = sharded(tmp_path / "old", {"note": "n"})
    (folder / INDEX).unlink()
    (folder / SECOND).unlink()
    os.rename(folder / FIRST, folder / "model.safetensors")
    formats.rewrite(formats.open_model(folder), tmp_path / "new", {"h.0.w": np.ones((4, 6))})
    file = tmp_path / "new" / "model.safetensors"
    assert safetensors.open_metadata(file) == {"format": "pt", "note": "n"}
    found, stored = safetensors.read(file), tensors()[FIRST]
    assert bits(found["h.0.ids"]) == bits(stored["h.0.ids"])
    assert bits(found["h.0.rotary.inv_freq"]) == bits(stored["h.0.rotary.inv_freq"])
    assert (found["h.0.w"] == 1).all()


def test_packed_entries_and_diffusers_names_are_carried_over(tmp_path):
    header = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header["p"] = {"dtype": "F4", "shape": [4], "data_offsets": [4, 6]}
    text = json.dumps(header).encode()
    name = "diffusion_pytorch_model.safetensors"
    os.makedirs(tmp_path / "unet")
    (tmp_path / "unet" / name).write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0ab")
    (tmp_path / "unet" / "config.json").write_text("{}")
    formats.rewrite(formats.open_model(tmp_path / "unet"), tmp_path / "new" / "unet", {"w": np.array([1.0])})
    assert (tmp_path / "new" / "unet" / name).read_bytes().endswith(np.float32(1).tobytes() + b"ab")
    assert sorted(os.listdir(tmp_path / "new" / "unet")) == ["config.json", name]


def test_a_file_that_changed_since_it_was_opened_is_refused(tmp_path):
    folder = sharded(tmp_path / "old")
    model = formats.open_model(folder)
    safetensors.write(folder / SECOND, {k: v[::-1] for k, v in tensors()[SECOND].items()}, {"format": "pt"})
    with pytest.raises(errors.InputChangedError, match=SECOND):
        formats.rewrite(model, tmp_path / "new", {})


def test_index_that_changed_to_a_shard_outside_is_refused(tmp_path):
    folder = sharded(tmp_path / "old")
    model = formats.open_model(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["bias"] = "../x.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(errors.InputError, match="nothing outside the folder") as caught:
        formats.rewrite(model, tmp_path / "new", {})
    assert caught.value.rule == "H10" and not (tmp_path / "new").exists()


def test_links_allowed_on_opening_are_followed_on_writing(tmp_path):
    folder = sharded(tmp_path / "zoo" / "old")
    os.makedirs(tmp_path / "zoo" / "store")
    os.rename(folder / SECOND, tmp_path / "zoo" / "store" / "s")
    os.symlink("../store/s", folder / SECOND)
    formats.rewrite(formats.open_model(folder, root=tmp_path / "zoo"), tmp_path / "new", {})
    assert not os.path.islink(tmp_path / "new" / SECOND)
    assert (tmp_path / "new" / SECOND).read_bytes() == (folder / SECOND).read_bytes()


def test_memory_is_a_layer_and_not_a_shard(tmp_path):
    os.makedirs(tmp_path / "old")
    content = {f"w{i}": np.full((1 << 20,), i, np.float32) for i in range(16)}  # 4 MiB each
    safetensors.write(tmp_path / "old" / "model.safetensors", content, {"format": "pt"})
    del content
    model = formats.open_model(tmp_path / "old")
    layers = {"w3": np.zeros(1, np.float32)[[0] * (1 << 20)]}
    tracemalloc.start()
    formats.rewrite(model, tmp_path / "new", layers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20, f"{peak / 2**20:.0f} MiB for a file of 64"


def torch_folder(folder, torch):
    shared = torch.arange(12.0).reshape(3, 4)
    parts = {
        "pytorch_model-00001-of-00002.bin": {"wte": shared, "lm_head": shared, "t": torch.arange(6.0).reshape(2, 3).T},
        "pytorch_model-00002-of-00002.bin": {"b": torch.ones(5, dtype=torch.bfloat16), "position_ids": torch.arange(3)},
    }
    os.makedirs(folder)
    for name, content in parts.items():
        torch.save(content, folder / name)
    where = {key: name for name, content in parts.items() for key in content}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {key: t.to(torch.float32).numpy() for content in parts.values() for key, t in content.items()}


def test_torch_files_become_safetensors_with_the_same_names(tmp_path):
    torch = pytest.importorskip("torch")
    old = torch_folder(tmp_path / "old", torch)
    model = formats.open_model(tmp_path / "old")
    new = np.arange(12.0).reshape(3, 4) * -1
    formats.rewrite(model, tmp_path / "new", {"wte": new})
    assert sorted(os.listdir(tmp_path / "new")) == [FIRST, SECOND, INDEX]
    found = safetensors.read(tmp_path / "new" / FIRST) | safetensors.read(tmp_path / "new" / SECOND)
    assert found.keys() == old.keys()
    np.testing.assert_array_equal(found["wte"], new)
    np.testing.assert_array_equal(found["lm_head"], new)  # one storage: both names follow
    np.testing.assert_array_equal(found["t"], old["t"])
    assert found["b"].dtype == ml_dtypes.bfloat16 and found["position_ids"].dtype == np.int64
    assert formats.open_model(tmp_path / "new").warnings == ()
    assert safetensors.open_metadata(tmp_path / "new" / FIRST) == {"format": "pt"}


def test_torch_names_of_diffusers_stay(tmp_path):
    torch = pytest.importorskip("torch")
    os.makedirs(tmp_path / "vae")
    torch.save({"w": torch.ones(2)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    formats.rewrite(formats.open_model(tmp_path / "vae"), tmp_path / "new", {})
    assert os.listdir(tmp_path / "new") == ["diffusion_pytorch_model.safetensors"]


def test_torch_types_without_a_place_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    os.makedirs(tmp_path / "old")
    torch.save({"w": torch.ones(2), "z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(errors.InputError, match="z: complex128"):
        formats.rewrite(formats.open_model(tmp_path / "old"), tmp_path / "new", {})


def tiny(transformers, kind):
    shape = {"vocab_size": 50, "max_position_embeddings": 16}
    if kind == "gpt2":
        config = transformers.GPT2Config(**shape, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, **sizes, num_key_value_heads=1, tie_word_embeddings=kind == "tied")
    return transformers.LlamaForCausalLM(config)


def logits(transformers, torch, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "tied"])
def test_transformers_loads_what_was_written(tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    tiny(transformers, kind).save_pretrained(tmp_path / "old", max_shard_size="8KB")
    model = formats.open_model(tmp_path / "old")
    assert (tmp_path / "old" / INDEX).exists() and ("lm_head.weight" in model.tensors) == (kind == "llama")
    formats.rewrite(model, tmp_path / "same", {})
    before = logits(transformers, torch, tmp_path / "old")
    np.testing.assert_array_equal(logits(transformers, torch, tmp_path / "same"), before)
    assert formats.open_model(tmp_path / "same").tensors.keys() == model.tensors.keys()
    name = next(n for n in model.tensors if "wte" in n or "embed_tokens" in n)
    formats.rewrite(model, tmp_path / "half", {name: formats.read(model, model.tensors[name]) * 0.5})
    assert np.abs(logits(transformers, torch, tmp_path / "half") - before).max() > 1e-3


@pytest.mark.slow
def test_transformers_loads_what_was_a_torch_file(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = tiny(transformers, "gpt2")
    os.makedirs(tmp_path / "old")
    network.config.save_pretrained(tmp_path / "old")
    torch.save(network.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    formats.rewrite(formats.open_model(tmp_path / "old"), tmp_path / "new", {})
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "new", local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
