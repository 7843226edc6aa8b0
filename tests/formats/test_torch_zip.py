"""Torch files: values against torch where it is installed; archives and pickle streams made by hand where not."""

import io
import struct
import zipfile

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import _pickle


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def ints(*numbers):
    return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t"


def tensor(key="0", count=6, offset=0, shape=(2, 3), stride=(3, 1), storage="FloatStorage"):
    """The opcodes torch.save writes for one tensor."""
    record = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu")
    record += b"J" + struct.pack("<i", count) + b"tQ"
    rest = b"J" + struct.pack("<i", offset) + ints(*shape) + ints(*stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + record + rest + b"tR"


def mapping(**values):
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


DATA = np.arange(6, dtype=np.float32)
DATA_BYTES = DATA.tobytes()


def archive(body, data=DATA_BYTES, root="archive", extra=None, compression=zipfile.ZIP_STORED):
    """The bytes of a torch file with this pickle body and one record."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as out:
        out.writestr(f"{root}/data.pkl", b"\x80\x02" + body + b".")
        out.writestr(f"{root}/data/0", data)
        for name, content in (extra or {}).items():
            out.writestr(name, content)
    return stream.getvalue()


def open_bytes(tmp_path, data):
    (tmp_path / "m.pt").write_bytes(data)
    return formats.open_model(tmp_path / "m.pt")


def refused(tmp_path, data, words=None):
    with pytest.raises(errors.InputError, match=words) as caught:
        open_bytes(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path / "m.pt"))


def test_hand_made_file_needs_no_torch(tmp_path):
    body = mapping(w=tensor(), t=tensor(shape=(3, 2), stride=(1, 3)), last=tensor(offset=5, shape=(), stride=()))
    model = open_bytes(tmp_path, archive(body, extra={"archive/version": "3\n", "archive/byteorder": "little"}))
    assert model.tensors["w"].extent is not None and model.tensors["t"].extent is None
    np.testing.assert_array_equal(formats.read(model, model.tensors["w"]), DATA.reshape(2, 3))
    np.testing.assert_array_equal(formats.read(model, model.tensors["t"]), DATA.reshape(2, 3).T)
    assert formats.read(model, model.tensors["last"]) == 5


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (tensor(offset=1), "reaches to entry 6"),
        (tensor(shape=(2, 3), stride=(0, 1)), "expands"),
        (tensor(shape=(5, 2), stride=(1, 1)), "expands"),
        (tensor(count=7), "record of 28 bytes"),
        (tensor(key="1"), "not in the file"),
        (tensor(shape=(2, 3), stride=(3,)), "offset, shape and stride"),
        (tensor(shape=(-2, -3)), "shape or stride"),
        (tensor(offset=-1), "offset, shape"),
        (tensor(shape=(1,) * 33, stride=(1,) * 33), "at most 32"),
    ],
)
def test_views_are_checked_against_their_record(tmp_path, view, words):
    refused(tmp_path, archive(mapping(w=view)), words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"cos\nsystem\n" + text("true") + b"\x85R", r"asks for os\.system"),
        (mapping(w=tensor(), x=b"cbuiltins\neval\n"), r"builtins\.eval"),
        (text("os") + text("system") + b"\x93", r"os\.system"),
        (b"(S'x'\nios\nsystem\n", "opcode"),
        (mapping(w=tensor()) + b"0}", "opcode 0x30"),
        (tensor() + text("k") + b"K\1s", "SETITEM is applied to something else"),
        (tensor(), "no dict of tensors"),
        (b"]" + tensor() + b"a", "no dict of tensors"),
        (b"}" + tensor() + b"b", "no dict|BUILD"),
        (b"R", "stack is empty"),
        (b"t", "no mark"),
        (b"h\x05", "remembered"),
        (b"}(" + text("a") + b"u", "no value"),
        (mapping(a=b"K\1") + text("a") + b"K\2s", "twice"),
        (b"\x8b\xff\xff\xff\x7f", "integer of 2147483647"),
        (b"X\xff\xff\xff\x7f", "announces 2147483647"),
        (b"X\x02\x00\x00\x00\xff\xfe", "damaged"),
        (b"}" + b"}", "unbalanced"),
        (b"}.", "goes on"),
        (b"c" + b"x" * 300, "does not end"),
        (b"(((((", "unbalanced|empty"),
        (b"ctorch\nFloatStorage\n)R", "called"),
        (b"ccollections\nOrderedDict\n(K\1tR", "with arguments"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\1NNtR", "no tensor"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\1K\1))NNtR", "typed storage"),
        (b"K\1Q", "torch's way"),
        (b"}q\x00(" + text("a") + b"h\x00u", "shared between containers"),
        (b"](]q\x01]q\x02h\x01a" + b"e", "unbalanced|no dict"),
        (mapping(a=b"K\1"), "no tensors"),
    ],
)
def test_streams_beyond_a_state_dict_are_refused(tmp_path, body, words):
    refused(tmp_path, archive(body), words)


def test_doubling_lists_are_refused_at_once(tmp_path):
    lists = b"]q\x00" + b"".join(b"]q" + bytes([n + 1]) + b"(" + 2 * (b"h" + bytes([n])) + b"e" for n in range(60))
    body = b"}" + text("w") + tensor() + b"s" + text("x") + b"(" + lists + b"ts"  # a tuple of 2 ** 60 leaves
    refused(tmp_path, archive(body), "shared between")


def test_every_truncation_of_a_stream_is_an_input_error():
    body = b"\x80\x02" + mapping(w=tensor(), n=b"G" + bytes(8), s=text("x")) + b"."
    assert set(_pickle.read(body, "f")) == {"w", "n", "s"}
    for end in range(len(body)):
        with pytest.raises(errors.InputError):
            _pickle.read(body[:end], "f")


def test_random_streams_end_in_an_input_error_or_plain_data():
    rng = np.random.default_rng(1)
    body = bytearray(b"\x80\x02" + mapping(w=tensor(), n=b"K\1", s=text("x")) + b".")
    outcomes = set()
    for _ in range(3000):
        mutant = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            mutant[rng.integers(len(mutant))] = rng.integers(256)
        try:
            outcomes.add(type(_pickle.read(bytes(mutant), "f")).__name__)
        except errors.InputError:
            outcomes.add("refused")
    assert outcomes <= {
        "refused",
        "dict",
        "OrderedDict",
        "View",
        "tuple",
        "list",
        "str",
        "int",
        "bool",
        "NoneType",
        "float",
    }
    assert {"refused", "dict"} <= outcomes


def test_archives_that_torch_does_not_write(tmp_path):
    body = mapping(w=tensor())
    good = archive(body)
    assert list(open_bytes(tmp_path, good).tensors) == ["w"]
    refused(tmp_path, archive(body, extra={"other/data.pkl": b""}), "2 top folders")
    refused(tmp_path, archive(body, extra={"../x": b""}), "no plain relative path")
    refused(tmp_path, archive(body, extra={"archive/code/x.py": b""}), "TorchScript")
    refused(tmp_path, archive(body, extra={"archive/byteorder": b"big"}), "little-endian")
    refused(tmp_path, archive(body, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(tmp_path, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before 2020")
    refused(tmp_path, good.replace(DATA.tobytes(), DATA.tobytes()[::-1]), "checksum")
    refused(tmp_path, good.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v1"), "checksum|asks for")
    with pytest.warns(UserWarning, match="Duplicate"):
        refused(tmp_path, archive(body, extra={"archive/data/0": b""}), "same member twice")
    flagged = bytearray(good)
    at = flagged.rfind(b"PK\1\2")
    flagged[at + 8] |= 1
    refused(tmp_path, bytes(flagged), "flags")


def test_every_cut_of_an_archive_is_refused(tmp_path):
    good = archive(mapping(w=tensor()))
    for end in range(len(good)):
        refused(tmp_path, good[:end])
    refused(tmp_path, good + b"x", "directory")


def test_one_record_under_many_views_is_bounded(tmp_path):
    views = {f"w{i}": tensor(offset=i % 3, shape=(1 + i % 3,), stride=(1,)) for i in range(40)}
    assert len(open_bytes(tmp_path, archive(mapping(**views))).skipped) == 37
    bomb = {f"w{i}": tensor(count=600, offset=i, shape=(500,), stride=(1,)) for i in range(20)}
    refused(tmp_path, archive(mapping(**bomb), np.zeros(600, np.float32).tobytes()), "one record under views")


def test_agrees_with_torch(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    tree = {
        "transposed": w.T, "rows": w[1:3], "column": w[:, 2], "double": w.double(), "half": w.half(),
        "bf": w.bfloat16(),
        "f8": w.to(torch.float8_e4m3fn), "parameter": torch.nn.Parameter(w + 1), "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0), "ints": torch.arange(5), "flags": torch.tensor([True, False]),
        "nested": {"model": network.state_dict(), "list": [w * 2, {"deep": w * 3}], "lr": 0.1, "betas": (0.9, 0.99)},
        "again": w.T, "epoch": 3, "name": "x", "none": None, "optimizer": {"state": {0: {"exp_avg": w * 4}}},
    }  # fmt: skip
    torch.save(tree, tmp_path / "m.pt")
    model = formats.open_model(tmp_path / "m.pt")
    flat = {k: v for k, v in tree.items() if isinstance(v, torch.Tensor) and k != "again"}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    flat |= {f"nested.model.{k}": v for k, v in network.state_dict().items() if not k.endswith(buffers)}
    flat |= {"nested.list.0": w * 2, "nested.list.1.deep": w * 3}
    assert set(model.tensors) == set(flat)
    assert model.skipped["again"] == "the same stored numbers as transposed"
    assert "optimiser" in model.skipped["optimizer.state.0.exp_avg"]
    for name, value in flat.items():
        found = formats.read(model, model.tensors[name])
        assert found.shape == tuple(value.shape)
        expected = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.dim() else None
        assert expected is None or found.tobytes() == expected, name


def test_whole_module_is_refused_with_the_cure(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(errors.InputError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        formats.open_model(tmp_path / "m.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(errors.InputError, match="before 2020"):
        formats.open_model(tmp_path / "old.pt")
