"""NumPy files against numpy: values in every order and compression; pickles, bombs and cuts refused."""

import io
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxsub import errors, formats

BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = {
    "plain": BASE,
    "fortran": np.asfortranarray(BASE),
    "transposed": BASE[0].T,
    "big": BASE.astype(">f8"),
    "scalar": np.float32(3),
    "empty": np.zeros((0, 3)),
    "half": BASE.astype(np.float16),
    "ints": np.arange(5),
    "flags": np.array([True, False]),
    "a/b.c": BASE[0, 0],
}


def npy(array, **kwargs):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), **kwargs)
    return stream.getvalue()


def header(text, data=b"", version=1):
    """A .npy with this text as header."""
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<L", len(text)) + text + data


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_agrees_with_numpy(tmp_path, save):
    save(tmp_path / "m.npz", **ARRAYS)
    model = formats.open_model(tmp_path / "m.npz")
    assert set(model.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        found = formats.read(model, model.tensors[name])
        assert (found.shape, found.dtype) == (array.shape, array.dtype.newbyteorder("="))
        np.testing.assert_array_equal(found, array)
    stored = save is np.savez
    assert (model.tensors["plain"].extent is not None) == stored
    assert model.tensors["fortran"].extent is None and model.tensors["big"].extent is None


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("name", ["plain", "fortran"])
def test_single_array_is_named_after_its_file(tmp_path, version, name):
    (tmp_path / "weights.npy").write_bytes(npy(ARRAYS[name], version=version))
    model = formats.open_model(tmp_path / "weights.npy")
    np.testing.assert_array_equal(formats.read(model, model.tensors["weights"]), BASE)


@pytest.mark.slow
def test_every_cut_and_extension_is_refused(tmp_path):
    np.savez(tmp_path / "good.npz", a=BASE[0], b=BASE[1])
    for name, good in (("m.npy", npy(BASE[0])), ("m.npz", (tmp_path / "good.npz").read_bytes())):
        for data in [good[:end] for end in range(len(good))] + [good + b"x"]:
            (tmp_path / name).write_bytes(data)
            with pytest.raises(errors.InputError, match=name):
                formats.open_model(tmp_path / name)


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("<f4", "|O"), "pickle"),
        (GOOD.replace("<f4", "|V2"), "bfloat16"),
        (GOOD.replace("'<f4'", "[('a', '<f4')]"), "structured"),
        (GOOD.replace("<f4", "<U8"), "no number"),
        (GOOD.replace("<f4", "<M8[s]"), "no number"),
        (GOOD.replace("<f4", "<f3"), "no number"),
        (GOOD.replace("(2,)", "(65536, 65536)"), "declares 17179869184 bytes"),
        (GOOD.replace("(2,)", "(-2,)"), "numpy does not write"),
        (GOOD.replace("(2,)", "(0, 9223372036854775807)"), "shape"),
        (GOOD.replace("(2,)", "(" + "1, " * 33 + ")"), "shape|numpy does not write"),
        (GOOD.replace("False", "__import__('os')"), "numpy does not write"),
        (GOOD.replace("}", "'x': 1}"), "numpy does not write"),
        (GOOD + GOOD, "numpy does not write"),
        ("[]", "numpy does not write"),
        ("", "numpy does not write"),
    ],
)
def test_headers_are_not_evaluated(tmp_path, text, words):
    (tmp_path / "m.npy").write_bytes(header(text, bytes(8)))
    with pytest.raises(errors.InputError, match=words):
        formats.open_model(tmp_path / "m.npy")


def test_header_written_by_others_is_understood(tmp_path):
    (tmp_path / "m.npy").write_bytes(header("{\"shape\": (2L,), 'fortran_order':False,'descr':'<f4'}", bytes(8)))
    assert formats.open_model(tmp_path / "m.npy").tensors["m"].shape == (2,)


def test_header_length_is_bounded_before_reading(tmp_path):
    (tmp_path / "m.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**32 - 1) + b"x" * 100)
    with pytest.raises(errors.InputError, match="4294967307"):
        formats.open_model(tmp_path / "m.npy")


def test_bfloat16_saved_by_numpy_gets_advice(tmp_path):
    np.savez(tmp_path / "m.npz", w=BASE.astype(ml_dtypes.bfloat16))
    with pytest.raises(errors.InputError, match="w: .*bfloat16.*safetensors"):
        formats.open_model(tmp_path / "m.npz")


def test_damage_inside_a_member_is_found(tmp_path):
    weights = np.random.default_rng(0).normal(size=300)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "m.npz", w=weights)
        data = bytearray((tmp_path / "m.npz").read_bytes())
        data[1500] ^= 0x10
        (tmp_path / "m.npz").write_bytes(data)
        with pytest.raises(errors.InputError, match="checksum|inflate"):
            model = formats.open_model(tmp_path / "m.npz")
            formats.read(model, model.tensors["w"])


def test_bombs_and_odd_members(tmp_path):
    def write(members, compression=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "m.npz", "w", compression) as out:
            for name, data in members.items():
                out.writestr(name, data)

    write({"w.npy": npy(np.zeros(4_000_000))})
    with pytest.raises(errors.InputError, match="declares 32000128 bytes"):
        formats.open_model(tmp_path / "m.npz")
    write({"w.npy": npy(np.array([{}], object), allow_pickle=True), "v.npy": npy(BASE)})
    with pytest.raises(errors.InputError, match="w: .*pickle"):
        formats.open_model(tmp_path / "m.npz")
    write({"w.npy": npy(BASE), "readme.txt": b"hello"})
    assert dict(formats.open_model(tmp_path / "m.npz").skipped) == {"readme.txt": "no .npy member"}
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write({"w.npy": npy(BASE)}, method)
        with pytest.raises(errors.InputError, match="compressed by method"):
            formats.open_model(tmp_path / "m.npz")


def test_inflating_beyond_the_declared_size_stops_there(tmp_path):
    """The directory and the member agree on a size that is too small."""
    with zipfile.ZipFile(tmp_path / "m.npz", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("w.npy", npy(np.zeros(100)))
    data = (tmp_path / "m.npz").read_bytes()
    shorter = npy(np.zeros(100))[:-80]
    assert data.count(struct.pack("<L", 928)) == 2
    (tmp_path / "m.npz").write_bytes(data.replace(struct.pack("<L", 928), struct.pack("<L", len(shorter))))
    with pytest.raises(errors.InputError, match="declares|inflates to more"):
        formats.open_model(tmp_path / "m.npz")
