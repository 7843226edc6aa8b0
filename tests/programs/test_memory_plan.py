"""The plan's bytes against the growth of resident memory that a fresh process measures around one analysis."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.figures_log import record
from tests.programs import resident

ROOT = pathlib.Path(__file__).resolve().parents[2]
RANK = 16
# layers, models, shape of a layer's weights, dtype
CASES = {
    "two axes sketched, float32 products": (1, 200, (1000, 1000), "float32"),
    "a wide axis sketched": (1, 100, (100, 6000), "float32"),
    "float64, its QR factor": (1, 60, (1000, 500), "float64"),
    "few long models, the axis' other side": (1, 8, (100000, 16), "float32"),
    "lora": (1, 200, (4096, 4096), "lora"),
    "convolution, all axes exact": (1, 40, (3, 3, 256, 256), "float32"),
    "bfloat16": (1, 64, (2048, 1024), "bfloat16"),
    "eight blocks": (1, 32, (4096, 2048), "float32"),
    "three models, smaller than their mixtures": (1, 3, (4096, 4096), "float32"),
    "figures of many models and layers": (3, 300, (64, 64), "float32"),
    "figures of few models and many layers": (12, 100, (64, 64), "float32"),
}


def write(folder, num_layers, num_models, shape, dtype):
    """Independent enough: each model begins elsewhere in the same random numbers."""
    from jaxsub import descriptors
    from jaxsub.formats import peft, safetensors

    size = RANK * sum(shape) if dtype == "lora" else int(np.prod(shape))
    stored = descriptors.numpy_dtype("float32" if dtype == "lora" else dtype)
    numbers = np.random.default_rng(0).standard_normal(size + 64 * num_layers * num_models, np.float32).astype(stored)
    folder.mkdir(parents=True)
    for n in range(num_models):
        rows = [numbers[64 * j : 64 * j + size] for j in range(n * num_layers, (n + 1) * num_layers)]
        if dtype == "lora":
            a, b = np.split(rows[0], [RANK * shape[1]])
            peft.write(str(folder / f"m{n}"), {"w": (a.reshape(RANK, -1), b.reshape(-1, RANK), 8, RANK)})
        else:
            layers = {f"w{i}": row.reshape(shape) for i, row in enumerate(rows)}
            safetensors.write(str(folder / f"m{n}.safetensors"), layers)


def child(folder, num_layers, num_models, shape, dtype, is_first=False):
    """Writes the collection, and prints what the plan says and what the analysis takes, in MiB."""
    import gc

    import jaxsub

    folder = pathlib.Path(folder)
    write(folder / "large", num_layers, num_models, tuple(shape), dtype)
    options = {"devices": 1, "splits": 4}
    if not is_first:
        write(folder / "small", num_layers, 12, (24, 18), dtype)
        jaxsub.analyze(str(folder / "small"), **options)
    opened = jaxsub.open_collection(str(folder / "large"))
    planned = re.search(r"peak host memory .*: ([\d.]+) MiB", jaxsub.analyze(opened, dry_run=True, **options))[1]
    gc.collect()
    grown = resident.grown(lambda: jaxsub.analyze(opened, **options))
    print(json.dumps([float(planned), grown / 2**20]))


@pytest.mark.slow
@resident.needs_high_water_mark
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_within_a_quarter_and_of_one_layer_never_a_tenth_short(tmp_path, name):
    case = CASES[name]
    # Figures of several layers at once overlap as threads happen to run: 105 to 148 MiB of three of 300 models.
    require_within(0.9 if case[0] == 1 else 0.8, tmp_path, name, *case)


FIRST = {name: CASES[name] for name in ("two axes sketched, float32 products", "lora", "bfloat16")}
FIRST["small lora"] = (1, 100, (1024, 1024), "lora")


@pytest.mark.slow
@resident.needs_high_water_mark
@pytest.mark.parametrize("name", FIRST)
def test_the_plan_is_within_a_quarter_where_all_is_compiled_for_the_first_time(tmp_path, name):
    require_within(0.8, tmp_path, f"{name}, first start", *FIRST[name], True)


def require_within(least, tmp_path, name, *case):
    """Records the ratio only where it is as it should be."""
    ratio = planned_over_measured(tmp_path, name, *case)
    assert least <= ratio <= 1.25
    record("BUDGET, plan", f"planned over measured, {name}", round(ratio, 3))


def planned_over_measured(tmp_path, name, *case):
    """In a fresh process that keeps no compiled kernels; `case` as `child` takes it."""
    environment = {n: v for n, v in os.environ.items() if n not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    script = f"from tests.programs import test_memory_plan as t; t.child({str(tmp_path)!r}, *{case!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
    finally:
        shutil.rmtree(tmp_path)  # a gigabyte
    assert done.returncode == 0, done.stderr
    planned, measured = json.loads(done.stdout)
    print(f"planned {planned:.0f} MiB, measured {measured:.0f} MiB, {planned / measured:.2f}")
    return planned / measured
