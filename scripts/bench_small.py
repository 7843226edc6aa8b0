"""Where the time of an analysis of many small layers goes.

    python scripts/bench_small.py --folder=FOLDER        # makes 100 models of 200 layers of 64 x 64 float32 once

Prints the seconds of each part of a second analysis in one process, with compiled kernels and a warm page cache.
"""

import argparse
import os

import numpy as np


def make(folder, models, layers, shape):
    from jaxsub.formats import safetensors

    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(models):
        path = os.path.join(folder, f"m{n:04d}.safetensors")
        if not os.path.exists(path):
            weights = {f"layer{i}.w": rng.standard_normal(shape, dtype=np.float32) for i in range(layers)}
            safetensors.write(path, weights, None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--shape", type=int, nargs="+", default=[64, 64])
    arguments = parser.parse_args()
    make(arguments.folder, arguments.models, arguments.layers, arguments.shape)

    import jaxsub

    jaxsub.analyze(arguments.folder)
    for name, seconds in jaxsub.analyze(arguments.folder)["provenance"]["seconds"].items():
        print(f"{name:10} {seconds:8.2f} s")


if __name__ == "__main__":
    main()
