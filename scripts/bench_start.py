"""Start of `jaxsub analyze`: seconds from the program's start to the first header and to the first weights.

    python scripts/bench_start.py --folder=FOLDER                # 64 models of 4 layers of 512 x 1024 float32 (.5 GiB)
    python scripts/bench_start.py --collection=MODELS --rounds=7 # your own

Each round is a process of its own; the first, which compiles what is not in the user's cache yet, is shown apart. The
process is ended at its first read. Headers, copies, the plan and its measurement come before the pass. Where other
programs run, believe the processor's seconds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

MODELS, LAYERS, SHAPE = 64, 4, (512, 1024)
MARKED = """
import os, sys, time
from jaxsub import cli, formats
def mark(what, place, name, then):
    call = getattr(place, name)
    def marked(*given, **more):
        setattr(place, name, call)
        sys.stdout.write(f"{what}:{time.monotonic()}:{time.process_time()}\\n")
        sys.stdout.flush()
        then()
        return call(*given, **more)
    setattr(place, name, marked)
def mark_pass():
    from jaxsub import reading
    mark("first weights of the pass", reading.Source, "read", lambda: os._exit(0))
mark("first header", formats, "open_model", lambda: None)
mark("first weights, samples that tell copies", formats, "read_into", mark_pass)
cli.entry(["jaxsub", *sys.argv[1:]])
"""


def make(folder):
    import numpy as np

    from jaxsub.formats import safetensors

    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(MODELS):
        path = os.path.join(folder, f"m{n:02d}.safetensors")
        if not os.path.exists(path):
            names = [f"w{i}" for i in range(LAYERS)]
            safetensors.write(path, {w: rng.standard_normal(SHAPE, dtype=np.float32) for w in names}, None)


def start(collection):
    """{what: (seconds after the start, seconds of the processor)} of one process."""
    begun = time.monotonic()
    command = [sys.executable, "-c", MARKED, "analyze", f"--collection={collection}"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    lines = (line.split(":") for line in ended.stdout.splitlines())
    return {name: (float(at) - begun, float(own)) for name, at, own in lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder")
    parser.add_argument("--collection")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if not (given.folder or given.collection):
        parser.error("give --folder or --collection")
    if given.folder:
        make(given.folder)
    rounds = [start(given.collection or given.folder) for _ in range(given.rounds + 1)]
    for name in rounds[0]:
        first, *others = (one[name] for one in rounds)
        wall, own = zip(*others, strict=True)
        span = f"{min(wall):.2f} to {max(wall):.2f} s, of the processor {statistics.median(own):.2f} s"
        print(f"{name}: {statistics.median(wall):.2f} s ({span}); first round {first[0]:.2f} s")


if __name__ == "__main__":
    main()
