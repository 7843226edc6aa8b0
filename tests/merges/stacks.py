"""Stacks of updates that tests merge."""

import numpy as np

from jaxsub import rows
from jaxsub.rows import lora


def dense(shape=(12, 9), count=5, seed=0, dtype=np.float32):
    """Updates of one layer that share a part: (N, *shape)."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(shape)
    own = rng.standard_normal((count, *shape)) * rng.uniform(0.5, 2, (count, *[1] * len(shape)))
    return (0.02 * (shared + own)).astype(dtype)


def factors(o=14, i=11, ranks=(2, 3, 2, 1), seed=0):
    """(a (N, r, i), b (N, o, r), scales) of low-rank updates of mixed ranks, padded with zeros."""
    rng = np.random.default_rng(seed)
    count, most = len(ranks), max(ranks)
    a, b = np.zeros((count, most, i), np.float32), np.zeros((count, o, most), np.float32)
    for n, r in enumerate(ranks):
        a[n, :r], b[n, :, :r] = rng.standard_normal((r, i)), 0.1 * rng.standard_normal((o, r))
    return a, b, np.linspace(0.5, 2.0, count)


def products(a, b, scales):
    """The updates multiplied out, float64."""
    return np.einsum("n,nor,nri->noi", scales, b.astype(float), a.astype(float))


def of_arrays(x, **more):
    """ArrayRows of updates."""
    return rows.ArrayRows(x, "layer.weight", [f"m{n}" for n in range(len(x))], is_update=True, **more)


def of_factors(a, b, scales, **more):
    """LoraRows of the same models' names."""
    return lora.LoraRows(a, b, scales, "layer.weight", [f"m{n}" for n in range(len(a))], **more)


def relative(found, wanted):
    """Distance relative to the norm of what is wanted."""
    return np.linalg.norm(np.asarray(found, float) - wanted) / max(np.linalg.norm(wanted), 1e-30)


def array(found, shape):
    """A result as one array: Values, or the product of Factors."""
    return found.b @ found.a if isinstance(found, rows.Factors) else found.array(shape)
