"""Tucker kernels against hand-written torch, tensorly on torch and pyttb, interleaved in one process.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python scripts/bench_tucker.py [--case=sthosvd] [--noise=0.1] [--rounds=5]

The tensor is float32, of the ranks asked for, plus noise of so much of its norm (--noise=inf: noise alone, where no
iteration helps). Prints for each side the first call, the median and the least time of the interleaved rounds, the
relative error that its core leaves (float64, from norms), the ratio of medians jaxsub / peer and its bar.
"""

import argparse
import importlib.util
import statistics
import time

import numpy as np

CASES = {
    "sthosvd": ((64, 1024, 1024), (16, 64, 64), {"torch": 0.75, "tensorly": 0.13, "pyttb": 0.09}),
    "conv": ((64, 256, 128, 3, 3), (16, 64, 32, 3, 3), {"torch": 1.0, "tensorly": 0.02, "pyttb": 0.25}),
}


def tensor(shape, ranks, noise, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, dtype=np.float32)
    if np.isinf(noise):
        return x
    low = rng.standard_normal(ranks, dtype=np.float32)
    for axis, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
        basis = np.linalg.qr(rng.standard_normal((size, rank)))[0].astype(np.float32)
        low = np.moveaxis(np.tensordot(basis, low, (1, axis)), 0, axis)
    x *= np.float32(noise * np.linalg.norm(low) / np.linalg.norm(x))
    x += low
    return np.ascontiguousarray(x)


def sides(x, ranks, peers):
    """{name: function that returns the core as an array} for jaxsub and the installed peers, inputs in place."""
    import jax

    from jaxsub.linalg import tucker

    ours = jax.device_put(x)

    def jaxsub_sthosvd():
        with jax.enable_x64(True):
            return jax.block_until_ready(tucker.sthosvd(ours, ranks=ranks)).core

    found = {"jaxsub": jaxsub_sthosvd}
    if "torch" in peers and importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(2)
        theirs = torch.from_numpy(x.copy())

        def torch_sthosvd():
            y = theirs
            for axis, rank in enumerate(ranks):
                unfolded = y.movedim(axis, 0).reshape(y.shape[axis], -1)
                basis = torch.linalg.eigh(unfolded @ unfolded.T)[1][:, -rank:]
                rest = [s for a, s in enumerate(y.shape) if a != axis]
                y = (basis.T @ unfolded).reshape(rank, *rest).movedim(0, axis)
            return y.numpy()

        found["torch"] = torch_sthosvd
        if "tensorly" in peers and importlib.util.find_spec("tensorly"):
            import tensorly

            tensorly.set_backend("pytorch")
            from tensorly.decomposition import tucker as tensorly_tucker

            def tensorly_hooi():
                # One sweep from its SVD start: the least work it offers; randomized_svd is its fastest choice.
                core, _ = tensorly_tucker(theirs, list(ranks), n_iter_max=1, svd="randomized_svd", random_state=0)
                return core.numpy()

            found["tensorly"] = tensorly_hooi
    if "pyttb" in peers and importlib.util.find_spec("pyttb"):
        import pyttb

        wrapped = pyttb.tensor(x)

        def pyttb_hosvd():
            return pyttb.hosvd(wrapped, 0.5, verbosity=0, ranks=np.array(ranks), sequential=True).core.data

        found["pyttb"] = pyttb_hosvd
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="torch,tensorly,pyttb")
    arguments = parser.parse_args()
    for name, (shape, ranks, bars) in CASES.items():
        if arguments.case not in (name, "all"):
            continue
        x = tensor(shape, ranks, arguments.noise)
        norm = float(np.sum(np.square(x, dtype=np.float64)))
        runs, first, seconds, errors = sides(x, ranks, arguments.peers.split(",")), {}, {}, {}
        for side, run in runs.items():
            start = time.perf_counter()
            core = np.asarray(run(), np.float64)
            first[side], seconds[side] = time.perf_counter() - start, []
            errors[side] = float(np.sqrt(max(0.0, 1 - np.sum(np.square(core)) / norm)))
        for count in range(arguments.rounds):
            for side in list(runs)[:: 1 if count % 2 else -1]:
                start = time.perf_counter()
                runs[side]()
                seconds[side].append(time.perf_counter() - start)
        print(f"{name}: {' x '.join(map(str, shape))} -> {ranks}, noise {arguments.noise:g}")
        for side, times in seconds.items():
            median = statistics.median(times)
            line = f"  {side:9s} first {first[side] * 1e3:8.0f} ms"
            line += f"  median {median * 1e3:8.1f}  least {min(times) * 1e3:8.1f}"
            line += f"  error {errors[side]:.6f}"
            if side in bars:
                line += f"  ratio {statistics.median(seconds['jaxsub']) / median:.3f}, bar {bars[side]}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
