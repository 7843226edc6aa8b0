"""The script for machines with an accelerator, rehearsed without one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rehearse(folder, *arguments):
    """(exit status, check.json) of a run on the CPU."""
    environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PATH), f"--out={folder}", f"--folder={folder}", "--quick", *arguments]
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    return code, json.loads((folder / "check.json").read_text())


def test_differences_up_to_the_floor_do_not_count(script):
    a = np.array([10.0, 5.0, 1e-3])
    assert script.difference(a, a + [0, 0, 9e-4], floor=1e-2) == 0
    assert script.difference(a, a + [0, 0.03, 0], floor=1e-2) == pytest.approx(2e-3)


@pytest.mark.slow
def test_a_collection_is_made_and_its_truth_found(tmp_path):
    code, found = rehearse(tmp_path, "--steps=stream", "--gib=.02")
    assert code == 0 and found["stream"]["result"] == "passed" and found["machine"]["platform"] == "cpu"
    assert found["stream"]["gib"] == pytest.approx(0.02, rel=0.1)
    assert sorted(os.listdir(tmp_path)) == ["check.json", "stream.log"]


@pytest.mark.slow
def test_a_step_that_fails_says_why_and_the_next_one_runs(tmp_path):
    code, found = rehearse(tmp_path, "--steps=stream,mesh", "--gib=1e6")
    assert code == 1 and "are free" in found["stream"]["result"] and found["mesh"]["result"] == "passed"
