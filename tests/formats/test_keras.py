"""HDF5 and Keras archives against h5py; links, foreign filters and declared sizes refused."""

import sys
import zipfile

import numpy as np
import pytest

from jaxsub import errors, formats

BASE = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


def write(h5py, path):
    with h5py.File(path, "w") as out:
        out["model_weights/dense/kernel:0"] = BASE
        out["model_weights/dense/bias:0"] = BASE[0].astype(np.float16)
        out["model_weights/bn/moving_mean:0"] = BASE[0]
        out["optimizer_weights/m"] = BASE
        out["big"] = BASE.astype(">f8")
        out["scalar"] = np.float32(2)
        out["names"] = "text"
        out.create_dataset("chunked", data=BASE, chunks=(2, 2))
        out.create_dataset("packed", data=BASE, compression="gzip", shuffle=True)
        out.create_dataset("empty", (0, 3), dtype="f4")
    return path


@pytest.mark.parametrize("name", ["m.h5", "m.hdf5", "m.keras"])
def test_agrees_with_h5py(tmp_path, h5py, name):
    write(h5py, tmp_path / "x.h5")
    if name == "m.keras":
        with zipfile.ZipFile(tmp_path / name, "w") as out:
            out.writestr("config.json", "{}")
            out.write(tmp_path / "x.h5", "model.weights.h5")
    else:
        (tmp_path / "x.h5").rename(tmp_path / name)
        (tmp_path / "x.h5").symlink_to(name)
    model = formats.open_model(tmp_path / name)
    with h5py.File(tmp_path / "x.h5") as truth:
        for key, tensor in model.tensors.items():
            expected = truth[key][()]
            found = formats.read(model, tensor)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype.newbyteorder("="))
            np.testing.assert_array_equal(found, expected)
    assert set(model.tensors) == {
        "model_weights/dense/kernel:0", "model_weights/dense/bias:0", "big", "scalar", "chunked", "packed", "empty",
    }  # fmt: skip
    assert set(model.skipped) == {"model_weights/bn/moving_mean:0", "optimizer_weights/m", "names"}
    assert model.tensors["model_weights/dense/kernel:0"].extent is not None
    assert model.tensors["packed"].extent is None and model.tensors["big"].extent is None


def test_what_leads_elsewhere_or_declares_more_than_it_stores_is_refused(tmp_path, h5py):
    write(h5py, tmp_path / "other.h5")
    path = tmp_path / "m.h5"

    def refused(fill, words):
        with h5py.File(path, "w") as out:
            fill(out)
        with pytest.raises(errors.InputError, match=words) as caught:
            formats.open_model(path)
        assert str(caught.value).startswith(str(path))

    def virtual(out):
        layout = h5py.VirtualLayout((3, 4), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "chunked", (3, 4))
        out.create_virtual_dataset("w", layout)

    def cycle(out):
        out["a/w"] = BASE
        out["a/b"] = out["a"]

    refused(lambda out: out.__setitem__("w", h5py.ExternalLink("other.h5", "big")), "w: is a link .ExternalLink")
    refused(lambda out: out.__setitem__("w", h5py.SoftLink("/x")), "w: is a link .SoftLink")
    refused(virtual, "other files")
    refused(lambda out: out.create_dataset("w", (4,), "f4", external=[(str(tmp_path / "raw"), 0, 16)]), "other files")
    refused(cycle, "met twice")
    refused(lambda out: out.create_dataset("w", (2**20, 2**10), "f8"), "declares 8589934592 bytes and stores 0")
    refused(lambda out: out.create_dataset("w", (2**20, 2**10), "f8", chunks=(9, 9), compression="gzip"), "stores 0")
    refused(lambda out: out.create_dataset("w", data=np.zeros((3, 2), "V2")), "bfloat16")


def test_datasets_of_one_storage_are_no_larger_than_some_copies(tmp_path, h5py):
    """Tied weights are one dataset of two names; a thousand names would be a thousand copies in memory."""
    for count in (2, 20):
        with h5py.File(tmp_path / f"{count}.h5", "w") as out:
            out["w0"] = np.ones((200, 200), np.float32)
            for n in range(1, count):
                out[f"w{n}"] = out["w0"]
    assert len(formats.open_model(tmp_path / "2.h5").tensors) == 2
    with pytest.raises(errors.InputError, match="20.h5, w.*share what is stored"):
        formats.open_model(tmp_path / "20.h5")


def test_cut_and_damaged_files_are_refused(tmp_path, h5py):
    data = write(h5py, tmp_path / "m.h5").read_bytes()
    for end in range(0, len(data), 97):
        (tmp_path / "m.h5").write_bytes(data[:end])
        with pytest.raises(errors.InputError, match=r"m\.h5"):
            formats.open_model(tmp_path / "m.h5")
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model.weights.h5", data)
    with pytest.raises(errors.InputError, match="stored as it is"):
        formats.open_model(tmp_path / "m.keras")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(errors.InputError, match=r"pip install 'jaxsub\[h5\]'"):
        formats.open_model(tmp_path / "m.h5")


@pytest.mark.slow
def test_random_damage_ends_in_an_input_error_or_a_model(tmp_path, h5py):
    data, rng, refused = write(h5py, tmp_path / "m.h5").read_bytes(), np.random.default_rng(3), 0
    for _ in range(300):
        mutant = bytearray(data)
        for _ in range(20):
            mutant[rng.integers(len(mutant))] = rng.choice([0, 255, rng.integers(256)])
        (tmp_path / "m.h5").write_bytes(mutant)
        try:
            model = formats.open_model(tmp_path / "m.h5")
            for tensor in model.tensors.values():
                assert formats.read(model, tensor).shape == tensor.shape
        except errors.InputError:
            refused += 1
    assert 30 < refused < 300
