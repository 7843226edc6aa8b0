"""Round trips of the safetensors reader and writer, against the reference library where it reads the dtype."""

import json
import os
import stat
import struct

import ml_dtypes
import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import _header, safetensors

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
ARRAYS = {
    "plain": BASE,
    "transposed": BASE.T,
    "fortran": np.asfortranarray(BASE),
    "strided": BASE[::2, ::-1],
    "big_endian": BASE.astype(">f4"),
    "double": BASE.astype(np.float64) / 3,
    "half": BASE.astype(np.float16),
    "bfloat16": BASE.astype(ml_dtypes.bfloat16).T,
    "float8": BASE.astype(ml_dtypes.float8_e4m3fn),
    "float8_wide": BASE.astype(ml_dtypes.float8_e5m2),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "integers": np.arange(-3, 3),
    "flags": np.array([True, False]),
}


def build(header, data=b""):
    """The bytes of a file with this header (bytes, or an object for JSON)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("name", ARRAYS)
def test_round_trip_keeps_every_bit(tmp_path, name):
    array = ARRAYS[name]
    safetensors.write(tmp_path / "m.safetensors", {"w": array})
    model = formats.open_model(tmp_path / "m.safetensors")
    found = formats.read(model, model.tensors["w"])
    expected = array.astype(array.dtype.newbyteorder("="))
    assert found.dtype == expected.dtype
    assert found.shape == array.shape
    assert found.tobytes() == expected.tobytes(order="C")


def test_reference_library_reads_the_same_values(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    arrays = {n: a for n, a in ARRAYS.items() if a.dtype.kind in "fiub" and "8" not in n and n != "bfloat16"}
    safetensors.write(tmp_path / "m.safetensors", arrays, {"format": "pt", "note": "é"})
    found = reference.load_file(tmp_path / "m.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_reads_what_the_reference_library_writes(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    reference.save_file({"b": BASE, "a": BASE[0].copy()}, tmp_path / "m.safetensors", metadata={"k": "v"})
    model = formats.open_model(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(formats.read(model, model.tensors["b"]), BASE)
    assert dict(model.metadata) == {"k": "v"}


def test_writing_is_deterministic_aligned_and_honours_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        safetensors.write(tmp_path / "a.safetensors", ARRAYS, {"b": "1", "a": "2"})
        safetensors.write(tmp_path / "b.safetensors", dict(reversed(ARRAYS.items())), {"a": "2", "b": "1"})
    finally:
        os.umask(old)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data == (tmp_path / "b.safetensors").read_bytes()
    assert (8 + struct.unpack("<Q", data[:8])[0]) % safetensors.ALIGNMENT == 0
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    model = formats.open_model(tmp_path / "a.safetensors")
    for tensor in model.tensors.values():
        assert tensor.extent.offset % max(1, formats.read(model, tensor).dtype.itemsize) == 0


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.write(path, {"w": BASE})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="object"):
        safetensors.write(path, {"w": np.array([None])})
    with pytest.raises(TypeError, match="metadata"):
        safetensors.write(path, {"w": BASE}, {"k": 3})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_every_cut_and_every_extension_is_refused(tmp_path):
    golden = build({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
    path = tmp_path / "m.safetensors"
    for data in [golden[:n] for n in range(len(golden))] + [golden + b"\0" * n for n in (1, 8, 64)]:
        path.write_bytes(data)
        with pytest.raises(errors.InputError, match=r"m\.safetensors"):
            formats.open_model(path)
    path.write_bytes(golden)
    assert formats.open_model(path).tensors["w"].shape == (2,)


@pytest.mark.parametrize("key", ["", "a\x00b", "a\x1b[2J", "a\nb", "a\x9bb", "a\u202eb", "a\u2066b", "x" * 513])
def test_hostile_keys_refuse_the_model_without_reaching_the_terminal(tmp_path, key):
    path = tmp_path / "m.safetensors"
    path.write_bytes(build({key: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)))
    with pytest.raises(errors.InputError) as caught:
        formats.open_model(path)
    assert str(caught.value).isascii() and str(caught.value).isprintable()
    assert caught.value.rule == "H16"


@pytest.mark.parametrize("key", ["../../x", "a/b", "<script>", "C:\\x", "é", "x" * 512])
def test_odd_but_harmless_keys_are_data(tmp_path, key):
    path = tmp_path / "m.safetensors"
    path.write_bytes(build({key: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)))
    assert list(formats.open_model(path).tensors) == [key]


@pytest.mark.parametrize("key", ["layer.qweight", "a.absmax", "q_proj.weight_scale_inv"])
def test_quantised_companions_are_refused_by_name(tmp_path, key):
    safetensors.write(tmp_path / "m.safetensors", {"w": BASE, key: np.zeros(3, np.int32)})
    with pytest.raises(errors.InputError, match="quantised") as caught:
        formats.open_model(tmp_path / "m.safetensors")
    assert caught.value.key == key


def test_buffers_are_set_apart_with_a_reason_and_integers_stay(tmp_path):
    names = ["bn.running_mean", "bn.num_batches_tracked", "attn.rotary.inv_freq", "embed.position_ids"]
    safetensors.write(tmp_path / "m.safetensors", {"w": BASE, "ids": np.arange(3), **dict.fromkeys(names, BASE)})
    model = formats.open_model(tmp_path / "m.safetensors")
    assert set(model.tensors) == {"w", "ids"}
    assert set(model.skipped) == set(names)
    assert not model.tensors["ids"].is_float
    assert all("not a weight" in reason for reason in model.skipped.values())


def test_lora_factors_without_their_configuration_are_refused(tmp_path):
    for key in ("m.lora_A.weight", "base_model.model.unet.x.lora_A.weight", "x.lora_B", "x.lora_embedding_A"):
        safetensors.write(tmp_path / "m.safetensors", {key: BASE})
        with pytest.raises(errors.InputError, match="factor of an adapter"):
            formats.open_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [4], 2), ("F6_E2M3", [4], 3)])
def test_packed_floats_are_listed_and_refused_when_read(tmp_path, dtype, shape, size):
    path = tmp_path / "m.safetensors"
    path.write_bytes(build({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(size)))
    model = formats.open_model(path)
    assert not model.tensors["w"].is_float
    with pytest.raises(errors.InputError, match="under 8 bits"):
        formats.read(model, model.tensors["w"])


def test_same_header_is_parsed_once(tmp_path, monkeypatch):
    for name in "ab":
        safetensors.write(tmp_path / f"{name}.safetensors", {"only_in_this_test": BASE + ord(name)})
    calls = []
    parse = _header.parse
    monkeypatch.setattr(_header, "parse", lambda *args: calls.append(args) or parse(*args))
    models = [formats.open_model(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert len(calls) == 1
    for name, model in zip("ab", models, strict=True):
        np.testing.assert_array_equal(formats.read(model, model.tensors["only_in_this_test"]), BASE + ord(name))


def test_wrong_size_is_refused_also_when_the_header_is_known(tmp_path):
    safetensors.write(tmp_path / "a.safetensors", {"known_header": BASE})
    formats.open_model(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(errors.InputError, match=r"b\.safetensors"):
        formats.open_model(tmp_path / "b.safetensors")
