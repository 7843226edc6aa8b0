"""Orbax checkpoints: read without jax or orbax, refused unless committed and whole, written again for orbax."""

import bz2
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import ml_dtypes
import numpy as np
import pytest

from jaxsub import errors, finding, formats
from tests.figures_log import record
from tests.selected import first

checkpoint = pytest.importorskip("orbax.checkpoint")
import jax

ROOT = pathlib.Path(__file__).parents[2]
BASE = np.arange(6, dtype=np.float32).reshape(2, 3)


def tree():
    dense = {"kernel": BASE.T + 1, "bias": BASE[0].astype(ml_dtypes.bfloat16), "zeros": np.zeros((3, 2), np.float16)}
    params = {"dense": dense, "blocks": [np.ones((2, 2)), (np.full((2, 2), np.nan),)], "a.b": np.array(2, np.float32)}
    params["table"] = np.random.default_rng(0).standard_normal((64, 32))  # too large to lie in the database itself
    rest = {"opt_state": {"mu": BASE}, "step": 3, "rate": 0.5, "ids": np.arange(3), "none": None, "empty": {}}
    return {"params": params | {"eleven": [np.full(1, float(i)) for i in range(11)]}} | rest


def save(path, content, **options):
    with checkpoint.StandardCheckpointer() as writer:
        writer.save(path, content, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "m"
    save(path, tree(), custom_metadata={"task": "t1", "n": 3})
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "m"))


def flat(content):
    found = {}
    for keys, value in jax.tree_util.tree_flatten_with_path(content)[0]:
        parts = [str(getattr(k, "key", getattr(k, "idx", None))) for k in keys]
        found["/".join(parts)] = value
    return found


def equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype.name, a.shape, a.tobytes()) == (b.dtype.name, b.shape, b.tobytes())


def test_every_array_is_read_as_it_was_saved(saved):
    model = formats.open_model(saved)
    arrays = {name: value for name, value in flat(tree()).items() if isinstance(value, np.ndarray)}
    assert model.format == "orbax" and model.metadata == {"task": "t1"}
    assert {*model.tensors, *model.skipped} == {*arrays} and {*model.skipped} == {"opt_state/mu"}
    for name, tensor in model.tensors.items():
        assert (tensor.shape, tensor.dtype) == (arrays[name].shape, arrays[name].dtype.name)
        assert equal(formats.read(model, tensor), arrays[name]), name


def test_reading_loads_neither_jax_nor_orbax(saved):
    code = f"""
import sys
from jaxsub import formats
model = formats.open_model({str(saved)!r})
assert formats.read(model, model.tensors["params/dense/kernel"]).sum() == 21
assert not {{"jax", "orbax", "flax"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_arrays_in_several_pieces_and_zarr_3(tmp_path):
    big = np.arange(4096, dtype=np.float32).reshape(64, 64)
    handler = checkpoint.PyTreeCheckpointHandler(use_zarr3=True)
    args = checkpoint.args.PyTreeSave({"w": big}, {"w": checkpoint.SaveArgs(chunk_byte_size=2048)})
    with checkpoint.Checkpointer(handler) as writer:
        writer.save(tmp_path / "three", args=args)
    with checkpoint.StandardCheckpointer() as writer:
        writer.save(tmp_path / "two", {"w": big}, save_args={"w": checkpoint.SaveArgs(chunk_byte_size=2048)})
    for name in ("two", "three"):
        model = formats.open_model(tmp_path / name)
        assert equal(formats.read(model, model.tensors["w"]), big)
    store = database(tmp_path / "two")
    pieces = [key for key in store.list().result() if not key.endswith(b".zarray")]
    assert len(pieces) > 2
    del store[pieces[-1]]
    with pytest.raises(errors.InputError, match=f"w: has {len(pieces) - 1} of its {len(pieces)} pieces"):
        formats.open_model(tmp_path / "two")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: os.unlink(f / "commit_success.txt"), "no committed checkpoint"),
        (lambda f: os.rename(f, f.with_name("m.orbax-checkpoint-tmp")), "unfinished checkpoint"),
        (lambda f: os.unlink(f / "manifest.ocdbt"), "no manifest.ocdbt"),
        (lambda f: os.unlink(f / "_METADATA"), "_METADATA: cannot be opened"),
        (lambda f: (f / "_METADATA").write_text('{"tree_metadata": {"w": 3}}'), "holds no tree"),
        (lambda f: (f / "_METADATA").write_text("[1]"), "no JSON object"),
        (lambda f: (f / "manifest.ocdbt").write_bytes(b"x" * 40), "is no database of arrays|cannot be listed"),
        (lambda f: shutil.rmtree(f / "d"), "cannot be|has 0 of"),
        (lambda f: [shutil.rmtree(p) for p in f.glob("ocdbt.process_*/d")], "cannot be|has 0 of"),
        (lambda f: edit(f, lambda text: text.replace('"kernel"', '"kornel"')), "kornel: cannot be opened"),
        (lambda f: edit(f, lambda text: text.replace('"kernel"', '"..\\/..\\/x"')), "cannot be opened"),
        (lambda f: edit(f, lambda text: text.replace('"key": "kernel"', '"key": "bias"')), "name of two arrays"),
        (lambda f: edit(f, lambda text: text.replace('"key": "kernel"', '"key": "k\\u202e"')), "control character"),
        (
            lambda f: edit(f, lambda text: text.replace('"key": "0", "key_type": 1', '"key": "x", "key_type": 1')),
            "in a list",
        ),
        (
            lambda f: edit(f, lambda text: text.replace('"key": "0", "key_type": 1', '"key": "0", "key_type": 2')),
            "in a list",
        ),
        (lambda f: edit(f, lambda text: text.replace('"key": "ids"', '"key": "params"')), "a leaf under a leaf"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(folder, harm, words):
    harm(folder)
    (path,) = folder.parent.iterdir()
    with pytest.raises(errors.InputError, match=words) as caught:
        model = formats.open_model(path)
        for tensor in model.tensors.values():
            formats.read(model, tensor)
    assert str(path) in str(caught.value)


def edit(folder, change):
    path = folder / "_METADATA"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def database(folder):
    import tensorstore

    base = {"driver": "file", "path": f"{folder}/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def test_a_piece_that_is_missing_is_zeros_only_where_zeros_are_left_out(folder):
    store = database(folder)
    del store["params.dense.kernel/0.0"]
    with pytest.raises(errors.InputError, match="params/dense/kernel: has 0 of its 1 pieces"):
        formats.open_model(folder)
    stores = '"store_array_data_equal_to_fill_value": '
    edit(folder, lambda text: text.replace(f"{stores}true", f"{stores}false"))  # older checkpoints leave zeros out
    model = formats.open_model(folder)
    assert not formats.read(model, model.tensors["params/dense/kernel"]).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"chunks": [1 << 40, 3]},
            "far larger than its own shape",
        ),  # tensorstore ends the process on such an allocation
        ({"chunks": [1 << 17, 3]}, "far larger than its own shape"),
        ({"dimension_separator": "/"}, "has 0 of its 1 pieces"),  # the piece is there, and is not looked for
        ({"dtype": "|S4"}, "which is no number"),
        ({"shape": [-1, 3]}, "cannot be opened"),
        ({"filters": [{"id": "x"}]}, "cannot be opened"),
        (
            {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}},
            "stored by blosc, which",
        ),
    ],
)
def test_arrays_that_say_what_cannot_be(folder, change, words):
    store = database(folder)
    said = json.loads(store["params.dense.kernel/.zarray"]) | change
    store["params.dense.kernel/.zarray"] = json.dumps(said).encode()
    with pytest.raises(errors.InputError, match=words) as caught:
        formats.open_model(folder)
    assert caught.value.key == "params/dense/kernel" and str(folder) in str(caught.value)


def zeros(num_blocks):
    """A zstd frame of so many times 128 KiB of zeros, four bytes each."""
    block = ((131072 << 3) | 2).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\0\x58" + block * num_blocks + b"\1\0\0"


BOMBS = {  # of 256 MiB
    "zstd": lambda: zeros(2048), "zlib": lambda: zlib.compress(bytes(1 << 28), 1),
    "gzip": lambda: gzip.compress(bytes(1 << 28), 1), "bz2": lambda: bz2.compress(bytes(1 << 26)) * 4,
}  # fmt: skip


@pytest.mark.parametrize("codec", first(BOMBS))
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not say")
def test_pieces_that_expand_are_refused_without_the_memory(folder, codec):
    store, name = database(folder), "params.dense.kernel"
    said = json.loads(store[f"{name}/.zarray"]) | {"compressor": {"id": codec, "level": 1}}
    store[f"{name}/.zarray"] = json.dumps(said).encode()
    store[f"{name}/0.0"] = BOMBS[codec]()
    code = f"""
import re
from jaxsub import errors, formats
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
model = formats.open_model({str(folder)!r})
before = peak()
try:
    formats.read(model, model.tensors["params/dense/kernel"])
except errors.InputError as error:
    assert "cannot be read" in str(error) and {str(folder)!r} in str(error), error
    print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    record("CORPUS", f"piece of an orbax array that expands to 256 MiB ({codec}): MiB taken", int(done.stdout))
    assert int(done.stdout) < 60


def test_nothing_outside_the_folder_is_read(folder, tmp_path):
    """A database whose pieces say that they lie in ../x: written in memory, then laid out as files."""
    import tensorstore

    memory = tensorstore.KvStore.open("memory://").result()
    spec = {
        "driver": "ocdbt",
        "base": "memory://",
        "value_data_prefix": "../x/",
        "config": {"max_inline_value_bytes": 0},
    }
    context = tensorstore.Context()
    memory = tensorstore.KvStore.open("memory://", context=context).result()
    hostile = tensorstore.KvStore.open(spec, context=context).result()
    honest = database(folder)
    for key in honest.list().result():
        hostile[key] = honest[key]
    shutil.rmtree(folder / "d")
    outside = 0
    for key in memory.list().result():
        path = pathlib.Path(os.path.normpath(folder / key.decode()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(memory[key])
        outside += folder not in path.parents
    assert outside and (tmp_path / "x").exists()
    with pytest.raises(errors.InputError, match="Invalid key"):
        model = formats.open_model(folder)
        formats.read(model, model.tensors["params/dense/kernel"])


def test_links_that_leave_the_folder_are_refused(folder, tmp_path):
    os.rename(folder / "d", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "d")
    with pytest.raises(errors.InputError, match="is a link to a folder") as caught:
        formats.open_model(folder)
    os.unlink(folder / "d")
    os.mkdir(folder / "d")
    for file in (tmp_path / "elsewhere").iterdir():
        os.symlink(file, folder / "d" / file.name)
    with pytest.raises(errors.InputError, match="link that leaves the collection") as again:
        formats.open_model(folder)
    assert caught.value.rule == again.value.rule == "H10"
    assert formats.open_model(folder, allow_roots=(tmp_path / "elsewhere",)).tensors


def test_a_change_after_opening_is_noticed(folder):
    model = formats.open_model(folder)
    database(folder)["more"] = b"x"
    with pytest.raises(errors.InputChangedError, match="changed since"):
        formats.read(model, model.tensors["params/dense/kernel"])


def test_rewritten_trees_are_restored_by_orbax(saved, tmp_path):
    model = formats.open_model(saved)
    layers = {"params/dense/kernel": -BASE.T.astype(float), "params/dense/bias": np.array([1, 2.001, 3])}
    layers["params/blocks/1/0"] = np.eye(2)
    for name, given in (("same", {}), ("new", layers)):
        formats.rewrite(model, tmp_path / name, given)
        wanted = flat(tree()) | {k: v.astype(flat(tree())[k].dtype) for k, v in given.items()}
        with checkpoint.StandardCheckpointer() as reader:
            restored = reader.restore(tmp_path / name)
        assert restored["none"] is None and restored["empty"] == {}
        assert type(restored["step"]) is int and type(restored["params"]["blocks"]) is list
        found = flat(restored)
        assert found.keys() == wanted.keys()
        assert all(equal(found[key], value) for key, value in wanted.items())
        again = formats.open_model(tmp_path / name)
        assert (dict(again.tensors), again.metadata) == (dict(model.tensors), model.metadata)
    assert json.loads((tmp_path / "new" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["n"] == 3


def test_a_training_state_is_its_weights(tmp_path):
    optax, train_state = pytest.importorskip("optax"), pytest.importorskip("flax.training.train_state")
    made = train_state.TrainState.create(apply_fn=None, params={"w": jax.numpy.ones((3, 2))}, tx=optax.adam(1e-3))
    save(tmp_path / "m", made)
    model = formats.open_model(tmp_path / "m")
    assert list(model.tensors) == ["params/w"] and {n.split("/")[0] for n in model.skipped} <= {"opt_state", "step"}
    formats.rewrite(model, tmp_path / "new", {"params/w": np.full((3, 2), 4.0)})
    with checkpoint.StandardCheckpointer() as reader:
        restored = reader.restore(tmp_path / "new", made)
    np.testing.assert_array_equal(restored.params["w"], np.full((3, 2), 4.0))
    assert jax.tree_util.tree_structure(restored) == jax.tree_util.tree_structure(made)


def test_arrays_of_devices_and_overflow(tmp_path):
    save(tmp_path / "m", {"w": jax.numpy.ones((8, 4)), "half": np.ones(3, np.float16)})
    model = formats.open_model(tmp_path / "m")
    formats.rewrite(model, tmp_path / "new", {})
    again = formats.open_model(tmp_path / "new")
    assert equal(formats.read(again, again.tensors["w"]), np.ones((8, 4), np.float32))
    with pytest.raises(errors.InputError, match="half: .*float16"):
        formats.rewrite(model, tmp_path / "no", {"half": np.full(3, 1e6)})
    assert not (tmp_path / "no").exists()


def test_checkpoints_of_a_manager_and_unfinished_ones_are_found(saved, tmp_path):
    for step in (5, 10):
        shutil.copytree(saved, tmp_path / "run" / str(step) / "default")
        (tmp_path / "run" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    shutil.copytree(saved, tmp_path / "run" / "15.orbax-checkpoint-tmp" / "default")
    shutil.copytree(saved, tmp_path / "run" / "other")
    found = finding.find(tmp_path / "run")
    assert [c.id for c in found.candidates] == ["10/default", "15.orbax-checkpoint-tmp", "5/default", "other"]
    with pytest.raises(errors.InputError, match="unfinished"):
        formats.open_model(found.candidates[1].path)
