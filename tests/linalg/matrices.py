"""Test matrices by name, float64: planted singular values between random orthonormal bases; and where they lie."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import placement
from jaxsub.linalg import gram, pairs

# Spectra of LAPACK's tests, and the triad of randomized methods: names for `spectrum`.
LAPACK = [
    "zero",
    "identity",
    "arithmetic",
    "geometric",
    "clustered_low",
    "clustered_high",
    "graded",
    "harmonic",
    "rank3",
]
TRIAD = ["low_rank", "low_rank_noise", "slow_decay"]


def planted(num_rows, width, values, seed=0):
    """(x (N, D), vt (k, D)) with the singular values `values`, k of them."""
    u, v = _bases(num_rows, width, len(values), seed)
    return (u * values) @ v.T, v.T


@functools.lru_cache(maxsize=8)
def _bases(num_rows, width, count, seed):
    rng = np.random.default_rng(seed)
    found = [np.linalg.qr(rng.standard_normal((size, count)))[0] for size in (num_rows, width)]
    for one in found:
        one.flags.writeable = False
    return found


def spectrum(name, size):
    """`size` singular values: the triad of randomized methods, and spectra of LAPACK's tests."""
    i = np.arange(size)
    ulp = 2.0**-23
    return {
        "low_rank": np.where(i < min(8, size), 0.8**i, 0.0),
        "low_rank_noise": np.where(i < 8, 0.8**i, 1e-3),
        "slow_decay": 1.0 / (1.0 + i) ** 0.5,
        "fast_decay": 0.5**i,
        "zero": np.zeros(size),
        "identity": np.ones(size),
        "arithmetic": np.linspace(1, ulp, size),
        "geometric": ulp ** (i / max(size - 1, 1)),
        "clustered_low": np.where(i == 0, 1.0, ulp),
        "clustered_high": np.where(i == size - 1, ulp, 1.0),
        "graded": 1e-12 ** (i / max(size - 1, 1)),
        "harmonic": 1.0 / (1 + i),
        "rank3": np.where(i < 3, 1.0, 0.0),
    }[name]


def place(x, mesh):
    """`x` on the mesh, its last axis sharded over the features, with zeros at its end to fill the last device."""
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % mesh.size)])
    return jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "features")))


def deal_factors(x, dealt, mesh):
    """Factors (N, r, width) on the mesh, of each device those of the models it holds."""
    models = dealt.read_by(range(mesh.size))
    padded = np.zeros((len(models), *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    return placement.deal(padded, models, dealt, mesh)


def lora_sums(a, bt, mesh, dtype, size=None, **how):
    """`gram.lora_gram` of factors (N, r, i) and (N, r, o), its blocks assembled, on the host."""
    dealt = pairs.Deal.create(len(a), a.shape[1], mesh.size, size=size)
    with jax.enable_x64(True):
        placed = [deal_factors(x, dealt, mesh) for x in (a, bt)]
        sums = jax.device_get(gram.lora_gram(*placed, deal=dealt, mesh=mesh, dtype=dtype, **how))
    return gram.LoraSums(*(dealt.assemble(s) for s in sums[:3]), *(s[: len(a)] for s in sums[3:]))


def frame(k, d, seed=0):
    """(k, d) random orthonormal rows, float64."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, k)))[0].T
