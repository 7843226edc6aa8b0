"""Peak memory of a merge beside its plan, measured in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest

from jaxsub.formats import safetensors

CODE = """
import pathlib, sys
from jaxsub import hostmemory
from jaxsub.pipelines import merge, merge_plan, plan
folder, method = sys.argv[1:]
base = '' if method == 'mean' else folder + '/base.safetensors'
config = merge.Config(collection=(folder + '/models',), method=method, base=base, out=folder + '/' + method)
plans, peak = [], merge_plan.peak
merge_plan.peak = lambda found: plans.append(peak(found)) or plans[-1]
before = hostmemory.resident()
pathlib.Path('/proc/self/clear_refs').write_text('5')
merge.run(config)
print(plan.peak_resident() - before, max(plans))
"""


COUNT = 6
SIDES = {"blocks": (2, 2048), "matrices": (2, 896), "large": (1, 4096)}  # layers and their sides


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of one start: two layers of a few blocks each, of matrices that are quickly decomposed, or a large one."""
    place = tmp_path_factory.mktemp("merge_memory")
    for kind, (layers, side) in SIDES.items():
        (place / kind / "models").mkdir(parents=True)
        shape = side, side
        start = {
            f"layers.{n}.weight": np.random.default_rng(n).standard_normal(shape, np.float32) for n in range(layers)
        }
        safetensors.write(place / kind / "base.safetensors", start)
        for n in range(COUNT):
            rng = np.random.default_rng([1, n])
            own = {k: v + np.float32(0.05) * rng.standard_normal(shape, np.float32) for k, v in start.items()}
            safetensors.write(place / kind / "models" / f"m{n}.safetensors", own)
    return place


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are reset through /proc")
@pytest.mark.parametrize(
    ("kind", "method"),
    [("blocks", m) for m in ("mean", "ties", "dare_ties", "pcb", "spherical")]
    + [("matrices", m) for m in ("tsv", "iso_c", "iso_cts", "knots_ties", "subspace_ties", "wudi")]
    + [
        ("large", m)
        for m in ("mean", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "magnitude")
    ]
    + [("large", m) for m in ("pcb", "spherical", "model_stock")],
)
def test_a_merge_stays_within_its_plan(folder, kind, method):
    command = [sys.executable, "-c", CODE, str(folder / kind), method]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    peak, planned = map(int, found)
    layer = 4 * SIDES[kind][1] ** 2
    print(f"{method}: {peak / layer:.1f} layers of {layer / 2**20:.1f} MiB, planned {planned / layer:.1f}")
    assert 0 < peak <= planned
    if kind == "large" or method in ("mean", "ties"):
        assert peak < (COUNT + 3) * layer
