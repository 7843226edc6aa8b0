"""Streaming against what is usual: a Gram matrix from files, and a collection larger than memory should be.

    python scripts/bench_streaming.py --folder=FOLDER                 # 64 models of 8 Mi float32 in one layer (2 GiB)
    python scripts/bench_streaming.py --folder=FOLDER --large         # 64 models of 64 Mi float32 in 8 layers (16 GiB)

Without --large: seconds and peak memory of the pass (read, check, Gram) beside `load_file` of every model, stack,
device_put and jitted x @ x.T, each in a process of its own that has compiled before, alternating; medians. With
--large: the whole analysis beside one thread that reads the same files in blocks of the same size. --cold (Linux, root)
empties the page cache before every timing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

MODELS = 64
ROWS, COLUMNS = 2048, 4096


def make(folder, layers):
    import numpy as np

    from jaxsub.formats import safetensors

    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(MODELS):
        path = os.path.join(folder, f"m{n:02d}.safetensors")
        if not os.path.exists(path):
            names = [f"w{i}" for i in range(layers)]
            safetensors.write(path, {w: rng.standard_normal((ROWS, COLUMNS), dtype=np.float32) for w in names}, None)


def files(folder):
    return sorted(entry.path for entry in os.scandir(folder))


def usual(folder):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import load_file

    product = jax.jit(lambda x: jnp.matmul(x, x.T, precision="highest"))
    warm = product(jnp.zeros((MODELS, ROWS * COLUMNS), jnp.float32))
    del warm

    def call():
        x = np.stack([load_file(path)["w0"].reshape(-1) for path in files(folder)])
        return np.asarray(product(jax.device_put(x)))

    return call


def streamed(folder):
    import jaxsub
    from jaxsub import placement
    from jaxsub.pipelines import layers

    mesh = placement.make_mesh(1)
    # Only the Gram matrix, its moments and the checks: the axes' sketches are more than the peer does.
    layers.mode_kernels.sketch = lambda *_, **__: ()
    layers.axes.sketched_mode = lambda *_, **__: None
    plan = placement.plan_dense

    def bare(*arguments, **more):
        import dataclasses

        return dataclasses.replace(plan(*arguments, **more), exact_axes=(), sketched_axes=(), other_side=False)

    layers.placement.plan_dense = bare

    def call():
        opened = jaxsub.open_collection(folder)
        (group,) = opened.groups
        models = [(r.id, m) for r, m in zip(opened.refs, opened.models, strict=True)]
        options = layers.Options(block_bytes=32 * 2**20)
        return layers.statistics(group, models, mesh, options).gram

    call()
    return call


def analyzed(folder):
    import jaxsub

    small = os.path.join(os.path.dirname(folder.rstrip("/")), "warm")
    make(small, 1)
    jaxsub.analyze(small)
    return lambda: jaxsub.analyze(folder)


def read(folder):
    def call():
        buffer = bytearray(2 * 2**20)  # one model's part of a block
        for path in files(folder):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return call


CALLS = {"usual": usual, "streamed": streamed, "analyzed": analyzed, "read": read}


def child(name, folder, cold):
    """Prints seconds and the MiB that the call took beyond what was there before it."""
    from jaxsub import hostmemory
    from jaxsub.pipelines import plan

    call = CALLS[name](folder)
    if cold:
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
    before = hostmemory.resident()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    started = time.perf_counter()
    call()
    seconds, peak = time.perf_counter() - started, plan.peak_resident()
    print(json.dumps([seconds, (peak - before) / 2**20, peak / 2**20]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--child", default="")
    given = parser.parse_args()
    if given.child:
        return child(given.child, given.folder, given.cold)
    make(given.folder, 8 if given.large else 1)
    names = ("analyzed", "read") if given.large else ("streamed", "usual")
    found = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            command = [sys.executable, __file__, f"--folder={given.folder}", f"--child={name}"]
            done = subprocess.run(command + ["--cold"] * given.cold, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, (seconds, more, whole) in medians.items():
        print(f"{name:10} {seconds:8.2f} s   {more:8.0f} MiB more, {whole:8.0f} MiB in all")
    print(f"{names[0]} / {names[1]}: {medians[names[0]][0] / medians[names[1]][0]:.2f}")


if __name__ == "__main__":
    main()
