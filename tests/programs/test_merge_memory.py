"""Peak memory of a merge beside its plan, measured in a process of its own."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxsub.formats import safetensors

CODE = """
import glob, pathlib, sys
from jaxsub import hostmemory
from jaxsub.pipelines import merge, merge_plan, plan
folder, method, *options = sys.argv[1:]
base = '' if method == 'mean' else glob.glob(folder + '/base.*')[0]
models, out = (folder + '/models',), folder + '/' + '-'.join((method, *options))
config = merge.Config(collection=models, method=method, options=tuple(options), base=base, out=out)
plans, peak = [], merge_plan.peak
merge_plan.peak = lambda found: plans.append(peak(found)) or plans[-1]
before = hostmemory.resident()
pathlib.Path('/proc/self/clear_refs').write_text('5')
merge.run(config)
print(plan.peak_resident() - before, max(plans))
"""


# Layers, their shapes, and models.
KINDS = {
    "blocks": (2, (2048, 2048), 6), "matrices": (2, (896, 896), 6), "wide": (1, (768, 24576), 2),
    "large": (1, (4096, 4096), 6), "eight": (1, (4096, 4096), 8), "npz": (1, (768, 24576), 2),
    "many": (1, (640, 512), 300),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> folder of models of one start, made when it is asked for, and the last one alone: they are large."""
    there = {}

    def make(kind):
        if kind not in there:
            for old in there.values():
                shutil.rmtree(old)
            there.clear()
            there[kind] = write(tmp_path_factory.mktemp(kind), kind)
        return there[kind]

    return make


def write(place, kind):
    layers, shape, count = KINDS[kind]
    (place / "models").mkdir()

    def save(path, arrays):
        if kind == "npz":
            np.savez(path.with_suffix(".npz"), **arrays)
        else:
            safetensors.write(path.with_suffix(".safetensors"), arrays)

    start = {f"layers.{n}.weight": np.random.default_rng(n).standard_normal(shape, np.float32) for n in range(layers)}
    save(place / "base", start)
    for n in range(count):
        rng = np.random.default_rng([1, n])
        own = {k: v + np.float32(0.05) * rng.standard_normal(shape, np.float32) for k, v in start.items()}
        save(place / "models" / f"m{n}", own)
    return place


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are reset through /proc")
@pytest.mark.parametrize(
    ("kind", "method"),
    [("many", m) for m in ("mean", "task_arithmetic")]
    + [("blocks", m) for m in ("mean", "ties", "dare_ties", "pcb", "spherical")]
    + [("matrices", m) for m in ("tsv", "iso_c", "iso_cts", "knots_ties", "subspace_ties", "wudi")]
    + [
        ("large", m)
        for m in ("mean", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "magnitude")
    ]
    + [(kind, m) for kind in ("wide", "npz") for m in ("iso_c", "tsv", "knots_ties")]
    + [("large", m) for m in ("pcb", "spherical", "model_stock")]
    + [("eight", m) for m in ("iso_c", "tsv", "iso_cts", "subspace_ties", "subspace_rescaled")]
    + [("eight", m) for m in ("knots_ties", "knots_dare")]
    + [("eight", "wudi steps=3"), ("eight", "wudi solver=exact")],
)
def test_a_merge_stays_within_its_plan(made, kind, method):
    command = [sys.executable, "-c", CODE, str(made(kind)), *method.split()]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    peak, planned = map(int, found)
    _, (height, width), count = KINDS[kind]
    layer = 4 * height * width
    print(f"{method}: {peak / layer:.1f} layers of {layer / 2**20:.1f} MiB, planned {planned / layer:.1f}")
    assert 0 < peak <= planned
    if kind in ("large", "eight") or (kind != "many" and method in ("mean", "ties")):
        assert peak < (count + 3) * layer
