"""Slow and plain figures of a stack of models, and reading a world back with the safetensors package."""

import json
import pathlib

import numpy as np
from safetensors import numpy as safetensors


def read(folder):
    """Layers (N, *shape) in float64 and labels of a world's folder."""
    files = sorted((pathlib.Path(folder) / "models").glob("*.safetensors"))
    models = [safetensors.load_file(f) for f in files]
    layers = {name: np.stack([m[name] for m in models]).astype(np.float64) for name in models[0]}
    labels = json.loads((pathlib.Path(folder) / "labels.json").read_text())
    return layers, [labels[f.stem] for f in files]


def mean_share(x):
    """Share of the uncentred energy in the mean."""
    x = x.reshape(len(x), -1)
    return len(x) * float((x.mean(axis=0) ** 2).sum()) / float((x**2).sum())


def cosines(x):
    """Cosines of all pairs, (N, N)."""
    x = x.reshape(len(x), -1)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def leave_one_out(x, rank):
    """LOO(k) by brute force, one SVD a model, in the coordinates of the space the models span."""
    x = np.linalg.qr(x.reshape(len(x), -1).T, mode="r").T
    left = total = 0.0
    for i in range(len(x)):
        others = np.delete(x, i, axis=0)
        mean = others.mean(axis=0)
        basis = np.linalg.svd(others - mean, full_matrices=False)[2][:rank]
        row = x[i] - mean
        total += row @ row
        left += row @ row - float(((basis @ row) ** 2).sum())
    return left / total
