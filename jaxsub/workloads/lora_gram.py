"""Inner products of LoRA updates from their factors, B @ A never formed."""

import dataclasses

import jax
import numpy as np

from jaxsub import descriptors, placement
from jaxsub.linalg import collectives, gram, pairs
from jaxsub.workloads import _peers

REFERENCE = "<W_i, W_j> = tr((B_i^T B_j)(A_j A_i^T)) (E18)"
BLOCK = 32  # models a block of pairs of the hand-written peers


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the collection, and the dtype that its factors are stored in."""

    models: int = 512
    rank: int = 16
    inputs: int = 4096
    outputs: int = 4096
    stored: str = "float32"


QUICK = Options(models=64, inputs=1024, outputs=1024)


def problem(options, rng):
    """(a (N, r, i), bt (N, r, o)) float32, of entries that the stored dtype has."""
    shapes = [(options.models, options.rank, d) for d in (options.inputs, options.outputs)]
    stored = descriptors.numpy_dtype(options.stored)
    drawn = (rng.standard_normal(s, dtype=np.float32) / np.float32(np.sqrt(s[2])) for s in shapes)
    return tuple(f.astype(stored).astype(np.float32) for f in drawn)


def work(options):
    """(operations of one half of the pairs, bytes of the factors)."""
    width = options.inputs + options.outputs
    return (options.models * options.rank) ** 2 * width, 4 * options.models * options.rank * width


def communication(options):
    """Nothing: each device has the models of its pairs from the host."""
    del options
    return collectives.lora_gram()


def ours(factors, options):
    """A call that computes the (N, N) Gram matrix."""
    mesh = placement.make_mesh()
    dealt = pairs.Deal.create(options.models, options.rank, mesh.size)
    models = dealt.read_by(range(mesh.size))
    more = len(models) - options.models  # none on one device
    padded = [np.pad(f, ((0, more), (0, 0), (0, 0))) if more else f for f in factors]
    placed = [placement.deal(f, models, dealt, mesh) for f in padded]

    def call():
        with jax.enable_x64(True):
            sums = gram.lora_gram(*placed, deal=dealt, mesh=mesh, dtype="float32", stored=options.stored)
            return dealt.assemble(np.asarray(sums.gram))

    return call


def peers(factors, options):
    """The same by hand: two products and an r x r contraction a block of pairs, of all pairs or of one half."""
    count, rank = options.models, options.rank
    rows = [f.reshape(count * rank, -1) for f in factors]

    def by(rows, zeros, *, half):
        def call():
            out = zeros((count, count))
            for p in range(0, count, BLOCK):
                left = [r[p * rank : (p + BLOCK) * rank] for r in rows]
                for q in range(0, p + 1 if half else count, BLOCK):
                    pa, pb = (x @ r[q * rank : (q + BLOCK) * rank].T for x, r in zip(left, rows, strict=True))
                    block = (pa * pb).reshape(len(pa) // rank, rank, -1, rank).sum((1, 3))
                    out[p : p + BLOCK, q : q + BLOCK] = block
                    if half:
                        out[q : q + BLOCK, p : p + BLOCK] = block.T
            return out

        return call

    def zeros(shape):
        return np.zeros(shape, np.float32)

    found = {"numpy, all pairs": by(rows, zeros, half=False), "numpy, half the pairs": by(rows, zeros, half=True)}
    if _peers.torch():
        import torch

        tensors = [torch.from_numpy(r) for r in rows]
        found["torch, half the pairs"] = by(tensors, torch.zeros, half=True)
    return found


def error(factors, options, result):
    """Largest error of an entry among 64 models, relative to the largest entry."""
    a, bt = (f[:64].astype(np.float64) for f in factors)
    n = len(a)
    pa, pb = (f.reshape(n * options.rank, -1) @ f.reshape(n * options.rank, -1).T for f in (a, bt))
    exact = (pa * pb).reshape(n, options.rank, n, options.rank).sum((1, 3))
    return float(np.abs(np.asarray(result)[:n, :n] - exact).max() / np.abs(exact).max())
