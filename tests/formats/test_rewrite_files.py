"""Single files written again, msgpack and npz: the layers that are given arrive, all else stays to the bit."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxsub import errors, formats

BASE = np.arange(6, dtype=np.float32).reshape(2, 3)


def tree():
    dense = {"kernel": BASE.T, "bias": BASE[0].astype(ml_dtypes.bfloat16), "empty": np.zeros((0, 2), np.float16)}
    params = {"dense": dense, "blocks": [np.ones((2, 2)), np.full((2, 2), np.nan)], "scale": np.array(2, np.float32)}
    return {"params": params, "batch_stats": {"mean": BASE}, "step": 3, "rate": np.float32(0.1), "z": 1j, "note": "x"}


def rewritten(tmp_path, ending, data, layers):
    (tmp_path / f"old{ending}").write_bytes(data)
    model = formats.open_model(tmp_path / f"old{ending}")
    assert formats.ending(model) == ending
    formats.rewrite(model, tmp_path / "sub" / f"new{ending}", layers)
    return (tmp_path / "sub" / f"new{ending}").read_bytes()


@pytest.mark.parametrize("chunk", [None, 16])
def test_msgpack_is_the_same_tree_to_flax(tmp_path, monkeypatch, chunk):
    serialization = pytest.importorskip("flax.serialization")
    if chunk:  # flax cuts leaves of over 1 GB
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    data = serialization.to_bytes(tree())
    assert (b"__msgpack_chunked_array__" in data) == bool(chunk)
    assert rewritten(tmp_path, ".msgpack", data, {}) == data
    wanted = tree()
    kernel, block = np.arange(6.0).reshape(3, 2) - 9, np.array([[1.0, -2], [3, 1e300]])
    wanted["params"]["dense"]["kernel"] = kernel.astype(np.float32)
    wanted["params"]["dense"]["bias"] = np.array([7, 8.001, 9]).astype(ml_dtypes.bfloat16)
    wanted["params"]["blocks"][0] = block
    layers = {"params/dense/kernel": kernel.T.copy().T, "params/blocks/0": block}
    layers["params/dense/bias"] = np.array([7, 8.001, 9])
    found = rewritten(tmp_path, ".msgpack", data, layers)
    assert found == serialization.to_bytes(wanted)
    assert serialization.msgpack_restore(found)["params"]["dense"]["bias"].dtype == ml_dtypes.bfloat16


def test_msgpack_that_changed_is_refused(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    path = tmp_path / "m.msgpack"
    path.write_bytes(serialization.to_bytes({"w": BASE}))
    model = formats.open_model(path)
    path.write_bytes(serialization.to_bytes({"w": BASE, "v": BASE}))
    with pytest.raises(errors.InputChangedError, match=r"m\.msgpack"):
        formats.rewrite(model, tmp_path / "new.msgpack", {})
    with pytest.raises(errors.InputError, match="w: .*more than float32 holds"):
        formats.rewrite(formats.open_model(path), tmp_path / "new.msgpack", {"w": np.full((2, 3), 1e300)})
    assert [p.name for p in tmp_path.iterdir()] == ["m.msgpack"]


def archive(save):
    stream = io.BytesIO()
    arrays = {"a/w": BASE, "fortran": np.asfortranarray(BASE), "big": BASE.astype(">f8"), "n": np.arange(3)}
    save(stream, **arrays, num_batches_tracked=np.array(4), half=np.array([np.nan, 1], np.float16))
    with zipfile.ZipFile(stream, "a") as file:
        file.writestr("note.txt", "kept")
    return stream.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_keeps_members_order_types_and_compression(tmp_path, save):
    data = archive(save)
    new = rewritten(tmp_path, ".npz", data, {"a/w": -BASE.astype(float), "big": BASE + 0.5})
    assert new == rewritten(tmp_path, ".npz", data, {"a/w": -BASE.astype(float), "big": BASE + 0.5})
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(io.BytesIO(new)) as file:
        assert file.testzip() is None
        assert [(i.filename, i.compress_type) for i in file.infolist()] == [
            (i.filename, i.compress_type) for i in old.infolist()
        ]
        for name in {*file.namelist()} - {"a/w.npy", "big.npy"}:
            assert file.read(name) == old.read(name), name
    again = formats.open_model(tmp_path / "sub" / "new.npz")
    np.testing.assert_array_equal(formats.read(again, again.tensors["a/w"]), -BASE)
    found = formats.read(again, again.tensors["big"])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, BASE + 0.5)


def test_npy_becomes_an_archive_of_one(tmp_path):
    np.save(tmp_path / "w.npy", BASE)
    model = formats.open_model(tmp_path / "w.npy")
    for layers, wanted in (({}, BASE), ({"w": BASE * 2}, BASE * 2)):
        formats.rewrite(model, tmp_path / "w.npz", layers)
        again = formats.open_model(tmp_path / "w.npz")
        np.testing.assert_array_equal(formats.read(again, again.tensors["w"]), wanted)


def test_npz_never_holds_bfloat16(tmp_path):
    np.savez(tmp_path / "m.npz", w=BASE.astype(ml_dtypes.bfloat16))
    with pytest.raises(errors.InputError, match=r"w: .*bfloat16"):
        formats.open_model(tmp_path / "m.npz")
