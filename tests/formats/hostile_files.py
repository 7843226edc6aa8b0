"""Hostile and damaged model files beyond the corpus: name -> (maker, words of the refusal or None if it is accepted).

A maker writes into an empty folder and returns the path to open.
"""

import io
import json
import os
import struct
import zipfile

import numpy as np

from jaxsub.formats import safetensors
from tests.formats import lora_files
from tests.formats.test_torch_zip import archive, mapping, tensor, text

W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHT = json.dumps({"w": W}).encode()[1:-1]
ARRAY = np.ones((2, 2), np.float32)
STEM = "lora_unet_x"
CASES = {}


def add(name, make, words):
    assert name not in CASES
    CASES[name] = make, words


def stored(name, data):
    """A maker that writes bytes, or what a function gives, into one file."""

    def make(folder):
        (folder / name).write_bytes(data() if callable(data) else data)
        return folder / name

    return make


# safetensors ------------------------------------------------------------------------------------------------------


def header(value, data=bytes(8)):
    def bytes_of():
        made = value() if callable(value) else value
        raw = made if isinstance(made, bytes) else json.dumps(made).encode()
        return struct.pack("<Q", len(raw)) + raw + data

    return stored("m.safetensors", bytes_of)


for name, value, words in (
    ("nul_padding", b"{%b}\0\0\0\0" % WEIGHT, "Extra data"),
    ("float_offset", b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}', "pair of integers"),
    ("exponent_shape", b'{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', "impossible size"),
    ("minus_zero", b'{"w":{"dtype":"F32","shape":[2,-0],"data_offsets":[0,8]}}', "impossible size"),
    ("text_shape", {"w": W | {"shape": ["2"]}}, "impossible size"),
    ("list_dtype", {"w": W | {"dtype": ["F32"]}}, "unknown dtype"),
    ("lower_dtype", {"w": W | {"dtype": "f32"}}, "unknown dtype"),
    ("metadata_twice", b'{"__metadata__":{},%b,"__metadata__":{"a":"2"}}' % WEIGHT, "appears twice"),
    ("metadata_escaped", b'{"\\u005f_metadata__":{},%b,"__metadata__":{}}' % WEIGHT, "appears twice"),
    ("metadata_tensor", {"__metadata__": W}, "names to strings"),
    ("metadata_large", lambda: {"__metadata__": {"a": "x" * (1 << 24)}, "w": W}, "more than 16 MiB"),
    ("metadata_many", lambda: {"__metadata__": dict.fromkeys(map(str, range(160_000)), ""), "w": W}, "160000 entries"),
    ("metadata_surrogate", b'{"__metadata__":{"a":"\\ud800"},%b}' % WEIGHT, "surrogate"),
    ("escaped_pair", b'{"\\ud83d\\ude00":%b}' % json.dumps(W).encode(), None),
    ("nested_offsets", {"w": W | {"data_offsets": [[0], [8]]}}, "pair of integers"),
    ("bool_offsets", {"w": {"dtype": "U8", "shape": [8], "data_offsets": [False, 8]}}, "pair of integers"),
    ("null_entry", {"w": None}, "NoneType"),
    ("array_header", [{"w": W}], "no JSON object"),
    ("empty_inside", {"a": W, "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, "overlaps"),
    (
        "empty_and_huge",
        {"w": W, "e": {"dtype": "F32", "shape": [0, 2**31, 2**48 - 1], "data_offsets": [8, 8]}},
        "impossible",
    ),
    ("half_a_byte", {"w": {"dtype": "F4", "shape": [15], "data_offsets": [0, 8]}}, "does not fill"),
    ("brackets", b'{"w":%b}' % (b"[]" * 10**5), "not JSON"),
    ("commas", lambda: b'{"w":[%b0]}' % (b"0," * 3_000_001), "more than 3000000 values"),
    ("texts", lambda: b'{"w":[%b""]}' % (b'"",' * 2_000_001), "more than 2000000 texts"),
    ("escapes", lambda: b'{"w":"%b"}' % (b"\\n" * 1_000_001), "more than 1000000 escapes"),
):
    add(f"st_{name}", header(value), words)


# One file of LoRA -------------------------------------------------------------------------------------------------


def arrays(tensors, metadata=None):
    def make(folder):
        safetensors.write(folder / "m.safetensors", tensors, metadata)
        return folder / "m.safetensors"

    return make


for name, alpha, words in (
    ("nan", np.float32("nan"), "is nan"),
    ("infinite", np.float32("inf"), "is inf"),
    ("negative", np.float32(-1), "finite number from 0"),
    ("pair", np.ones(2, np.float32), "single number"),
    ("bool", np.bool_(True), "real number"),
    ("complex", np.complex64(1j), "real number"),
    ("huge", np.float64(1e300), "no training gives"),
    ("tiny", np.float64(1e-300), "no training gives"),
    ("byte", np.uint8(4), None),
):
    add(f"kohya_alpha_{name}", arrays({**lora_files.pair(STEM), f"{STEM}.alpha": alpha}), words)

PEFT = {"q.lora_A.weight": lora_files.factor(2, 5), "q.lora_B.weight": lora_files.factor(3, 2)}
for name, said, words in (
    ("cut", "{", "not JSON"),
    ("list", "[]", "no JSON object"),
    ("nan", '{"unet.r":2,"unet.lora_alpha":NaN}', "holds NaN"),
    ("deep", "[" * 10**5, "nested"),
    ("twice", '{"unet.r":2,"unet.r":4,"unet.lora_alpha":4}', "appears twice"),
    ("bool", '{"unet.r":true,"unet.lora_alpha":4}', "number was expected"),
    ("huge", '{"unet.r":2,"unet.lora_alpha":1e308}', "scale of 5e.307"),
    ("escape", '{"unet.r":2,"unet.lora_alpha":4,"unet.rank_pattern":{"[\\u202e-\\u001b]":2}}', "no regular expression"),
):
    metadata = {"lora_adapter_metadata": said}
    add(f"diffusers_{name}", arrays({f"unet.{key}": value for key, value in PEFT.items()}, metadata), words)


# PEFT folders -----------------------------------------------------------------------------------------------------


def adapter(fields=None, tensors=None, raw=None):
    def make(folder):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]} | (fields or {})
        (folder / "adapter_config.json").write_bytes(json.dumps(config).encode() if raw is None else raw)
        own = {f"base_model.model.{key}": value for key, value in (tensors or PEFT).items()}
        safetensors.write(folder / "adapter_model.safetensors", own, {"format": "pt"})
        return folder

    return make


for name, fields, words in (
    ("r_true", {"r": True}, "number was expected"),
    ("r_text", {"r": "2"}, "number was expected"),
    ("r_zero", {"r": 0}, "at least 1"),
    ("r_float", {"r": 2.0}, "number was expected"),
    ("r_lie", {"r": 3}, "tensors have 2"),
    ("alpha_text", {"lora_alpha": "4"}, "number was expected"),
    ("alpha_null", {"lora_alpha": None}, "number was expected"),
    ("alpha_true", {"lora_alpha": True}, "number was expected"),
    ("alpha_huge", {"lora_alpha": 1e308}, "scale of 5e.307"),
    ("alpha_tiny", {"lora_alpha": 1e-308}, "scale of 5e-309"),
    ("alpha_huge_in_pattern", {"alpha_pattern": {"q": 1e300}}, "scale of 5e.299"),
    ("alpha_negative", {"lora_alpha": -4}, None),
    ("type_lower", {"peft_type": "lora"}, "not LORA"),
    ("type_list", {"peft_type": ["LORA"]}, "not LORA"),
    ("rslora_text", {"use_rslora": "false"}, "true or false"),
    ("rslora_number", {"use_rslora": 1}, "true or false"),
    ("fan_text", {"fan_in_fan_out": "no"}, "true or false"),
    ("targets_number", {"target_modules": 3}, "neither a text nor a list"),
    ("targets_nested", {"target_modules": [["q"]]}, "neither a text nor a list"),
    ("targets_absent", {"target_modules": ["k", "\x1b[31m\u202e"]}, "no factors for it"),
    ("pattern_list", {"rank_pattern": [1]}, "table was expected"),
    ("pattern_bad", {"rank_pattern": {"(": 3}}, "no regular expression"),
    ("pattern_controls", {"rank_pattern": {"[\x1b\u202e-\x00]": 3}}, "no regular expression"),
    ("pattern_endless", {"rank_pattern": {"(a*)*b": 2}}, "too involved"),
    ("pattern_many", {"rank_pattern": {f"x{n}": 2 for n in range(20_001)}}, "more than 20000"),
    ("pattern_long", {"alpha_pattern": {f"{n:0500}": 2 for n in range(2_100)}}, "too long all together"),
    ("pattern_negative", {"rank_pattern": {"q": -1}}, "at least 1"),
    ("dora_text", {"use_dora": "no"}, "DoRA"),
    ("start_list", {"init_lora_weights": ["pissa"]}, "PEFT does not write"),
    ("start_pissa", {"init_lora_weights": "pissa_niter_4"}, "base weights were changed"),
    ("bias_number", {"bias": 3}, "PEFT does not write"),
    ("base_list", {"base_model_name_or_path": ["a"]}, "text was expected"),
    ("base_climbs", {"base_model_name_or_path": "../../etc/passwd"}, None),
    ("auto_map", {"auto_mapping": {"base_model_class": "os.system"}, "auto_map": {"AutoModel": "x.py"}}, None),
):
    add(f"peft_{name}", adapter(fields), words)
add("peft_utf16", adapter(raw=json.dumps({"peft_type": "LORA"}).encode("utf-16")), "plain UTF-8")
add("peft_deep", adapter(raw=b'{"peft_type":' + b"[" * 10**5), "nested")
add("peft_empty", adapter(raw=b""), "0 bytes")
add("peft_twice", adapter(tensors=PEFT | {"q.lora_A.default.weight": PEFT["q.lora_A.weight"]}), "twice")
add("peft_ints", adapter(tensors=PEFT | {"q.lora_A.weight": np.ones((2, 5), np.int32)}), "floats expected")
add("peft_three_axes", adapter(tensors=PEFT | {"q.lora_A.weight": np.ones((2, 5, 1))}), "make no matrix")
add("peft_foreign", adapter(tensors=PEFT | {"q.vera_lambda_b": np.ones(3)}), "another kind of adapter")


# Folders with an index --------------------------------------------------------------------------------------------


def sharded(index=None, shards=("a",), raw=None, also=None):
    def make(folder):
        for number, name in enumerate(shards):
            safetensors.write(folder / f"{name}.safetensors", {f"w{number}": ARRAY})
        data = json.dumps(index).encode() if raw is None else raw
        (folder / "model.safetensors.index.json").write_bytes(data)
        if also is not None:
            also(folder)
        return folder

    return make


NOT_HERE = "no .safetensors file of this folder"
for name, shard, words in (
    ("trailing_dot", "a.safetensors.", NOT_HERE),
    ("trailing_blank", "a.safetensors ", NOT_HERE),
    ("reserved", "NUL.safetensors", NOT_HERE),
    ("stream", "a.safetensors:b.safetensors", NOT_HERE),
    ("full_width", "x\uff0fa.safetensors", "not there"),
    ("bidi", "a\u202e.safetensors", "not there"),
    ("list", ["a.safetensors"], NOT_HERE),
    ("null", None, NOT_HERE),
    ("number", 3, NOT_HERE),
    ("empty", "", NOT_HERE),
    ("home", "~/a.safetensors", NOT_HERE),
    ("variable", "$HOME.safetensors", "not there"),
    ("newline", "a\n.safetensors", NOT_HERE),
    ("upper", "A.SAFETENSORS", NOT_HERE),
    ("folder", "f.safetensors", "a folder, not a regular file"),
    ("pipe", "p.safetensors", "named pipe"),
    ("device", "z.safetensors", "leaves the collection"),
    ("memory", "mem.safetensors", "leaves the collection"),
):

    def also(folder):
        (folder / "f.safetensors").mkdir()
        os.mkfifo(folder / "p.safetensors")
        os.symlink("/dev/zero", folder / "z.safetensors")
        os.symlink("/proc/self/mem", folder / "mem.safetensors")

    add(f"index_{name}", sharded({"weight_map": {"w0": shard}}, also=also), words)
both = {"w0": "b\u202e.safetensors", "w1": "a.safetensors"}
add("index_swapped", sharded({"weight_map": both}, ("a", "b\u202e")), "lists it in")
add("index_listed", sharded({"weight_map": ["a"]}), "no weight_map")
add("index_key_twice", sharded(raw=b'{"weight_map":{"w0":"a.safetensors"},"weight_map":{}}'), "appears twice")
add("index_zero_bytes", sharded(raw=b""), "0 bytes")
add("index_5000", sharded({"weight_map": {f"w{i}": f"m{i}.safetensors" for i in range(5000)}}), "not there")
linked = {"w0": "a.safetensors", "w1": "b.safetensors"}
make = sharded({"weight_map": linked}, also=lambda f: os.link(f / "a.safetensors", f / "b.safetensors"))
add("index_hard_link", make, "lists it in")
odd_size = {"metadata": {"total_size": "\x1b[31m\u202e"}, "weight_map": {"w0": "a.safetensors"}}
add("index_odd_size", sharded(odd_size), None)


# NumPy ------------------------------------------------------------------------------------------------------------


def npy(said, data=bytes(8)):
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(said) + 1) + said.encode("latin-1") + b"\n" + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
for name, said, words in (
    ("sum", GOOD.replace("(2,)", "(1+1,)"), "numpy does not write"),
    ("negative", GOOD.replace("(2,)", "(-2,)"), "numpy does not write"),
    ("underscore", GOOD.replace("(2,)", "(2_0,)"), "numpy does not write"),
    ("superscript", GOOD.replace("(2,)", "(\xb2,)"), "numpy does not write"),
    ("no_tuple", GOOD.replace("(2,)", "(2)"), "numpy does not write"),
    ("twice", GOOD.replace("{", "{'descr': '<f8', "), "numpy does not write"),
    ("order", GOOD.replace("False", "1"), "numpy does not write"),
    ("objects", GOOD.replace("<f4", "|O"), "Python objects"),
    ("fields", GOOD.replace("'<f4'", "[('a', '<f4')]"), "structured"),
    ("wide", GOOD.replace("<f4", "<f16"), "no number"),
    ("date", GOOD.replace("<f4", "<M8[s]"), "no number"),
    ("huge", GOOD.replace("(2,)", "(9999999999999999999,)"), "shape of 1 sizes"),
    ("huge_and_zero", GOOD.replace("(2,)", "(0, 999999999999999999)"), "shape of 2 sizes"),
    ("empty_and_huge", GOOD.replace("(2,)", f"(0, {2**40}, {2**40})"), "declares 0 bytes"),
    ("many", GOOD.replace("(2,)", f"({'1,' * 40}2)"), "shape of 41 sizes"),
):
    add(f"npy_{name}", stored("m.npy", npy(said)), words)


def zipped(*members, **options):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as out:
        for name, data in members:
            out.writestr(name, data)
    return stream.getvalue()


ONE = zipped(("a.npy", npy(GOOD)))


def bomb():
    return npy(GOOD.replace("2,", "9000000,"), bytes(36_000_000))


for name, data, words in (
    ("empty", zipped(), "no tensors"),
    ("climbs", zipped(("../a.npy", npy(GOOD))), "plain relative path"),
    ("absolute", zipped(("/a.npy", npy(GOOD))), "plain relative path"),
    ("drive", zipped(("C:a.npy", npy(GOOD))), "plain relative path"),
    ("escape", zipped(("a\x1b.npy", npy(GOOD))), "plain relative path"),
    ("bidi", zipped(("a\u202e.npy", npy(GOOD))), "control character"),
    ("nameless", zipped((".npy", npy(GOOD))), "empty name"),
    ("no_array", zipped(("a.txt", b"x")), "no weights"),
    ("program_before", b"MZ" + bytes(50) + ONE, "neither"),
    ("tail", ONE + b"x", "directory record"),
    ("second_end", ONE[:-2] + struct.pack("<H", 22) + b"PK\5\6" + bytes(18), "cannot be"),
    ("bzip2", zipped(("a.npy", npy(GOOD)), compression=zipfile.ZIP_BZIP2), "method 12"),
    ("bomb", lambda: zipped(("a.npy", bomb()), compression=zipfile.ZIP_DEFLATED), "stored ones"),
):
    add(f"npz_{name}", stored("m.npz", data), words)


# torch ------------------------------------------------------------------------------------------------------------

for name, body, words in (
    ("own_member", b"}q\0" + text("a") + b"h\0s", "shared between containers"),
    ("own_entry", b"}" + text("a") + b"]q\0h\0as", "shared between containers"),
    ("same_name", mapping(**{"a.b": tensor(), "a": mapping(b=tensor())}), "name of two tensors"),
    ("inst", b"(ios\nsystem\n", "opcode 0x69"),
    ("obj", b"(cos\nsystem\no", "os.system"),
    ("extension", b"\x82\x01", "opcode 0x82"),
    ("text_id", b"Pabc\n", "opcode 0x50"),
    ("eval", b"c__builtin__\neval\n(" + text("1") + b"tR", "__builtin__.eval"),
    ("stack_global", text("os") + text("system") + b"\x93", "os.system"),
    ("numbers_global", b"K\1K\2\x93", "no part of a state dict"),
    ("quantised", mapping(a=tensor(storage="QInt8Storage")), "QInt8Storage"),
    ("attribute", b"ctorch\n__dict__\n", "__dict__"),
    ("deep_tuples", b"N" + b"\x85" * 200_000, "no dict of tensors"),
    ("key_controls", b"}" + text("a\x1b[2J") + tensor() + b"s", "control character"),
    ("key_surrogate", b"}X\3\0\0\0\xed\xa0\x80" + tensor() + b"s", "damaged at byte"),
    ("key_number", b"}\x8b\xff\0\0\0" + b"\x7f" * 255 + tensor() + b"s", "614 characters"),
    ("negative_count", mapping(a=tensor(count=-6)), "record of -24 bytes"),
    ("negative_stride", mapping(a=tensor(stride=(-3, 1))), "shape or stride"),
    ("record_climbs", mapping(a=tensor(key="../../x")), "not in the file"),
):
    add(f"torch_{name}", stored("m.pt", archive(body)), words)
add("torch_program", stored("m.pt", archive(mapping(a=tensor()), extra={"archive/code/x.py": b"1"})), "TorchScript")
add("torch_big_endian", stored("m.pt", archive(mapping(a=tensor()), extra={"archive/byteorder": b"big"})), "endian")


# msgpack and files that are mostly holes --------------------------------------------------------------------------

for name, data, words in (
    ("items", lambda: b"\x81\xa1a\xdd" + struct.pack(">I", 3_000_000) + b"\xc0" * 3_000_000, "more than 2000000 items"),
    ("deep", b"\x81\xa1a" + b"\x91" * 10**5 + b"\xc0", "nested"),
    ("deep_maps", b"\x81\xa1a" * 10**5 + b"\xc0", "nested"),
    ("long_text", b"\x81\xa1a\xdb\xff\xff\xff\xff", "4294967295 bytes"),
    ("float_key", b"\x81\xcb" + struct.pack(">d", 1.0) + b"\xc0", "neither text nor number"),
    ("true_is_one", b"\x82\x01\xc0\xc3\xc0", "repeated"),
    ("nil", b"\xc0", "no single msgpack dict"),
):
    add(f"msgpack_{name}", stored("m.msgpack", data), words)

SPARSE = 64 << 30
CLAIM = json.dumps({"w": {"dtype": "F32", "shape": [1 << 17, 1 << 17], "data_offsets": [0, SPARSE]}}).encode()
HEADS = {
    "m.safetensors": struct.pack("<Q", len(CLAIM)) + CLAIM,
    "m.npy": npy(GOOD.replace("2,", f"{1 << 34},"), b""),
    "m.npz": b"PK\3\4", "m.pt": b"PK\3\4", "m.h5": b"\x89HDF\r\n\x1a\n", "m.msgpack": b"\x81\xa1a",
}  # fmt: skip


def holes(name):
    def make(folder):
        (folder / name).write_bytes(HEADS[name])
        os.truncate(folder / name, len(HEADS[name]) + SPARSE)
        return folder / name

    return make


for name in HEADS:
    add(f"sparse_{name[2:]}", holes(name), "the rest are holes")
