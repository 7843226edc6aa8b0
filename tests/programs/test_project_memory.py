"""Peak memory of `project` and `update` beside their plans, each in a process of its own."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import jaxsub
from jaxsub import errors
from jaxsub.formats import peft, safetensors
from jaxsub.pipelines import project, update
from tests.figures_log import record

CODE = """
import pathlib, sys
from jaxsub import hostmemory
from jaxsub.pipelines import plan, project, project_plan, update
what, bundle, new, out = sys.argv[1:]
text, start = project_plan.text, []
def at_the_start(planned, groups):  # the bundle has been read by then
    start.extend([hostmemory.resident(), max(num_bytes for _, num_bytes in planned)])
    pathlib.Path('/proc/self/clear_refs').write_text('5')
    return text(planned, groups)
project_plan.text = at_the_start
if what == 'project':
    project.run(project.Config(bundle, (new,)), out, stream=sys.stderr)
else:
    update.run(update.Config(bundle, (new,), captured=1.0), out + '/b', stream=sys.stderr)
print(plan.peak_resident() - start[0], start[1])
"""
# models of the bundle and new ones, shape, dtype, decomposition, rank
KINDS = {
    "rows": (32, 64, (512, 1024), "float32", "gram", 8),
    "large rows": (32, 100, (1024, 2048), "float32", "gram", 16),
    "many rows": (16, 200, (512, 1024), "float32", "gram", 8),
    "rows, bfloat16": (32, 64, (512, 1024), "bfloat16", "gram", 8),
    "rows, float64": (16, 40, (1024, 512), "float64", "gram", 8),
    "hosvd": (48, 64, (512, 1024), "float32", "hosvd", 32),
    "large sthosvd": (24, 48, (1024, 2048), "float32", "sthosvd", 64),
    "hosvd, float64": (24, 24, (512, 512), "float64", "hosvd", 32),
    "low-rank updates": (64, 128, (2048, 2048), "lora", "hooi", 8),
    "low-rank updates, hosvd": (64, 128, (2048, 2048), "lora", "hosvd", 8),
}


def write(folder, kind, count, seed):
    """Models of 6 common directions and noise, or unrelated updates of rank 16."""
    *_, shape, dtype, _, _ = KINDS[kind]
    os.makedirs(folder)
    base = None if dtype == "lora" else np.random.default_rng(0).standard_normal((6, *shape), np.float32)
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        if dtype == "lora":
            a, b = (rng.standard_normal(s, np.float32) for s in ((16, shape[1]), (shape[0], 16)))
            peft.write(folder / f"{seed}_{n}", {"layer.q": (a, b, 16.0, 16)})
            continue
        w = np.tensordot(rng.standard_normal(6, np.float32), base, 1) + rng.standard_normal(shape, np.float32) / 2
        stored = w.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        safetensors.write(folder / f"{seed}_{n}.safetensors", {"w": stored})


def run(*arguments):
    """The output of Python in a process of its own, with one device."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (bundle, folder of new models)."""
    there = {}

    def make(kind):
        if kind not in there:
            place, (old, new, *_, decomposition, rank) = tmp_path_factory.mktemp("kind"), KINDS[kind]
            write(place / "old", kind, old, 1)
            write(place / "new", kind, new, 2)
            options = [f"--config.{name}={value}" for name, value in (("rank", rank), ("decomposition", decomposition))]
            run("-m", "jaxsub", "fit", f"--collection={place / 'old'}", f"--workdir={place}", *options)
            there[kind] = place / "bundle", place / "new"
        return there[kind]

    return make


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are reset through /proc")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["project", "update"])
def test_a_projection_stays_near_its_plan(made, what, kind, tmp_path):
    peak, planned = map(int, run("-c", CODE, what, *made(kind), tmp_path).split()[-2:])
    print(f"{what} {kind}: {peak / 2**20:.0f} MiB, planned {planned / peak:.2f} of it")
    assert 0.75 < planned / peak < 1.35
    record("BUDGET, plan", f"plan of {what} over the peak, {kind}", round(planned / peak, 2))


@pytest.mark.parametrize("program", [project, update])
def test_what_memory_does_not_hold_is_refused_before_it_is_read(program, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "tiny", (5, 4, (8, 6), "float32", "gram", 2))
    for folder, count, seed in (("old", 5, 1), ("new", 4, 2)):
        write(tmp_path / folder, "tiny", count, seed)
    jaxsub.fit(str(tmp_path / "old"), tmp_path / "b", rank=2)
    monkeypatch.setattr("jaxsub.bundle.read", None)
    config = program.Config(str(tmp_path / "b"), (str(tmp_path / "new"),), max_host_bytes=2**20)
    with pytest.raises(errors.ResourceError, match="layer w needs .* 1.0 MiB are allowed.*fewer models at a time"):
        program.run(config, str(tmp_path / "out"))
    with pytest.raises(errors.ConfigError, match="at least 0"):
        program.run(program.Config(str(tmp_path / "b"), (str(tmp_path / "new"),), max_host_bytes=-1), None)
    assert not os.path.exists(tmp_path / "out")
