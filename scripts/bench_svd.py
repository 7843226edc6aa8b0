"""Decompositions against the libraries a user would take instead, interleaved in one process.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 OMP_NUM_THREADS=2 python scripts/bench_svd.py [--rounds=5] [--only=rsvd]

Prints medians without compilation, ratios to each peer, and the accuracy of both: sine of the largest angle between
the rows found and the leading ones (mean over 5 seeds for randomized methods), or |q.T q - I|.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxsub.linalg import orth, svd

RANK, OVERSAMPLE, PASSES = 32, 16, 6


def interleaved(calls, rounds):
    """Median seconds of each call; the order alternates so that drift hits all alike."""
    times = {name: [] for name in calls}
    started = time.perf_counter()
    for name, call in calls.items():
        call()
        print(f"  first call of {name}: {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
    for j in range(rounds):
        for name in list(calls) if j % 2 == 0 else list(calls)[::-1]:
            started = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = medians["jaxsub"]
    for name, seconds in medians.items():
        print(f"  {name:24} {1e3 * seconds:9.1f} ms   jaxsub / it {own / seconds:.2f}")


def angle(vt, basis):
    vt = np.asarray(vt, np.float64)
    return np.linalg.norm(basis - basis @ np.linalg.qr(vt.T)[0] @ np.linalg.qr(vt.T)[0].T, 2)


def rsvd(rounds):
    from sklearn.utils.extmath import randomized_svd as sklearn_svd

    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 48)))[0] for size in (4096, 16384))
    noise = rng.standard_normal((4096, 16384), dtype=np.float32)
    x = ((u * 0.9 ** np.arange(48)) @ v.T).astype(np.float32) + noise * np.float32(1e-3 / 128)
    # Exact leading rows from the float64 Gram matrix of the rows.
    basis = np.linalg.eigh(x.astype(np.float64) @ x.T.astype(np.float64))[1][:, ::-1][:, :RANK].T @ x.astype(np.float64)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    own, theirs = jax.device_put(x), torch.from_numpy(x)

    def jaxsub(seed=0):
        key = jax.random.key(seed)
        return jax.block_until_ready(svd.randomized_svd(own, key, rank=RANK, oversample=OVERSAMPLE, passes=PASSES)).vt

    def by_torch(seed=0):
        torch.manual_seed(seed)
        return torch.svd_lowrank(theirs, q=RANK + OVERSAMPLE, niter=2)[2][:, :RANK].T.numpy()

    def by_sklearn(seed=0):
        return sklearn_svd(x, RANK, n_oversamples=OVERSAMPLE, n_iter=2, random_state=seed)[2]

    calls = {"jaxsub": jaxsub, "torch.svd_lowrank": by_torch, "sklearn randomized_svd": by_sklearn}
    interleaved(calls, rounds)
    for name, call in calls.items():
        angles = [angle(call(seed), basis) for seed in range(5)]
        print(f"  {name:24} angle {np.mean(angles):.2e} mean of 5 seeds ({min(angles):.1e} to {max(angles):.1e})")


def orthonormal(rounds):
    x = np.random.default_rng(0).standard_normal((2**20, 64), dtype=np.float32)
    own, theirs = jax.device_put(x), torch.from_numpy(x)
    calls = {
        "jaxsub": lambda: jax.block_until_ready(orth.cholesky_qr2(own))[0],
        "torch.linalg.qr": lambda: torch.linalg.qr(theirs)[0].numpy(),
    }
    interleaved(calls, rounds)
    for name, call in calls.items():
        q = np.asarray(call(), np.float64)
        print(f"  {name:24} |q.T q - I| {np.abs(q.T @ q - np.eye(64)).max():.1e}")


def tall(rounds):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2**20, 256), dtype=np.float32)
    x *= np.float32(0.95) ** np.arange(256, dtype=np.float32)
    own, theirs = jax.device_put(x), torch.from_numpy(x)
    gram = np.zeros((256, 256))
    for j in range(0, 2**20, 2**17):
        chunk = x[j : j + 2**17].astype(np.float64)
        gram += chunk.T @ chunk
    basis = np.linalg.eigh(gram)[1][:, ::-1][:, :RANK].T

    def by_torch():
        values, vectors = torch.linalg.eigh(theirs.T @ theirs)
        s, v = values.flip(0).clamp(min=0).sqrt()[:RANK], vectors.flip(1)[:, :RANK]
        return ((theirs @ v) / s, s, v.T.numpy())[2]

    calls = {"jaxsub": lambda: jax.block_until_ready(svd.gram_svd(own, rank=RANK)).vt, "torch gram, eigh": by_torch}
    interleaved(calls, rounds)
    for name, call in calls.items():
        print(f"  {name:24} angle {angle(call(), basis):.1e}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    workloads = {"rsvd": rsvd, "orthonormal": orthonormal, "tall": tall}
    with jax.enable_x64(True):
        assert jnp.zeros(0).dtype == jnp.float64
        for name, workload in workloads.items():
            if arguments.only in ("", name):
                print(f"{name}:")
                workload(arguments.rounds)


if __name__ == "__main__":
    main()
