"""Order statistics of each model's numbers, exact, from blocks that are read more than once and never sorted.

A float's bits, as an unsigned number, are in the order of the floats once negative ones are turned. Sixteen bits a pass:
a histogram of the first sixteen finds in which bin a rank lies, one of the next sixteen within that bin, and so on.
"""

import concurrent.futures

import numpy as np

DIGIT = 16  # bits a pass
BINS = 1 << DIGIT
THREADS = 4


def magnitudes(rows, ranks):
    """(N, len(ranks)) the numbers of each row at these ranks of |x|, 0 the smallest; see `order_statistics`."""
    return order_statistics(lambda: (np.abs(block.x[:, : block.count]) for block in rows.blocks()), rows, ranks)


def order_statistics(values, rows, ranks):
    """The entries at `ranks` of each model's values in ascending order.

    Args:
        values: () -> iterator of arrays (N, count), the same every time it is called; finite.
        rows: Rows that they belong to, for N and dtype.
        ranks: 0-based, below the number of values of a row.

    Returns:
        (N, len(ranks)) float64. Reads the values twice, four times for float64.
    """
    bits, count = 8 * rows.dtype.itemsize, rows.num_models
    found = [[(0, int(rank)) for rank in ranks] for _ in range(count)]  # (leading bits, rank among what has these)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for shift in range(bits - DIGIT, -1, -DIGIT):
            prefixes = [sorted({prefix for prefix, _ in one}) for one in found]
            counts = [{prefix: np.zeros(BINS, np.int64) for prefix in wanted} for wanted in prefixes]
            for block in values():
                list(pool.map(lambda n, x=block, at=shift, sums=counts: _count(x[n], at, sums[n]), range(count)))
            found = [[_step(counts[n], prefix, rank) for prefix, rank in one] for n, one in enumerate(found)]
    keys = np.array([[prefix for prefix, _ in one] for one in found], np.uint64)
    return _floats(keys, rows.dtype)


def _count(x, shift, sums):
    """Adds the values whose leading bits are known to the histograms of their next bits."""
    keys = _keys(x)
    digits = keys >> shift
    for prefix, total in sums.items():
        part = digits
        if shift + DIGIT < 8 * keys.itemsize:
            part = digits[digits >> DIGIT == prefix] & (BINS - 1)
        total += np.bincount(part.astype(np.intp), minlength=BINS)


def _step(counts, prefix, rank):
    """(prefix, rank) one digit further."""
    sums = np.cumsum(counts[prefix])
    digit = int(np.searchsorted(sums, rank, side="right"))
    return prefix << DIGIT | digit, rank - (int(sums[digit - 1]) if digit else 0)


def _keys(x):
    """Unsigned numbers in the order of the floats x; -0.0 lies just under 0.0."""
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    top = unsigned.type(1 << (8 * x.dtype.itemsize - 1))
    keys = np.ascontiguousarray(x).view(unsigned)
    negative = keys >= top
    return np.where(negative, ~keys, keys | top) if negative.any() else keys | top


def _floats(keys, dtype):
    """The floats that `_keys` made these of."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    keys, top = keys.astype(unsigned), unsigned.type(1 << (8 * dtype.itemsize - 1))
    return np.where(keys >= top, keys & ~top, ~keys).view(dtype).astype(np.float64)
