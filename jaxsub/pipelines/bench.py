"""`jaxsub bench`: time, rate, memory and accuracy of the kernels, beside a model of their cost and the peers.

The model is the longer of arithmetic and reading at this machine's measured rates. What devices would send each other
is counted, not timed; scripts/weak_scaling.py foretells larger machines from the same counts.

One process; the project and its peers take turns (A B C, C B A, ...), inputs are where each wants them, and medians are
compared. Beside peers everybody rests before a sample, until threads of the one before have stopped spinning, and makes
a call that does not count: what a rest costs, such as memory that the system took back, is nobody's. The project's
kernels have one BLAS thread, as in `fit`; peers have all. A machine is noisy: believe ratios within a run, not seconds
across runs.
"""

import dataclasses
import os
import platform
import statistics
import time

import numpy as np

from jaxsub import errors, hostmemory, plugins
from jaxsub.linalg import collectives
from jaxsub.report import _write

SCHEMA, RECORD = "jaxsub.bench/1", "bench.json"
SAMPLE_SECONDS = 0.15  # short calls are repeated until a sample is this long
DEVICES = 8  # that communication is counted for
REST_SECONDS = 0.3  # before a sample beside peers; small sizes, which are for a look, go without
OTHERS = 0.08  # share of all cores that other processes may take in a sample; else it is set aside


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the bench program."""

    workloads: tuple[str, ...] = ()  # names of modules of jaxsub.workloads; all by default
    peers: bool = False  # also time the installed libraries a user would take instead
    quick: bool = False  # small sizes, under a minute: for a look, not for figures
    rounds: int = 5  # interleaved rounds, medians are taken of
    seed: int = 0


def run(config, workdir=None, progress=None):
    """Times the workloads; writes bench.json to `workdir` if there is one.

    Args:
        config: Config.
        workdir: output folder, or None.
        progress: called with a line of text before a workload is made; None for silence.

    Returns:
        dict as in bench.json.

    Raises:
        ConfigError: no such workload, or rounds under 1.
    """
    if config.rounds < 1:
        raise errors.ConfigError(f"rounds={config.rounds}: must be at least 1")
    names = config.workloads or tuple(plugins.available("workloads"))
    modules = {name: plugins.load("workloads", name) for name in names}
    limits = _limits(config.quick)
    rows = []
    for name, module in modules.items():
        if progress is not None:
            progress(f"{name}: {(module.__doc__ or '').partition(chr(10))[0]}")
        rows.append({"workload": name, **_measure(module, config, limits)})
    record = {"schema": SCHEMA, "machine": _machine(), "limits": limits, "config": dataclasses.asdict(config)}
    record["workloads"] = rows
    if workdir is not None:
        os.makedirs(workdir, exist_ok=True)
        _write.write_json(os.path.join(workdir, RECORD), record)
    return record


def _measure(module, config, limits):
    options = module.QUICK if config.quick else module.Options()
    problem = module.problem(options, np.random.default_rng(config.seed))
    calls = {"jaxsub": _quiet(module.ours(problem, options))}
    if config.peers:
        calls |= module.peers(problem, options)
    first, results, memory = {}, {}, {}
    for name, call in calls.items():
        first[name], results[name] = _timed(call)
        memory[name] = _peak_growth(call)
    accuracy = {name: module.error(problem, options, result) for name, result in results.items()}
    del results
    times, clean = _interleaved(calls, config.rounds, REST_SECONDS if config.peers and not config.quick else 0)
    flops, num_bytes = module.work(options)
    exchanged = module.communication(options)
    model = max(flops / limits["flops"], num_bytes / limits["bytes"])
    ours = times["jaxsub"]
    return {
        "options": dataclasses.asdict(options),
        "first_call_seconds": first["jaxsub"],
        "seconds": ours,
        "clean_samples": clean["jaxsub"],
        "gflops": flops / ours / 1e9,
        "gbytes_per_second": num_bytes / ours / 1e9,
        "model_seconds": model,
        "share_of_floor": model / ours,
        "communication": None
        if exchanged is None
        else {
            "devices": DEVICES,
            "collectives": len(exchanged),
            "bytes_sent": collectives.sent(exchanged, DEVICES),
        },
        "peak_bytes": memory["jaxsub"],
        "error": accuracy["jaxsub"],
        "peers": [
            {
                "name": name,
                "seconds": times[name],
                "clean_samples": clean[name],
                "ratio": ours / times[name],
                "error": accuracy[name],
                "peak_bytes": memory[name],
            }
            for name in calls
            if name != "jaxsub"
        ],
    }


def _quiet(call):
    def with_one_thread():
        with hostmemory.one_blas_thread():
            return _finished(call())

    return with_one_thread


def _interleaved(calls, rounds, rest=0):
    """(name -> median seconds a call, name -> clean samples), the calls taking turns, every second round backwards.

    Samples in which other processes took more than OTHERS of the cores are set aside; where fewer than half are left,
    all count, and the number of clean ones says so.
    """
    counts = {name: max(1, int(SAMPLE_SECONDS / max(_timed(call)[0], 1e-6))) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in order:
            if rest:
                time.sleep(rest)
                _finished(calls[name]())
            before, started = _foreign_seconds(), time.perf_counter()
            for _ in range(counts[name]):
                _finished(calls[name]())
            seconds = time.perf_counter() - started
            others = (_foreign_seconds() - before) / (seconds * (os.cpu_count() or 1))
            samples[name].append((seconds / counts[name], others <= OTHERS))
    clean = {name: [seconds for seconds, is_clean in found if is_clean] for name, found in samples.items()}
    used = {name: clean[name] if 2 * len(clean[name]) >= rounds else [s for s, _ in samples[name]] for name in calls}
    return {name: statistics.median(used[name]) for name in calls}, {name: len(clean[name]) for name in calls}


def _foreign_seconds():
    """Processor seconds that other processes and the host have used so far; 0 where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def _timed(call):
    started = time.perf_counter()
    result = _finished(call())
    return time.perf_counter() - started, result


def _finished(result):
    import jax

    return jax.block_until_ready(result)


def _peak_growth(call):
    """Bytes by which a call's peak exceeds what is resident before it; None where the system does not say."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets the high-water mark
        before = _status("VmRSS")
        _finished(call())
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status(field):
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return int(fields[field].split()[0]) * 1024


def _limits(quick):
    """What the devices can do: float32 products and reading of memory, measured."""
    import jax

    from jaxsub.linalg import products

    size, length = (1024, 2**24) if quick else (3072, 2**27)
    x = jax.numpy.ones((size, size), "float32")
    y = jax.numpy.ones((length,), "float32")
    product, total = jax.jit(products.matmul), jax.jit(lambda a: a.sum())
    times, _ = _interleaved({"product": lambda: product(x, x), "read": lambda: total(y)}, 5)
    return {"flops": 2 * size**3 / times["product"], "bytes": 4 * length / times["read"]}


def _machine():
    import jax

    from jaxsub import __version__

    device = jax.devices()[0]
    versions = {"jaxsub": __version__, "jax": jax.__version__, "numpy": np.__version__}
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": getattr(device, "device_kind", device.platform),
        "num_devices": jax.device_count(),
        "versions": versions | {"python": platform.python_version()},
    }


def table(record):
    """The record as text of at most 100 columns."""
    limits, rounds = record["limits"], record["config"]["rounds"]
    lines = [
        f"{record['machine']['num_devices']} x {record['machine']['device']}, {record['machine']['cores']} cores; "
        f"products {limits['flops'] / 1e9:.0f} GFLOP/s, memory {limits['bytes'] / 1e9:.0f} GB/s",
        f"{'workload / peer':25} {'ms':>8} {'ratio':>5} {'first s':>7} {'model ms':>8} {'GFLOP/s':>7} {'GB/s':>5} "
        f"{'MiB':>5} {'KiB sent':>8} {'error':>7}",
    ]
    for row in record["workloads"]:
        lines.append(
            f"{row['workload']:25} {row['seconds'] * 1e3:8.1f} {_noise(row, rounds):>5} "
            f"{row['first_call_seconds']:7.2f} {row['model_seconds'] * 1e3:8.1f} {row['gflops']:7.0f} "
            f"{row['gbytes_per_second']:5.1f} {_mebibytes(row['peak_bytes']):>5} {_sent(row['communication']):>8} "
            f"{row['error']:7.0e}"
        )
        lines += [
            f"  {peer['name'][:23]:23} {peer['seconds'] * 1e3:8.1f} {peer['ratio']:5.2f} "
            f"{_noise(peer, rounds):>7} {'':22} {_mebibytes(peer['peak_bytes']):>5} {'':8} {peer['error']:7.0e}"
            for peer in row["peers"]
        ]
    lines.append("ratio: time of jaxsub / time of the peer; model ms: what arithmetic or memory needs at these rates;")
    lines.append("NOISY: other processes took part of the cores in most samples, the row does not count;")
    lines.append("MiB: peak beyond the inputs; error: against float64, see each workload;")
    lines.append(f"KiB sent: by each of {DEVICES} devices, - where the kernel takes arrays of one device")
    return "\n".join(lines)


def _noise(row, rounds):
    return "NOISY" if 2 * row["clean_samples"] < rounds else ""


def _mebibytes(num_bytes):
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def _sent(communication):
    return "-" if communication is None else f"{communication['bytes_sent'] / 2**10:.1f}"
