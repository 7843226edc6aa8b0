"""Damaged safetensors files against the reference library: never more lenient, equal where both accept."""

import json
import struct

import numpy as np
import pytest

from jaxsub import errors, formats
from tests.figures_log import record

SEED = 20
DEFAULT, NIGHTLY = 4000, 200_000  # mutants
BASE = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "I16", "shape": [3], "data_offsets": [16, 22]},
    "c": {"dtype": "F64", "shape": [], "data_offsets": [22, 30]},
    "d": {"dtype": "F32", "shape": [0, 4], "data_offsets": [30, 30]},
}
VALUES = [
    0,
    1,
    -1,
    2,
    16,
    22,
    30,
    31,
    2**31,
    2**48,
    2**63,
    2**64,
    1.0,
    1e300,
    True,
    None,
    "F32",
    "F16",
    "I16",
    "",
    [],
    {},
    [0, 16],
]


def mutate_tree(rng, tree):
    """One change of the header's structure: a value, a field, a key, a repeated entry, the order."""
    tree = json.loads(json.dumps(tree))
    entry = tree[str(rng.choice(list("abcd")))]
    if not all(isinstance(entry.get(field), list) and entry[field] for field in ("shape", "data_offsets")):
        return tree  # changed before
    kind = rng.integers(6)
    value = VALUES[rng.integers(len(VALUES))]
    if kind == 0:
        entry[str(rng.choice(["dtype", "shape", "data_offsets"]))] = value
    elif kind == 1:
        entry["shape"][rng.integers(len(entry["shape"]))] = value
    elif kind == 2:
        entry["data_offsets"][rng.integers(len(entry["data_offsets"]))] = value
    elif kind == 3:
        entry["shape"].append(value)
    elif kind == 4:
        del entry[str(rng.choice(list(entry)))]
    else:
        entry["shape"].reverse()
    return tree


def mutant(rng):
    """The bytes of a damaged file: by structure, by bytes, or by length."""
    tree, kind = BASE, rng.integers(4)
    for _ in range(rng.integers(1, 3) if kind else 0):
        tree = mutate_tree(rng, tree)
    text = bytearray(json.dumps(tree).encode())
    if kind == 0:
        for _ in range(rng.integers(1, 3)):
            text[rng.integers(len(text))] = rng.choice(list(b'0123456789{}[]",:. \\abFI-\x00\xff'))
    if kind == 1:
        text += b" " * rng.integers(0, 9)
    length = len(text) + (rng.integers(-2, 3) if rng.random() < 0.05 else 0)
    data = np.arange(30, dtype=np.uint8).tobytes()
    data = data[: rng.integers(28, 31)] if rng.random() < 0.05 else data + bytes(rng.random() < 0.05)
    return struct.pack("<Q", length) + bytes(text) + data


def ours(path):
    try:
        model = formats.open_model(path)
    except errors.InputError as error:
        assert str(path) in str(error)
        return None
    return {name: formats.read(model, tensor) for name, tensor in model.tensors.items()}


def theirs(load_file, path):
    try:
        return load_file(path)
    except Exception:  # the library raises its own error, and several others
        return None


def judge(tmp_path, seed, count):
    """(accepted by both, refused, refused by us alone) of `count` mutants; fails where we are the more lenient."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    rng = np.random.default_rng(seed)
    path = tmp_path / "m.safetensors"
    both = refused = stricter = 0
    for _ in range(count):
        path.write_bytes(mutant(rng))
        found, truth = ours(path), theirs(load_file, path)
        if found is None:
            refused += 1
            stricter += truth is not None
            continue
        assert truth is not None, path.read_bytes()
        assert found.keys() == truth.keys()
        for name, array in truth.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes()
        both += 1
    record(
        "FUZZ", f"of {count} mutants (seed {seed}) accepted by both, refused, by us alone", [both, refused, stricter]
    )
    return both, refused, stricter


@pytest.mark.parametrize(
    ("seed", "count"), [(SEED, DEFAULT), pytest.param(SEED + 1, NIGHTLY, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_mutants_are_judged_at_least_as_strictly_as_by_the_reference(tmp_path, seed, count):
    both, refused, stricter = judge(tmp_path, seed, count)
    # The comparison says something only if both verdicts occur, and strictness stays the exception.
    assert both >= count // 30 and refused >= count // 3 and stricter <= count // 50
