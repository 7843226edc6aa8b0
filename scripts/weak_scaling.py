"""What a pod run would take, on paper: nothing is measured here, no device is needed.

    python scripts/weak_scaling.py                        # H100, 8, 64 and 512 devices, stacks read from disk
    python scripts/weak_scaling.py --machine=v5e --resident   # TPU v5e, stacks already in the devices' memory
    python scripts/weak_scaling.py --flops=40e12 --disk=1e9 --link=8:300e9:3e-6 --link=0:25e9:10e-6    # your own

    seconds = max(arithmetic, memory, disk) + exchange        per device, reading and computing overlapped

Features per device are held constant while devices are added; efficiency is the time of one device over the time of P.
The last case is of fixed size, 50 models of 8e9 float16 weights (800 GB) in 291 tensors, as an 8B Llama has them: there
it is the time of one device over P times that of P. Arithmetic and memory are `work` of the workload of `jaxsub bench`,
exchange is its `communication`, which tests/linalg/test_collectives.py counts in compiled programs. An all-reduce of b
bytes over P devices takes 2 (P-1)/P b / bandwidth + 2 (P-1) latency; where links differ, it is scattered over the near
ones first, and a share of it goes over the far ones. Stacks read from disk are summed in blocks of 128 MiB a host, at
least one a layer, with one exchange each.

Not in the model: kernels below the peak rate (give --flops as `jaxsub bench` measures it), dispatch of kernels, N x N
eigenproblems on the host (20 ms at N = 512), float64 sums that a TPU emulates, an all-to-all on a ring, which takes up
to 4 times as long as on a switch. Rings are slower than the trees that libraries take for small arrays: far links count
for more here than they may.

Presets, per device:
h100  67 TFLOP/s float32, 3.35 TB/s, NVLink 900 GB/s in both directions together: NVIDIA H100 SXM data sheet.
      400 Gb/s InfiniBand a GPU, 8 GPUs a host, reading at 40 GB/s a host: DGX SuperPOD H100 reference architecture,
      RA-11333-001. Latency of a ring's step 1.9 us on NVLink and 4 us on the network: NCCL's own model,
      src/graph/tuning.cc, protocol LL128.
v5e   197 TFLOP/s bfloat16, six such products for a float32 one (jax.lax.Precision.HIGHEST); 819 GB/s; a torus of
      16 x 16; a network of 6.4 Tb/s for the 256 chips of a pod, over which files come too; 8 chips a host:
      cloud.google.com/tpu/docs/v5e. 45 GB/s each way a link, two links an axis, about 1 us a hop: "How to Scale Your
      Model", jax-ml.github.io/scaling-book, parts 2 and 3. Between pods 10 us, assumed.
"""

import argparse
import dataclasses
import math

from jaxsub.linalg import collectives
from jaxsub.workloads import gram_pca, randomized_svd

BLOCK_BYTES = 128 * 2**20  # a host, as jaxsub.pipelines.layers.Options
SIDE = 1024  # length of the weight axis whose mode Gram is made


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one device, a second; `links` from near to far: devices in a ring (0: all others), bytes, step."""

    flops: float
    memory: float
    disk: float
    host: int  # devices that share a process and its blocks
    links: tuple[tuple[int, float, float], ...]


MACHINES = {
    "h100": Machine(67e12, 3.35e12, 40e9 / 8, 8, ((8, 450e9, 1.9e-6), (0, 50e9, 4e-6))),
    "v5e": Machine(197e12 / 6, 819e9, 6.4e12 / 8 / 256, 8, ((16, 90e9, 1e-6), (16, 90e9, 1e-6), (0, 3.125e9, 1e-5))),
}


def exchange_seconds(exchanged, devices, machine):
    """Seconds of the collectives [(kind, bytes)] over so many devices, one after another."""
    times = {collectives.REDUCE: _all_reduce, collectives.DEAL: _all_to_all}
    return sum(times[kind](num_bytes, devices, machine.links) for kind, num_bytes in exchanged)


def _all_reduce(num_bytes, devices, links):
    seconds = 0.0
    for size, bandwidth, latency in links:
        ring = min(size or devices, devices)
        seconds += 2 * (ring - 1) / ring * num_bytes / bandwidth + 2 * (ring - 1) * latency
        num_bytes, devices = num_bytes / ring, -(-devices // ring)
    return seconds


def _all_to_all(num_bytes, devices, links):
    seconds, near = 0.0, 1
    for size, bandwidth, latency in links:
        far = min(near * size if size else devices, devices)
        seconds += num_bytes * (far - near) / devices / bandwidth + (-(-far // near) - 1) * latency
        near = far
    return seconds


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of one device."""

    arithmetic: float
    memory: float
    disk: float
    exchange: float

    @property
    def total(self):
        return max(self.arithmetic, self.memory, self.disk) + self.exchange


def cost(machine, devices, *, flops, moved, stored, exchanged):
    """Cost of a device that does `flops`, moves and reads so many bytes, and takes part in the collectives."""
    exchange = exchange_seconds(exchanged, devices, machine)
    return Cost(flops / machine.flops, moved / machine.memory, stored / machine.disk, exchange)


def blocks(machine, devices, stored, block_bytes, layers=1):
    """Blocks that a host's part of a stack comes in, `stored` bytes a device; where nothing is read, one a layer."""
    return max(layers, math.ceil(stored * min(devices, machine.host) / block_bytes))


def gram(machine, devices, models, features, *, itemsize=4, resident=False, block_bytes=BLOCK_BYTES, layers=1):
    """Gram matrices of `models` rows with `features` columns a device, in so many layers."""
    options = gram_pca.Options(models=models, features=features * devices)
    flops, num_bytes = (w / devices for w in gram_pca.work(options))
    stored = 0 if resident else itemsize * models * features
    each = gram_pca.communication(options)
    exchanged = each * blocks(machine, devices, stored, block_bytes, layers)
    return cost(machine, devices, flops=flops, moved=num_bytes * itemsize / 4, stored=stored, exchanged=exchanged)


def svd(machine, devices, models, features, *, itemsize=4, resident=False, block_bytes=BLOCK_BYTES):
    """Randomized SVD, k = 32 with 16 more test vectors, 4 passes over a stack that is read once and held."""
    sizes = {"rows": models, "columns": features * devices, "rank": 32, "oversample": 16, "passes": 4}
    options = randomized_svd.Options(**sizes, range_finder="power")
    flops, num_bytes = (w / devices for w in randomized_svd.work(options))
    stored = 0 if resident else itemsize * models * features
    exchanged = randomized_svd.communication(options)
    return cost(machine, devices, flops=flops, moved=num_bytes, stored=stored, exchanged=exchanged)


def mode(machine, devices, models, features, *, itemsize=4, resident=False, block_bytes=BLOCK_BYTES):
    """Mode Gram of the last axis of weights (rows, SIDE): whole models are dealt out, so N devices at most work."""
    stored = 0 if resident else itemsize * models * features
    number = blocks(machine, devices, stored, block_bytes)
    rows = max(1, features * devices // SIDE // number)
    exchanged = collectives.mode_gram(models, (rows, SIDE), 1, devices) * number
    own = -(-models // devices) * features * devices  # numbers of the models that the busiest device multiplies
    moved = itemsize * models * features + 4 * own
    return cost(machine, devices, flops=2 * SIDE * own, moved=moved, stored=stored, exchanged=exchanged)


CASES = {
    "Gram, N = 50": (gram, 50),
    "Gram, N = 500": (gram, 500),
    "randomized SVD, N = 500, k = 32": (svd, 500),
    f"mode Gram of {SIDE}, N = 50": (mode, 50),
    f"mode Gram of {SIDE}, N = 500": (mode, 500),
}
LARGE = "50 x 8e9 float16, Gram"
LARGE_WEIGHTS, LARGE_LAYERS = 8 * 10**9, 291


def table(machine, devices, features, *, itemsize=4, resident=False, block_bytes=BLOCK_BYTES):
    """Lines of text, and {(case, devices): (Cost, efficiency)}."""
    found = {}
    for name, (case, models) in CASES.items():
        options = {"itemsize": itemsize, "resident": resident, "block_bytes": block_bytes}
        costs = {p: case(machine, p, models, features, **options) for p in (1, *devices)}
        found |= {(name, p): (c, costs[1].total / c.total) for p, c in costs.items()}
    large = {"itemsize": 2, "block_bytes": block_bytes, "layers": LARGE_LAYERS}
    costs = {p: gram(machine, p, 50, -(-LARGE_WEIGHTS // p), **large) for p in (1, *devices)}
    found |= {(LARGE, p): (c, costs[1].total / p / c.total) for p, c in costs.items()}
    heads = " ".join(f"{head:>9}" for head in ("arithm.", "memory", "disk", "exchange", "seconds"))
    lines = [f"{'case':32} {'devices':>7} {heads} {'eff.':>5}"]
    for (name, p), (c, share) in found.items():
        numbers = " ".join(f"{s:9.3g}" for s in (c.arithmetic, c.memory, c.disk, c.exchange, c.total))
        lines.append(f"{name:32} {p:7} {numbers} {share:5.0%}")
    return lines, found


def link(text):
    """(devices, bytes a second, seconds a step) of DEVICES:BANDWIDTH:LATENCY."""
    size, bandwidth, latency = text.split(":")
    return int(size), float(bandwidth), float(latency)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--machine", choices=sorted(MACHINES), default="h100", help="preset of all rates")
    for name in ("flops", "memory", "disk"):
        parser.add_argument(f"--{name}", type=float, help="of one device, a second, in place of the preset's")
    parser.add_argument("--host", type=int, help="devices that share a process")
    parser.add_argument(
        "--link", type=link, action="append", help="DEVICES:BANDWIDTH:LATENCY, from near to far, 0: rest"
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--features", type=int, default=2**22, help="weights of a model on one device")
    parser.add_argument("--itemsize", type=int, default=4, help="bytes of a stored weight")
    parser.add_argument("--block_bytes", type=int, default=BLOCK_BYTES, help="stored bytes of a block, a host")
    parser.add_argument(
        "--resident", action="store_true", help="stacks lie in the devices' memory: no reading, one block"
    )
    given = parser.parse_args(argv)
    if given.link and given.link[-1][0] != 0:
        parser.error("the last --link takes all devices that are left: give it 0 devices")
    changes = {name: getattr(given, name) for name in ("flops", "memory", "disk", "host") if getattr(given, name)}
    changes |= {"links": tuple(given.link)} if given.link else {}
    machine = dataclasses.replace(MACHINES[given.machine], **changes)
    options = {"itemsize": given.itemsize, "resident": given.resident, "block_bytes": given.block_bytes}
    print("\n".join(table(machine, given.devices, given.features, **options)[0]))


if __name__ == "__main__":
    main()
