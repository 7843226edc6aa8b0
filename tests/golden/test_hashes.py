"""Results to the bit, kept in the repository for each kind of machine: a change of them is one to be explained.

Bits depend on the compiler and on what it finds: versions of jaxlib and NumPy, instructions and number of cores. A
machine whose hashes are not there yet is told what they are, and how to add them.
"""

import hashlib
import json
import os
import pathlib
import platform

import jaxlib
import numpy as np
import pytest

import jaxsub
from tests.figures_log import record
from tests.folders import contents
from tests.programs import worlds

FILE = pathlib.Path(__file__).with_name("hashes.json")
UNHASHED = ("manifest.json",)  # it names versions


def machine():
    """What bits may depend on, as one line."""
    flags, known = "", pathlib.Path("/proc/cpuinfo")
    if known.exists():
        flags = next((line for line in known.read_text().splitlines() if line.startswith("flags")), "")
    best = next((name for name in ("avx512f", "avx2", "avx") if f" {name} " in f"{flags} "), "other")
    parts = (platform.system(), platform.machine(), best, f"{os.cpu_count()} cores")
    return ", ".join((*parts, f"jaxlib {jaxlib.__version__}", f"numpy {np.__version__}"))


def digest(value):
    return hashlib.sha256(value if isinstance(value, bytes) else json.dumps(value).encode()).hexdigest()[:16]


def found(folder):
    """name of a result -> the first 16 digits of its sha256."""
    stacks = {"w": worlds.families((9, 8), (12, 9), seed=1), "v": worlds.planted(17, (5, 3, 2), seed=2)}
    models = str(worlds.write(folder / "c", stacks))
    report = jaxsub.analyze(models, draws=3, splits=2)
    hashes = {f"analyze, {layer['name']}": digest(layer) for layer in report.layers}
    for method in ("gram", "randomized", "hosvd", "hooi"):
        jaxsub.fit(models, folder / method, decomposition=method, rank=3)
        files = {name: digest(data) for name, data in contents(folder / method).items() if name not in UNHASHED}
        hashes[f"fit, {method}"] = digest(sorted(files.items()))
    return hashes


@pytest.mark.slow
def test_results_are_those_that_are_kept(tmp_path):
    hashes, kept, here = found(tmp_path), json.loads(FILE.read_text()), machine()
    if os.environ.get("JAXSUB_KEEP_HASHES"):
        kept = {**kept, here: hashes}
        FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    if here not in kept:
        pytest.skip(f"no hashes of {here}: keep them with JAXSUB_KEEP_HASHES=1")
    changed = {name for name in {*hashes, *kept[here]} if hashes.get(name) != kept[here].get(name)}
    assert not changed, "results have other bits: say why in CHANGELOG.md, then keep them with JAXSUB_KEEP_HASHES=1"
    record("DET-4", "results alike to those kept for this machine", len(hashes))


def test_the_file_is_one():
    for hashes in json.loads(FILE.read_text()).values():
        assert {"fit, gram", "fit, hosvd"} < hashes.keys()
        assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes.values())
