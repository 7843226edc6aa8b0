"""What the devices of a sharded kernel exchange, foretold: [(kind, bytes of one device's array)], in no order.

Kinds are XLA's: "all-reduce", of bytes that all devices add up, and "all-to-all", of bytes that a device deals out, its
own share included. One entry a collective that runs; arrays summed at the same point go as one. Features are sharded,
x64 is on, so small sums are float64. Fallbacks for hard inputs (columns nearly dependent, directions near the floor)
are left out: they add a few matrices as small. tests/linalg/test_collectives.py counts the same in compiled programs.
"""

REDUCE, DEAL = "all-reduce", "all-to-all"
WIDE = 8  # bytes of a number that small sums are made in


def sent(collectives, devices):
    """Bytes that leave a device: an all-reduce as a ring sends an array twice but for its own part.

    Source: Patarasuk and Yuan 2009, the least that any all-reduce can send.
    """
    times = {REDUCE: 2, DEAL: 1}
    return sum(times[kind] * num_bytes * (devices - 1) // devices for kind, num_bytes in collectives)


def dense_gram(num_models):
    """`gram.dense_gram` of a block: N x N and the three moments a model."""
    return [(REDUCE, WIDE * (num_models**2 + 3 * num_models + 3))]


def lora_gram():
    """`gram.lora_gram`: nothing, whatever its size. Devices are given whole models, and results stay where they are."""
    return []


def short_gram(size, times=1):
    """`orth.gram` of a long side with so many columns; its two row blocks, where there are two, go together."""
    half = size // 2 if size >= 128 else 0
    return [(REDUCE, WIDE * ((size - half) * size + half**2))] * times


def cholesky_qr2(size):
    """`orth.cholesky_qr2` and `cholesky_lq2` of a long side of so many columns."""
    return short_gram(size, 2)


def times_tests(rows, size, itemsize=4):
    """`range_finder.times_tests`."""
    return [(REDUCE, itemsize * rows * size)]


def gram_svd(rows, rank, itemsize=4):
    """`svd.gram_svd` of (N, D): the Gram matrix, and the largest and smallest entry of each direction for its sign."""
    return [*short_gram(rows), (REDUCE, 2 * itemsize * rank)]


def randomized_svd(rows, rank, size, passes, range_finder="power", itemsize=4):
    """`svd.randomized_svd` with l = `size` test vectors: (N, l) products and (l, l) Gram matrices.

    Between passes the long side is orthonormalised, in two rounds each time. The energy of x goes with the first.
    "krylov" is told for an even number of passes; its core is of l * passes / 2 vectors.
    """
    if range_finder == "krylov":
        blocks = passes // 2
        (kind, first), second = short_gram(size * blocks, 2)
        small = [*short_gram(size, 2 * (blocks - 1)), (kind, first + WIDE), second, (REDUCE, 2 * itemsize * rank)]
        return times_tests(rows, size, itemsize) * blocks + small
    products = times_tests(rows, size, itemsize) * ((passes + 1) // 2)
    small = short_gram(size, passes // 2 * 2 - 1)
    [(kind, last)] = short_gram(size)
    return [*products, *small, (kind, last + WIDE), (REDUCE, 2 * itemsize * rank)]


def incremental_update(kept, batch):
    """`incremental.update`: the Gram matrix of state, batch and the shift of the mean."""
    return [(REDUCE, WIDE * (kept + batch + 1) ** 2)]


def incremental_finish(kept, rank, itemsize=4):
    """`incremental.finish`: the Gram matrix of the state, lengths, signs and overlaps of the components."""
    ends = [(REDUCE, itemsize * rank)] * 2  # the largest and the smallest entry: a kind of sum each
    return [(REDUCE, WIDE * kept**2), (REDUCE, WIDE * (rank + 1)), *ends, (REDUCE, itemsize * rank**2)]


def mode_gram(num_models, shape, axis, devices, itemsize=4):
    """`modes.mode_gram` of a block of weights: as many models as there are devices dealt out at a time; and the sum.

    Every device then holds one model whole. A block wider than prod(shape), padded, deals that much more.
    """
    features = 1
    for length in shape:
        features *= length
    # A step moves D' numbers a device whatever there is of models: rows that are missing are dealt as zeros.
    steps = -(-num_models // devices)
    width = -(-features // devices) * devices
    return [(DEAL, itemsize * width)] * steps + [(REDUCE, WIDE * shape[axis] ** 2)]
