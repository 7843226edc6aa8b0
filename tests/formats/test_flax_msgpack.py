"""Flax files against flax; the walk finds the arrays without it, and refuses every cut and most damage."""

import ml_dtypes
import numpy as np
import pytest

from jaxsub import errors, formats

BASE = np.arange(6, dtype=np.float32).reshape(2, 3)
# {"w": extension 1 of 24 bytes: [[2, 1], "float32", 8 bytes]}, by the msgpack specification
HAND_MADE = b"\x81\xa1w\xc7\x16\x01\x93\x92\x02\x01\xa7float32\xc4\x08" + np.array([1.5, -2], "<f4").tobytes()


def open_bytes(tmp_path, data):
    (tmp_path / "m.msgpack").write_bytes(data)
    return formats.open_model(tmp_path / "m.msgpack")


def test_hand_made_file_needs_no_flax(tmp_path):
    model = open_bytes(tmp_path, HAND_MADE)
    np.testing.assert_array_equal(formats.read(model, model.tensors["w"]), [[1.5], [-2]])
    assert model.tensors["w"].extent is not None


def test_every_cut_and_extension_is_refused(tmp_path):
    for data in [HAND_MADE[:end] for end in range(len(HAND_MADE))] + [HAND_MADE + b"\x80"]:
        with pytest.raises(errors.InputError, match="m.msgpack"):
            open_bytes(tmp_path, data)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\x92\x02\x01", b"\x92\x03\x01", "array of 12 bytes"),
        (b"float32", b"float99", "type 'float99'"),
        (b"float32", b"object_", "type 'object_'"),
        (b"\x92\x02\x01", b"\x92\xff\xfe", "impossible shape"),
        (b"\xc7\x16\x01", b"\xc7\x17\x01", "cut short"),
        (b"\xc7\x16\x01", b"\xc7\x15\x01", "array of 8 bytes"),
        (b"\x81\xa1w", b"\x82\xa1w", "cut short"),
        (b"\xa1w", b"\xa1\xff", "UTF-8"),
        (b"\xa1w", b"\xa1\x1b", "control character"),
        (b"\x81\xa1w", b"\xc1\xa1w", "unknown type"),
        (b"\x93\x92", b"\x92\x92", "no triple"),
    ],
)
def test_damage_is_named(tmp_path, old, new, words):
    assert HAND_MADE.count(old) == 1
    with pytest.raises(errors.InputError, match=words):
        open_bytes(tmp_path, HAND_MADE.replace(old, new))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x82" + 2 * HAND_MADE[1:], "repeated"),
        (b"\xdf\xff\xff\xff\xff", "announces"),
        (b"\xdd\xff\xff\xff\xff", "announces"),
        (b"\xdb\xff\xff\xff\xff", "announced"),
        (b"\xc9\xff\xff\xff\xff\x01", "announced"),
        (b"\x81\xa1a" * 100 + b"\x01", "nested"),
        (b"\x91" * 100 + b"\x01", "nested"),
        (b"\x93\x01\x02\x03", "no tensors"),
        (b"\x01", "no single msgpack dict"),
        (b"\x81\xa1a\x01", "no tensors"),
    ],
)
def test_structures_that_are_no_weights(tmp_path, data, words):
    with pytest.raises(errors.InputError, match=words):
        open_bytes(tmp_path, data)


@pytest.mark.parametrize("chunk", [None, 16])
def test_agrees_with_flax(tmp_path, monkeypatch, chunk):
    serialization = pytest.importorskip("flax.serialization")
    if chunk:
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    flat = {
        "params/dense/kernel": BASE.T,
        "params/dense/bias": BASE[0].astype(ml_dtypes.bfloat16),
        "params/blocks/0": np.ones((2, 2)),
        "params/blocks/1": np.zeros((0, 2), np.float16),
        "params/scale": np.array(2.0, np.float32),
    }
    params = {"dense": {"kernel": flat["params/dense/kernel"], "bias": flat["params/dense/bias"]}}
    params |= {"blocks": [flat["params/blocks/0"], flat["params/blocks/1"]], "scale": flat["params/scale"]}
    tree = {"params": params, "opt_state": {"mu": BASE}, "step": 3, "rate": np.float32(0.1), "z": 1j, "note": "x"}
    model = open_bytes(tmp_path, serialization.to_bytes(tree))
    assert set(model.tensors) == set(flat)
    assert list(model.skipped) == ["opt_state/mu"]
    for name, array in flat.items():
        found = formats.read(model, model.tensors[name])
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert (model.tensors["params/dense/kernel"].extent is None) == bool(chunk)


def test_random_damage_ends_in_an_input_error_or_a_model(tmp_path):
    rng = np.random.default_rng(2)
    refused = 0
    for _ in range(500):
        mutant = bytearray(HAND_MADE)
        mutant[rng.integers(len(mutant))] = rng.integers(256)
        try:
            model = open_bytes(tmp_path, bytes(mutant))
            for tensor in model.tensors.values():
                assert formats.read(model, tensor).shape == tensor.shape
        except errors.InputError:
            refused += 1
    assert 100 < refused < 500
