"""Time of a merge beside reading and writing alone, and beside mergekit where it is installed.

    python scripts/bench_merge.py --folder=/tmp/merge --methods=mean,ties [--mergekit=mergekit-pytorch] [--cold]

Makes, once, N models of W float32 weights in square layers and their base. Every round times in turn: reading all
models (threads, pieces of 1 MiB) and writing as much as one model with fsync; `jaxsub merge` of each method, process
start apart; mergekit's program of the same method, its start included. Prints medians and ratios.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np

SIDE = 2048
PIECE = 2**20


def make(folder, count, weights):
    """Writes the models and the base."""
    from jaxsub.formats import safetensors

    layers = max(1, round(weights / SIDE**2))
    rng = np.random.default_rng(0)
    (folder / "models").mkdir(parents=True, exist_ok=True)
    base = {f"layers.{i}.weight": rng.standard_normal((SIDE, SIDE), np.float32) for i in range(layers)}
    safetensors.write(folder / "base.safetensors", base)
    for n in range(count):
        own = np.random.default_rng(n + 1)
        model = {k: v + np.float32(0.05) * own.standard_normal(v.shape, np.float32) for k, v in base.items()}
        safetensors.write(folder / "models" / f"m{n}.safetensors", model)


def forget(paths):
    """Takes files out of the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_all(paths, threads):
    """Reads every byte of the files, into one piece of memory a thread."""

    def one(path):
        buffer = bytearray(PIECE)
        fd = os.open(path, os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, paths))


def write_one(source, target):
    """Writes as many bytes as a file has, and puts them on the disk."""
    piece, left = bytes(16 * PIECE), os.path.getsize(source)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    while left:
        left -= os.write(fd, piece[: min(left, len(piece))])
    os.fsync(fd)
    os.close(fd)
    os.unlink(target)


def timed(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def merged(folder, method, out):
    from jaxsub.pipelines import merge

    base = "" if method == "mean" else str(folder / "base.safetensors")
    merge.run(merge.Config(collection=(str(folder / "models"),), method=method, base=base, out=str(out)))


def mergekit(folder, method, out, program):
    paths = sorted((folder / "models").glob("*.safetensors"))
    entries = "".join(f"  - model: {path}\n    parameters:\n      weight: 1.0\n      density: 0.2\n" for path in paths)
    text = f"models:\n{entries}merge_method: {'linear' if method == 'mean' else method}\ndtype: float32\n"
    if method != "mean":
        text += f"base_model: {folder / 'base.safetensors'}\n"
    config = folder / "mergekit.yaml"
    config.write_text(text)
    subprocess.run([program, str(config), str(out)], check=True, capture_output=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--weights", type=float, default=1e8)
    parser.add_argument("--methods", default="mean,ties")
    parser.add_argument("--mergekit", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    folder = options.folder
    if not (folder / "base.safetensors").exists():
        make(folder, options.models, options.weights)
    models = sorted((folder / "models").glob("*.safetensors"))
    every = [*models, folder / "base.safetensors"]
    rows = {
        "reading": lambda: read_all(models, options.threads),
        "writing": lambda: write_one(models[0], folder / "written"),
    }
    methods = options.methods.split(",")
    for method in methods:
        rows[method] = lambda m=method: merged(folder, m, folder / "out")
    if options.mergekit:
        for method in methods:
            rows[f"mergekit {method}"] = lambda m=method: mergekit(folder, m, folder / "out_mergekit", options.mergekit)
    found = {name: [] for name in rows}
    for round_ in range(options.rounds + 1):
        for name, call in rows.items():
            if name.startswith("mergekit") and round_ != 1:
                continue  # minutes
            if options.cold:
                forget(every)
            for out in ("out", "out_mergekit"):
                shutil.rmtree(folder / out, ignore_errors=True)
            os.sync()
            seconds = timed(call)
            if round_ or name.startswith("mergekit"):  # the first compiles, and fills the cache
                found[name].append(seconds)
    middle = {name: statistics.median(values) for name, values in found.items()}
    floor = middle["reading"] + middle["writing"]
    for name, value in middle.items():
        spread = ", ".join(f"{v:.2f}" for v in found[name])
        sys.stdout.write(f"{name:20} {value:8.2f} s   {value / floor:6.2f} of reading and writing   ({spread})\n")
    for method in methods:
        if f"mergekit {method}" in middle:
            sys.stdout.write(f"{method}: {middle[method] / middle[f'mergekit {method}']:.3f} of mergekit's time\n")


if __name__ == "__main__":
    main()
