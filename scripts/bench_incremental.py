"""Incremental PCA against scikit-learn's IncrementalPCA on the same batches, times and errors in one run.

    python scripts/bench_incremental.py                    # 256 models of 262,144 float32, batches of 32, k = 32
    python scripts/bench_incremental.py --rounds=1 --features=65536

Singular values 0.9**i (i < 48) over a floor of 1e-3, a mean of 30 times the first. Interleaved rounds, first calls
(compile) apart, medians of wall and of processor seconds: on a busy machine believe the latter.
Errors are against the exact float64 components: sine of the largest principal angle, and
the worst relative error of a singular value. Set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for both sides.
"""

import argparse
import statistics
import time

import numpy as np


def stack(num_models, num_features):
    """Float32 models as rows and their exact centred singular values and right vectors, float64."""
    rng = np.random.default_rng(0)
    k = min(48, num_models - 1)
    u = np.linalg.qr(rng.standard_normal((num_models, k)))[0]
    v = np.linalg.qr(rng.standard_normal((num_features, k)))[0].T
    noise = 1e-3 / np.sqrt(num_features) * rng.standard_normal((num_models, num_features), dtype=np.float32)
    mean = 30 * rng.standard_normal(num_features) / np.sqrt(num_features * num_models)
    x = ((u * 0.9 ** np.arange(k)) @ v + noise + mean).astype(np.float32)
    y = x.astype(np.float64)
    y -= y.mean(0)
    w, q = np.linalg.eigh(y @ y.T)
    return x, np.sqrt(np.maximum(w[::-1], 0)), (q[:, ::-1].T @ y)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=256)
    parser.add_argument("--features", type=int, default=262144)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    import jax
    from sklearn.decomposition import IncrementalPCA

    from jaxsub import placement
    from jaxsub.linalg import incremental

    k = arguments.rank
    x, values, vectors = stack(arguments.models, arguments.features)
    vectors = vectors[:k] / values[:k, None]
    mesh = placement.make_mesh(1)
    starts = range(0, arguments.models, arguments.batch)
    batches = [jax.device_put(x[j : j + arguments.batch].copy()) for j in starts]

    def ours(rows):
        with jax.enable_x64(True):
            stream = incremental.start(arguments.features, rows=rows, dtype="float32")
            for batch in batches:
                stream = incremental.update(stream, batch, mesh=mesh)
            return jax.block_until_ready(incremental.finish(stream, rank=k, mesh=mesh))

    def theirs():
        model = IncrementalPCA(n_components=k)
        for j in starts:
            model.partial_fit(x[j : j + arguments.batch])
        return model

    calls = {
        f"jaxsub, {2 * k} rows kept": lambda: ours(2 * k),
        f"jaxsub, {k} rows kept": lambda: ours(k),
        "scikit-learn IncrementalPCA": theirs,
    }
    times = {name: [] for name in calls}
    processor = {name: [] for name in calls}
    first, results = {}, {}
    for round_number in range(arguments.rounds + 1):
        names = list(calls) if round_number % 2 else list(calls)[::-1]
        for name in names:
            # scikit-learn compiles nothing: its first call is a sample like the others.
            is_first = round_number == 0 and name.startswith("jaxsub")
            if round_number == 0 and not is_first:
                continue
            started, before = time.perf_counter(), time.process_time()
            results[name] = calls[name]()
            seconds, used = time.perf_counter() - started, time.process_time() - before
            first.update({name: seconds} if is_first else {})
            times[name] += [] if is_first else [seconds]
            processor[name] += [] if is_first else [used]
    medians = {name: statistics.median(t) for name, t in times.items()}
    used = {name: statistics.median(t) for name, t in processor.items()}
    peer, peer_used = (m["scikit-learn IncrementalPCA"] for m in (medians, used))
    for name, result in results.items():
        is_ours = name.startswith("jaxsub")
        basis = np.asarray(result.basis if is_ours else result.components_, np.float64)
        found = np.asarray(result.singular_values if is_ours else result.singular_values_)
        angle = np.linalg.norm(basis - (basis @ vectors.T) @ vectors, 2)
        error = np.max(np.abs(found / values[:k] - 1))
        print(
            f"{name:28} {medians[name]:8.3f} s  of peer {medians[name] / peer:6.3f}  processor {used[name]:7.3f} s  "
            f"of peer {used[name] / peer_used:6.3f}  first call {first.get(name, medians[name]):7.3f} s  "
            f"angle {angle:.1e}  singular values {error:.1e}"
            + (f"  stated bound of angle {float(result.angle):.1e}" if is_ours else "")
        )


if __name__ == "__main__":
    main()
