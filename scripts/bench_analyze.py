"""The pass over a collection against the bare Gram product that it contains, in one run.

    python scripts/bench_analyze.py --folder=FOLDER        # makes 256 models of 1024 x 2048 float32 (2 GiB) once

Prints medians of interleaved rounds: the whole analysis without start-up, its parts, the Gram product of the same
rows held in memory by NumPy (float32 x @ x.T), by jax.jit of the same line and by jaxsub's own kernel (centred, float64
sums, moments), and their ratios. With --cold (Linux, root), the analysis from a cold page cache against one thread that
reads the files.
"""

import argparse
import os
import statistics
import time

import numpy as np


def make(folder, num_models, shape):
    from jaxsub.formats import safetensors

    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(num_models):
        path = os.path.join(folder, f"m{n:04d}.safetensors")
        if not os.path.exists(path):
            safetensors.write(path, {"w": rng.standard_normal(shape, dtype=np.float32)}, None)


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def cold(folder, rounds):
    import jaxsub

    paths = sorted(entry.path for entry in os.scandir(folder))
    buffer = bytearray(1 << 20)

    def read():
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    calls = {"read": read, "analyze": lambda: jaxsub.analyze(folder)}
    calls["analyze"]()  # compile
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            drop_caches()
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    for name, values in times.items():
        print(f"{name:24} {statistics.median(values):8.3f} s   {min(values):.2f} to {max(values):.2f}")
    print(f"analyze / read: {statistics.median(times['analyze']) / statistics.median(times['read']):.2f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--models", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.models, (arguments.rows, arguments.columns))
    if arguments.cold:
        return cold(arguments.folder, arguments.rounds)

    import jax

    import jaxsub
    from jaxsub import placement
    from jaxsub.linalg import gram

    width = arguments.rows * arguments.columns
    x = np.empty((arguments.models, width), np.float32)
    x[:] = np.random.default_rng(1).standard_normal(width, dtype=np.float32)
    mesh = placement.make_mesh(1)

    def bare_numpy():
        return x @ x.T

    def bare_kernel():
        with jax.enable_x64(True):
            weights = np.zeros((0, len(x)), np.float32)
            return [jax.block_until_ready(gram.dense_gram(b, weights, mesh=mesh, dtype="float32")) for b in blocks]

    bare_jax = jax.jit(lambda x: jax.numpy.matmul(x, x.T, precision="highest"))
    whole = jax.device_put(x)

    blocks = [jax.device_put(np.ascontiguousarray(x[:, j : j + 2**18])) for j in range(0, width, 2**18)]
    parts: dict[str, list[float]] = {}

    def analyze():
        report = jaxsub.analyze(arguments.folder)
        for name, seconds in report["provenance"]["seconds"].items():
            parts.setdefault(name, []).append(seconds)

    calls = {
        "analyze": analyze,
        "numpy": bare_numpy,
        "jax": lambda: bare_jax(whole).block_until_ready(),
        "kernel": bare_kernel,
    }
    times = {name: [] for name in calls}
    for call in calls.values():
        call()  # compile, page cache
    parts.clear()
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians |= {f"analyze, {name}": statistics.median(values) for name, values in parts.items() if name != "total"}
    for name, seconds in medians.items():
        print(f"{name:24} {seconds:8.3f} s")
    both = medians["analyze, read"] + medians["analyze, compute"]
    for name in ("numpy", "jax", "kernel"):
        ratio = medians["analyze"] / medians[name]
        print(f"pass (read + compute) / {name}: {both / medians[name]:.2f}; all / {name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
