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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six models of one start: two large layers that blocks are made of, or a smaller matrix."""
    place = tmp_path_factory.mktemp("merge_memory")
    for kind, shape in (("blocks", (2048, 2048)), ("matrices", (896, 896))):
        (place / kind / "models").mkdir(parents=True)
        start = {f"layers.{n}.weight": np.random.default_rng(n).standard_normal(shape, np.float32) for n in range(2)}
        safetensors.write(place / kind / "base.safetensors", start)
        for n in range(6):
            rng = np.random.default_rng([1, n])
            own = {k: v + np.float32(0.05) * rng.standard_normal(shape, np.float32) for k, v in start.items()}
            safetensors.write(place / kind / "models" / f"m{n}.safetensors", own)
    return place


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are reset through /proc")
@pytest.mark.parametrize(
    ("kind", "method"),
    [("blocks", m) for m in ("mean", "ties", "dare_ties", "pcb", "spherical")]
    + [("matrices", m) for m in ("tsv", "iso_c", "iso_cts", "knots_ties", "subspace_ties", "wudi")],
)
def test_a_merge_stays_within_its_plan(folder, kind, method):
    command = [sys.executable, "-c", CODE, str(folder / kind), method]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    peak, planned = map(int, found)
    assert 0 < peak <= planned
    if method in ("mean", "ties"):
        assert peak < (6 + 3) * 2048 * 2048 * 4
