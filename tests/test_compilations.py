"""Kernels are compiled once a shape, not once a layer."""

import re

import pytest

import jaxsub
from jaxsub.linalg import gram, modes
from tests.programs import processes, worlds


def test_layers_of_one_shape_share_their_executables(tmp_path):
    stacks = {f"layer.{n}.weight": worlds.noise(9, (12, 10), seed=n) for n in range(6)}
    stacks |= {f"layer.{n}.bias": worlds.noise(9, (12,), seed=50 + n) for n in range(6)}
    folder = worlds.write(tmp_path / "c", stacks)
    before = gram._dense_gram._cache_size(), modes.mode_gram._cache_size()
    jaxsub.analyze(str(folder), draws=2, splits=2)
    after = gram._dense_gram._cache_size(), modes.mode_gram._cache_size()
    assert after[0] - before[0] <= 2 and after[1] - before[1] <= 2


COUNT = """
import atexit, collections, sys
from jaxsub.cli import _run
seen, keep = collections.Counter(), _run.keep_compiled_kernels
def kept():
    keep()  # jax reads the environment when it is imported
    from jax import monitoring
    monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
    atexit.register(lambda: sys.stderr.write(f"misses {seen['cache_misses']} hits {seen['cache_hits']}\\n"))
_run.keep_compiled_kernels = kept
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["analyze", "fit"])
def test_a_second_start_compiles_nothing(tmp_path, monkeypatch, program):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = worlds.write(tmp_path / "c", {"w": worlds.planted(12), "v": worlds.noise(12, (5, 7, 3))})
    found = []
    for again in ("first", "second"):
        given = [program, f"--collection={folder}", f"--workdir={tmp_path / again}"]
        (ended,) = processes.run(1, *given, before={0: COUNT})
        assert ended.code == 0, ended.stderr
        found.append([int(n) for n in re.findall(r"misses (\d+) hits (\d+)", ended.stderr)[-1]])
    (compiled, _), (again, loaded) = found
    assert compiled > 10 and again == 0 and loaded >= compiled
