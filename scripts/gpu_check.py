"""Everything worth knowing on a machine with an accelerator, in one command: checks first, then figures.

    python scripts/gpu_check.py --out=FOLDER                              # all steps, 64 GiB of models in shared memory
    python scripts/gpu_check.py --out=FOLDER --steps=alike,stream --gib=16
    JAX_PLATFORMS=cpu python scripts/gpu_check.py --out=FOLDER --gib=.05 --quick          # a rehearsal without one

Steps, each with a time of its own after which it is ended and the next begins:

alike    analyses and fits of a small collection on the accelerator and on the CPU: verdicts equal, singular values
         within the floor and 1e-5 of the largest
mesh     tests of kernels, meshes and what is sent, on as many devices as there are; those that want more are skipped
bench    `jaxsub bench`: every kernel beside the model of its cost; --peers adds the libraries that are installed
stream   a synthetic collection, half of its layers with a shared subspace: verdicts as made, GB/s, where the time went,
         memory taken; the plan stands in the log

FOLDER holds check.json (a record a step), bench.json and the log of each step. Exits with 1 if a step failed. The
collection is written to --folder, /dev/shm by default, and removed.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TESTS = (
    "tests/linalg/test_products.py", "tests/linalg/test_gram.py", "tests/linalg/test_pairs.py",
    "tests/linalg/test_collectives.py", "tests/linalg/test_dealt.py", "tests/linalg/test_orth.py",
    "tests/linalg/test_svd.py", "tests/linalg/test_tucker.py", "tests/test_sharded_projection.py",
    "tests/test_lora_modes.py",
)  # fmt: skip
MODELS, SHARED = 64, 4  # models of the synthetic collection, and directions that half of its layers share
FITS = (("gram", "--rank=4"), ("randomized", "--rank=4"), ("hosvd", "--energy=.9"), ("hooi", "--rank=4"))
SECONDS = {"alike": 180, "mesh": 240, "bench": 200, "stream": 240}


class Failed(Exception):
    """A step found something wrong; the text says what."""


class Box:
    """Where a step runs its commands and what it finds."""

    def __init__(self, name, given):
        self.name, self.given, self.found = name, given, {}
        self.log, self.end = os.path.join(given.out, f"{name}.log"), time.monotonic() + given.seconds[name]

    def run(self, *command, **environment):
        """Runs a command; its output is added to the step's log. Raises Failed, also when the step's time is over."""
        paths = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            try:
                code = subprocess.run(
                    [sys.executable, "-m", *command],
                    env={**os.environ, "PYTHONPATH": paths, **environment},
                    stdout=log, stderr=log, cwd=ROOT, timeout=max(1, self.end - time.monotonic()), check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise Failed(f"not done after {self.given.seconds[self.name]} s: {self.log}") from error
        if code:
            raise Failed(f"{' '.join(command[:3])} ended with {code}: {self.log}")


def synthetic(folder, num_bytes, num_layers):
    """Models of square float32 layers; the first half of these, rounded up, share SHARED directions beside noise."""
    from jaxsub.formats import safetensors

    side = max(32, int(math.sqrt(num_bytes / 4 / MODELS / num_layers)))
    common = np.random.default_rng(0).standard_normal((SHARED, side, side), dtype=np.float32)

    def one(n):
        rng, tensors = np.random.default_rng([1, n]), {}
        for layer in range(num_layers):
            w = rng.standard_normal((side, side), dtype=np.float32)
            if 2 * layer < num_layers:
                for c, direction in zip(rng.standard_normal(SHARED, dtype=np.float32), common, strict=True):
                    w += c * np.roll(direction, layer)
            tensors[f"layer{layer:02d}"] = w
        safetensors.write(os.path.join(folder, f"m{n:03d}.safetensors"), tensors, None)

    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(one, range(MODELS)))
    return {f"layer{n:02d}": 2 * n < num_layers for n in range(num_layers)}


def report_of(folder):
    with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
        return json.load(file)


def alike(box):
    """Analyses and fits on both backends, compared."""
    with tempfile.TemporaryDirectory() as folder:
        models = os.path.join(folder, "models")
        os.makedirs(models)
        synthetic(models, 2**26 if not box.given.quick else 2**21, 4)
        worst = 0.0
        for where, environment in (("here", {}), ("cpu", {"JAX_PLATFORMS": "cpu"})):
            box.run("jaxsub", "analyze", f"--collection={models}", f"--workdir={folder}/{where}", **environment)
        here, cpu = (report_of(f"{folder}/{where}")["layers"] for where in ("here", "cpu"))
        for a, b in zip(here, cpu, strict=True):
            if a["verdict"] != b["verdict"]:
                raise Failed(f"{a['name']}: {a['verdict']} here, {b['verdict']} on the CPU")
            worst = max(worst, difference(a["singular_values"], b["singular_values"], max(a["floor"], b["floor"])))
        box.found["singular_values"] = worst
        for name, rule in FITS:
            for where, environment in (("here", {}), ("cpu", {"JAX_PLATFORMS": "cpu"})):
                of = "jaxsub", "fit", f"--collection={models}", f"--decomposition={name}", rule
                box.run(*of, f"--workdir={folder}/{where}-{name}", **environment)
            errors = [errors_of(f"{folder}/{where}-{name}") for where in ("here", "cpu")]
            box.found[name] = float(np.abs(np.subtract(*errors)).max())
            if box.found[name] > 1e-4:
                raise Failed(f"{name}: relative errors of models differ by {box.found[name]:.1e}")
    if worst > 1e-5:
        raise Failed(f"singular values differ by {worst:.1e} of the largest")


def difference(a, b, floor):
    """Largest difference of singular values over the floor, relative to the largest."""
    a, b = np.asarray(a), np.asarray(b)
    over = np.maximum(a, b) > floor
    return float((np.abs(a - b) - floor)[over].max(initial=0.0) / max(a.max(initial=0.0), 1e-300))


def errors_of(folder):
    """Mean, largest and held-out error of each layer of a fit."""
    with open(os.path.join(folder, "bundle", "manifest.json"), encoding="utf-8") as file:
        layers = json.load(file)["layers"]
    return [[layer["figures"][name] for name in ("error_mean", "error_max", "held_out")] for layer in layers]


def mesh(box):
    """The tests that are about devices."""
    tests = TESTS[:1] if box.given.quick else TESTS
    box.run("pytest", "-q", "-p", "no:cacheprovider", *tests)
    with open(box.log, encoding="utf-8") as log:
        box.found["tests"] = log.read().strip().splitlines()[-1]


def bench(box):
    """`jaxsub bench`, its record kept."""
    more = [*(["--quick"] if box.given.quick else []), *(["--peers"] if box.given.peers else [])]
    box.run("jaxsub", "bench", "--rounds=3", f"--workdir={box.given.out}", *more)
    box.found["record"] = os.path.join(box.given.out, "bench.json")


def stream(box):
    """A large collection read once."""
    num_bytes, layers = int(box.given.gib * 2**30), max(2, round(box.given.gib / 4))
    with tempfile.TemporaryDirectory(dir=box.given.folder) as folder:
        models, place = os.path.join(folder, "models"), os.path.join(folder, "out")
        os.makedirs(models)
        if shutil.disk_usage(models).free < 1.05 * num_bytes:
            raise Failed(f"{models}: less than {box.given.gib} GiB are free; give --folder or a smaller --gib")
        begun = time.monotonic()
        made = synthetic(models, num_bytes, layers)
        box.end += (written := time.monotonic() - begun)
        begun = time.monotonic()
        box.run("jaxsub", "analyze", f"--collection={models}", f"--workdir={place}")
        seconds, report = time.monotonic() - begun, report_of(place)
    told = report["provenance"]
    box.found |= {
        "gib": told["bytes_read"] / 2**30,
        "written_seconds": written,
        "wall_seconds": seconds,
        "gb_per_second": told["bytes_read"] / 1e9 / seconds,
        **{name: told[name] for name in ("seconds", "peak_host_bytes", "devices")},
    }
    wrong = [d["name"] for d in report["layers"] if (d["verdict"] == "shared") != made[d["name"]]]
    if wrong:
        raise Failed(f"verdicts are not as made: {', '.join(wrong)}")


STEPS = {"alike": alike, "mesh": mesh, "bench": bench, "stream": stream}


def machine():
    """What is here, asked in a process of its own, which gives the device back."""
    code = (
        "import json, jax; print(json.dumps({'jax': jax.__version__, 'devices': [str(d.device_kind) for d in "
        "jax.devices()], 'platform': jax.default_backend(), 'memory': (jax.devices()[0].memory_stats() or {})"
        ".get('bytes_limit')}))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--gib", type=float, default=64)
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small sizes and one file of tests")
    parser.add_argument("--seconds", type=float, default=0, help="for each step, in place of its own")
    given = parser.parse_args()
    given.seconds = {name: given.seconds or SECONDS[name] for name in STEPS}
    os.makedirs(given.out, exist_ok=True)
    found, failed = {"machine": machine()}, False
    print(json.dumps(found["machine"]), flush=True)
    for name in given.steps.split(","):
        box, begun = Box(name, given), time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            os.remove(box.log)
        try:
            STEPS[name](box)
            said = "passed"
        except Failed as error:
            said, failed = str(error), True
        found[name] = {"result": said, "took_seconds": round(time.monotonic() - begun, 1), **box.found}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        with open(os.path.join(given.out, "check.json"), "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
