"""`jaxsub inspect`: the page and inspect.json describe what the files hold."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.formats import safetensors
from jaxsub.pipelines import inspect
from tests.programs.test_cli import ROOT


def look(folder, workdir=None, **options):
    """(record, page) of a collection."""
    pages = []
    found = inspect.run(inspect.Config(collection=(str(folder),), **options), workdir, write=pages.append)
    return found, pages[0]


def adapter(folder, rank, alpha):
    folder.mkdir(parents=True)
    name = "base_model.model.layers.0.q_proj.lora_{}.weight"
    factors = {name.format("A"): np.ones((rank, 6), np.float32), name.format("B"): np.ones((8, rank), np.float32)}
    safetensors.write(folder / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_counts_bytes_shapes_and_dtypes(tmp_path):
    for i in range(4):
        layers = {"a": np.ones((5, 3), np.float16), "b": np.ones((5, 3), np.float32), "c": np.ones(7, np.float32)}
        safetensors.write(tmp_path / f"m{i}.safetensors", layers)
    found, page = look(tmp_path, tmp_path / "out")
    assert found["num_bytes"] == 4 * (15 * 2 + 15 * 4 + 7 * 4)
    assert found["formats"] == {"safetensors": 4} and [m["id"] for m in found["models"]] == ["m0", "m1", "m2", "m3"]
    assert [(x["name"], x["shape"], x["dtypes"]) for x in found["layers"]] == [
        ("a", [5, 3], ["float16"]),
        ("b", [5, 3], ["float32"]),
        ("c", [7], ["float32"]),
    ]
    assert found["equal_shapes"][0] == {"shape": [5, 3], "parametrisation": "dense", "num_layers": 2}
    assert page.startswith("4 models (4 safetensors), 3 layers, 37 weights in all layers, 472 B to read\n")
    assert "layers of equal shape: 2 of 5x3, 1 of 7" in page
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == found


def test_ranks_and_scales_of_adapters(tmp_path):
    for i, (rank, alpha) in enumerate([(2, 4), (2, 4), (4, 4), (2, 2)]):
        adapter(tmp_path / f"m{i}", rank, alpha)
    found, page = look(tmp_path)
    (layer,) = found["layers"]
    assert (layer["parametrisation"], layer["shape"], layer["num_models"]) == ("lora", [8, 6], 4)
    assert layer["ranks"] == {"2": 3, "4": 1} and layer["scales"] == {"1": 2, "2": 2}
    assert layer["num_bytes"] == 4 * (2 * 3 + 4) * (6 + 8)
    assert "LoRA r=2..4 scale=1..2" in page


def test_problems_are_on_the_page(tmp_path):
    for i in range(8):
        safetensors.write(tmp_path / f"m{i}.safetensors", {"w": np.ones((2, 3), np.float32), "n": np.ones(2, np.int32)})
    safetensors.write(tmp_path / "m8.safetensors", {"w": np.ones((3, 2), np.float32), "n": np.ones(2, np.int32)})
    (tmp_path / "notes.md").write_text("notes")
    found, page = look(tmp_path)
    assert [q["id"] for q in found["quarantined"]] == ["m8"] and "8 models (8 safetensors) of 9 found" in page
    text = " ".join(page.split())
    for part in (
        "set aside: m8: ",
        "has shape [3, 2], the 8 others have shape [2, 3]",
        "not a weight: int32: n 2 (8 models)",
    ):
        assert part in text
    assert "notes.md" in page


def test_run_numbered_names_are_explained_not_refused(tmp_path):
    for i in range(4):
        safetensors.write(tmp_path / f"m{i}.safetensors", {f"dense_{i}/kernel": np.ones((2, 3), np.float32)})
    found, page = look(tmp_path)
    assert not found["layers"] and "--match=order" in page and "would refuse" in page
    assert [x["num_models"] for x in look(tmp_path, match="order")[0]["layers"]] == [4]


def test_refused_collection_is_described_first(tmp_path):
    for i in range(4):
        safetensors.write(tmp_path / f"m{i}.safetensors", {"w": np.ones((2, 3), np.float32)})
    for i in range(2):
        (tmp_path / f"x{i}.safetensors").write_bytes(b"no")
    pages = []
    config = inspect.Config(collection=(str(tmp_path),))
    with pytest.raises(errors.InputError, match="2 of 6 models"):
        inspect.run(config, write=pages.append)
    assert "4 models (4 safetensors) of 6 found" in pages[0] and "x1: " in pages[0]
    assert len(look(tmp_path, max_quarantined=2)[0]["quarantined"]) == 2


def test_models_set_aside_are_listed_once(tmp_path):
    for i in range(4):
        safetensors.write(tmp_path / f"m{i}.safetensors", {"w": np.ones((2, 3), np.float32)})
    for i in range(2):
        (tmp_path / f"x{i}.safetensors").write_bytes(b"no")
    command = [sys.executable, "-m", "jaxsub", "inspect", f"--collection={tmp_path}"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert found.returncode == 4 and found.stderr.count("\n") == 1
    assert (found.stdout + found.stderr).count("x0: ") == 1 and "  x0: " in found.stdout
    assert found.stderr.endswith("repair or remove them, or allow it with --max_quarantined=2\n")
    with pytest.raises(errors.InputError, match="x0: "):  # without a page, the error is all there is
        inspect.run(inspect.Config(collection=(str(tmp_path),)))


def test_page_fits_100_columns_and_holds_no_hostile_character(tmp_path):
    names = ["x" * 300 + str(i) for i in range(3)] + ["<script>alert(1)</script>", "\u00fc.weight"]
    for i in range(3):
        layers = {n: np.ones((2, 3), np.float32) for n in names}
        safetensors.write(tmp_path / f"m{i}\x1b[2J\n.safetensors", layers)
    (tmp_path / "bad\x1b[31m.safetensors").write_bytes(b"no")
    _, page = look(tmp_path)
    assert page.isascii() and page.replace("\n", "").isprintable()
    assert max(map(len, page.splitlines())) <= 100 and len(page.splitlines()) < 40


def test_command_prints_the_page(tmp_path):
    for i in range(3):
        safetensors.write(tmp_path / f"m{i}.safetensors", {"w": np.ones((2, 3), np.float32)})
    command = [sys.executable, "-m", "jaxsub", "inspect", f"--collection={tmp_path}"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (found.returncode, found.stderr, found.stdout) == (0, "", look(tmp_path)[1])
