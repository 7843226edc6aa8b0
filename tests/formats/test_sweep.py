"""Every cut and three extensions of golden files, one a format: all refused, each naming the file."""

import io
import json

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import safetensors
from tests.figures_log import record
from tests.formats import hostile_files, lora_files, test_torch_zip

EXTENSIONS = (b"\0", b"\n", bytes(64))
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}


def numpy_bytes(save, *arrays, **named):
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def safetensors_bytes(folder, arrays, metadata=None):
    safetensors.write(folder / "golden", arrays, metadata)
    return (folder / "golden").read_bytes()


def msgpack(folder):
    serialization = pytest.importorskip("flax.serialization")
    return serialization.to_bytes({"params": {name: np.asarray(a, np.float32) for name, a in ARRAYS.items()}})


def subspace(folder):
    arrays = {
        f"q.subspaceadapter_{s}.{p}": np.ones((3, 3), np.float32) for s in "AB" for p in ("components", "loadings")
    }
    return safetensors_bytes(folder, arrays)


GOLDEN = {
    "m.safetensors": lambda folder: safetensors_bytes(folder, ARRAYS, {"k": "v"}),
    "kohya.safetensors": lambda folder: safetensors_bytes(folder, lora_files.pair(alpha=2)),
    "loha.safetensors": lambda folder: safetensors_bytes(folder, lora_files.stored(lora_files.loha()[0], alpha=2)),
    "subspace.safetensors": subspace,
    "m.npy": lambda _: numpy_bytes(np.save, ARRAYS["a"]),
    "m.npz": lambda _: numpy_bytes(np.savez, **ARRAYS),
    "m.pt": lambda _: test_torch_zip.archive(test_torch_zip.mapping(a=test_torch_zip.tensor())),
    "m.msgpack": msgpack,
}


def harmed(data):
    return [data[:n] for n in range(len(data))] + [data + more for more in EXTENSIONS]


def sweep(model, file, data):
    """How many of the harmed files are refused; all must be, and `file` must be named."""
    for number, bad in enumerate(harmed(data)):
        file.write_bytes(bad)
        with pytest.raises(errors.InputError) as caught:
            formats.open_model(model)
        assert str(file) in str(caught.value), number
    file.write_bytes(data)
    formats.open_model(model)
    return len(data) + len(EXTENSIONS)


# The other formats' own tests sweep their files too, by default.
DEFAULT = ("kohya.safetensors", "m.npy")


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN])
def test_files(tmp_path, name):
    count = sweep(tmp_path / name, tmp_path / name, GOLDEN[name](tmp_path))
    record("SWEEP", f"cuts and extensions of {name} refused", f"{count} of {count}")


@pytest.mark.parametrize("family", ["peft", "index"])
def test_weights_and_configurations_of_folders(tmp_path, family):
    if family == "peft":
        hostile_files.adapter()(tmp_path)
        files = ["adapter_model.safetensors", "adapter_config.json"]
    else:
        hostile_files.sharded({"weight_map": {"w0": "a.safetensors"}})(tmp_path)
        files = ["a.safetensors", "model.safetensors.index.json"]
    weights, text = (tmp_path / name for name in files)
    count = sweep(tmp_path, weights, weights.read_bytes())
    data = text.read_bytes()
    for bad in [data[:n] for n in range(len(data))] + [data + b"\0", data + b"{}", data + data]:  # a blank is JSON
        text.write_bytes(bad)
        with pytest.raises(errors.InputError, match=text.name):
            formats.open_model(tmp_path)
        count += 1
    assert json.loads(data)
    record("SWEEP", f"cuts and extensions of a {family} folder's files refused", f"{count} of {count}")


@pytest.mark.slow
def test_hdf5(tmp_path):
    """Cuts only: what follows the end that an HDF5 file states is no part of it."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file["layer/kernel"] = ARRAYS["a"]
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(errors.InputError, match=r"m\.h5"):
            formats.open_model(path)
    record("SWEEP", "cuts of m.h5 refused", f"{len(data)} of {len(data)}")
