"""Hostile files beyond the corpus: the verdict, its words, the time, and that nothing but an InputError comes out."""

import os
import time

import numpy as np
import pytest

from jaxsub import errors, formats
from jaxsub.formats import _files, safetensors
from tests.figures_log import record
from tests.formats import hostile_files, lora_files

MAX_SECONDS = 10  # of the processor


SLOW = ("msgpack_items",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in hostile_files.CASES]
)
def test_verdict(name, tmp_path):
    make, words = hostile_files.CASES[name]
    path = make(tmp_path)
    start = time.process_time()
    if words is None:
        model = formats.open_model(path)
        assert all(said.isascii() and said.isprintable() for said in model.warnings)
    else:
        with pytest.raises(errors.InputError, match=words) as caught:
            formats.open_model(path)
        message = str(caught.value)
        assert message.startswith(str(tmp_path)) and message.isascii() and message.isprintable()
        assert caught.value.rule and caught.value.hint
    assert time.process_time() - start < MAX_SECONDS


def test_the_list_is_long():
    refused = sum(words is not None for _, words in hostile_files.CASES.values())
    record(
        "CORPUS", "further inputs of the same classes, of which to be refused", f"{len(hostile_files.CASES)}, {refused}"
    )
    assert refused > 140


def test_a_file_with_holes_and_weights_is_read(tmp_path):
    """A part of its size is stored: such files are what some copies make of zeros."""
    path = tmp_path / "m.bin"
    path.write_bytes(bytes(8 << 20))
    os.truncate(path, 5 << 28)
    assert _files.identify(path).size == 5 << 28


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", sorted(lora_files.DENSE))
def test_updates_beyond_float32_are_infinite_without_a_warning(tmp_path, family):
    parts, _ = lora_files.DENSE[family]()
    huge = {name: np.full_like(array, 3e38) for name, array in parts.items()}
    model = lora_files.opened(tmp_path, lora_files.stored(huge, alpha=3.0))
    assert not np.isfinite(formats.read(model, model.tensors[lora_files.STEM])).any()


def test_an_empty_array_that_no_array_can_be_is_refused_in_every_format(tmp_path):
    said = hostile_files.GOOD.replace("(2,)", f"(0, {2**40}, {2**40})")
    (tmp_path / "m.npz").write_bytes(hostile_files.zipped(("e.npy", hostile_files.npy(said, b""))))
    with pytest.raises(errors.InputError, match="impossible shape") as caught:
        formats.open_model(tmp_path / "m.npz")
    assert caught.value.key == "e"
    safetensors.write(tmp_path / "m.safetensors", {"e": np.empty((0, 4096, 4096), np.float32)})
    model = formats.open_model(tmp_path / "m.safetensors")
    assert formats.read(model, model.tensors["e"]).shape == (0, 4096, 4096)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 700_001])
def test_blocks_are_the_tensor(tmp_path, size):
    values = np.arange(size, dtype=np.float32)
    safetensors.write(tmp_path / "m.safetensors", {"w": values})
    model = formats.open_model(tmp_path / "m.safetensors")
    blocks = list(formats.blocks(model, model.tensors["w"]))
    assert all(b.nbytes <= 1 << 20 for b in blocks)
    np.testing.assert_array_equal(np.concatenate([*blocks, np.empty(0, np.float32)]), values)
