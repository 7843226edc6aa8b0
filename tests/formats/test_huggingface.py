"""Folders: one file, shards with an index, torch twins; the index and the shards must agree entry by entry."""

import json
import os

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import safetensors

A, B = np.ones((2, 3), np.float32), np.full((4,), 2.0, np.float32)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD = {"a": FIRST, "b": SECOND}


def shards(folder, weight_map=GOOD, metadata=None):
    safetensors.write(folder / FIRST, {"a": A})
    safetensors.write(folder / SECOND, {"b": B})
    index = {"weight_map": weight_map} | ({"metadata": metadata} if metadata is not None else {})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 40}, {"total_size": 40, "total_parameters": 10}])
def test_shards_are_one_model(tmp_path, metadata):
    model = formats.open_model(shards(tmp_path, metadata=metadata))
    assert (model.format, list(model.tensors), model.warnings) == ("huggingface", ["a", "b"], ())
    np.testing.assert_array_equal(formats.read(model, model.tensors["b"]), B)


def test_wrong_total_size_is_a_warning_with_both_numbers(tmp_path):
    (warning,) = formats.open_model(shards(tmp_path, metadata={"total_size": 41})).warnings
    assert "41" in warning and "40" in warning


BAD_NAMES = [
    "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:\\x.safetensors",
    "C:x.safetensors", "\\\\host\\x.safetensors", "http://h/x.safetensors", "x.bin", "x.safetensors.py", "",
    "model.safetensors.index.json", ".safetensors", "con.safetensors",
    "x\0.safetensors", "x.safetensors ", 3, None, ["x"],
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_shard_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(errors.InputError, match=r"model\.safetensors\.index\.json, a: ") as caught:
        formats.open_model(shards(tmp_path, {"a": name, "b": SECOND}))
    assert caught.value.rule == "H10"


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": FIRST}, "b: is in .* and not listed"),
        ({"a": SECOND, "b": FIRST}, "the index lists it in"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, "c: is listed in .*, and not there"),
        ({"a": FIRST, "b": "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors: is listed, and not"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_index_and_shards_must_be_a_bijection(tmp_path, weight_map, words):
    shards(tmp_path, weight_map)
    if weight_map == {"a": FIRST}:  # a shard that is not listed at all is not looked at; a tensor in a listed one is
        safetensors.write(tmp_path / FIRST, {"a": A, "b": B})
    with pytest.raises(errors.InputError, match=words):
        formats.open_model(tmp_path)


def test_two_shards_with_the_same_tensor(tmp_path):
    shards(tmp_path)
    safetensors.write(tmp_path / SECOND, {"a": A, "b": B})
    with pytest.raises(errors.InputError, match="a: is in .*00002.*lists it in .*00001"):
        formats.open_model(tmp_path)


def test_index_beside_single_file_is_refused(tmp_path):
    safetensors.write(shards(tmp_path) / "model.safetensors", {"a": A, "b": B})
    with pytest.raises(errors.InputError, match=r"model\.safetensors and an index"):
        formats.open_model(tmp_path)


def test_safetensors_win_over_a_torch_file_that_is_never_opened(tmp_path, monkeypatch):
    safetensors.write(tmp_path / "model.safetensors", {"a": A})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    (tmp_path / "modeling_x.py").write_text("raise SystemExit")
    opened, real = [], os.open
    monkeypatch.setattr("os.open", lambda path, *args: opened.append(path) or real(path, *args))
    assert list(formats.open_model(tmp_path).tensors) == ["a"]
    assert {str(p).rsplit("/", 1)[1] for p in opened} == {"model.safetensors"}


def test_diffusers_names_and_a_lone_file_of_any_name(tmp_path):
    for name in ("diffusion_pytorch_model.safetensors", "anything.safetensors"):
        (tmp_path / name[:4]).mkdir()
        safetensors.write(tmp_path / name[:4] / name, {"a": A})
        (tmp_path / name[:4] / "training_args.bin").write_bytes(b"not a model")
        assert list(formats.open_model(tmp_path / name[:4]).tensors) == ["a"]


def test_several_candidates_are_refused(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        safetensors.write(tmp_path / name, {"a": A})
    with pytest.raises(errors.InputError, match="2 weight files and no index"):
        formats.open_model(tmp_path)
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        safetensors.write(tmp_path / name, {"a": A})
    with pytest.raises(errors.InputError, match="several models"):
        formats.open_model(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(errors.InputError, match="holds no weights"):
        formats.open_model(tmp_path)


def test_torch_shards(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2, 3), "t": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(4)}, tmp_path / "pytorch_model-2.bin")
    where = {"a": "pytorch_model-1.bin", "t": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    model = formats.open_model(tmp_path)
    assert list(model.tensors) == ["a", "b", "t"]
    np.testing.assert_array_equal(formats.read(model, model.tensors["t"]), np.arange(6.0).reshape(2, 3).T)
    where["a"] = "model-1.safetensors"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(errors.InputError, match=r"no \.bin file"):
        formats.open_model(tmp_path)
