"""Scripts that measure run from end to end, on little."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

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
