"""Scripts that measure run from end to end, on little."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxsub import formats
from tests.figures_log import record
from tests.programs import worlds

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.slow
def test_the_start_is_timed(tmp_path):
    folder = worlds.write(tmp_path / "c", {"w": np.random.default_rng(0).standard_normal((6, 5, 4), np.float32)})
    command = [sys.executable, str(SCRIPTS / "bench_start.py"), f"--collection={folder}", "--rounds=1"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "first header", "first weights, samples that tell copies", "first weights of the pass"
    ]  # fmt: skip


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("parser", ["safetensors", "torch", "numpy", "msgpack"])
def test_parsers_begin_to_be_fuzzed_at_good_files(tmp_path, parser):
    fuzz = load("fuzz_parsers")
    data = fuzz.seed(parser)
    path = tmp_path / fuzz.NAMES[parser]
    path.write_bytes(fuzz.archive(data) if parser == "torch" else data)
    model = formats.open_model(path)
    assert any(np.array_equal(formats.read(model, t), fuzz.ARRAY) for t in model.tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("parser", ["safetensors", "torch", "numpy", "msgpack"])
def test_parsers_under_a_fuzzer(tmp_path, parser):
    pytest.importorskip("atheris")
    seconds = int(os.environ.get("JAXSUB_FUZZ_SECONDS", "20"))
    status, tried = load("fuzz_parsers").run(parser, str(tmp_path / "corpus"), seconds)
    assert status == 0 and tried > 1000
    record("FUZZ", f"inputs tried by coverage, {parser}: seconds, inputs, stops", [seconds, tried, 0])
