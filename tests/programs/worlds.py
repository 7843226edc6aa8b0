"""Small collections of known truth, written as files in milliseconds."""

import numpy as np

from jaxsub.formats import safetensors


def write(folder, stacks, metadata=None):
    """One safetensors file a model; `stacks` maps layer names to arrays (N, *shape)."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(stacks.values())))
    for n in range(count):
        safetensors.write(str(folder / f"m{n:03d}.safetensors"), {k: v[n] for k, v in stacks.items()}, metadata)
    return folder


def noise(num_models=24, shape=(24, 16), seed=0):
    """Independent Gaussian rows."""
    return np.random.default_rng(seed).standard_normal((num_models, *shape)).astype(np.float32)


def planted(num_models=40, shape=(24, 16), k=3, seed=0):
    """Rows in a k-dimensional subspace, plus noise a third as strong."""
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    rows = rng.standard_normal((num_models, k)) @ np.linalg.qr(rng.standard_normal((d, k)))[0].T * np.sqrt(d / k)
    return (rows + 0.33 * rng.standard_normal((num_models, d))).reshape(num_models, *shape).astype(np.float32)


def families(sizes=(14, 14), shape=(24, 16), seed=0, shared=0):
    """Lineages: each a parent plus own noise, and within all of them a shared subspace of `shared` dimensions."""
    rng = np.random.default_rng(seed)
    d, n = int(np.prod(shape)), sum(sizes)
    rows = np.repeat(rng.standard_normal((len(sizes), d)) * 1.5, sizes, axis=0) + 0.5 * rng.standard_normal((n, d))
    if shared:
        basis = np.linalg.qr(rng.standard_normal((d, shared)))[0].T
        rows = rows + rng.standard_normal((n, shared)) @ basis * np.sqrt(d / shared) * 0.5
    return rows.reshape(n, *shape).astype(np.float32)
