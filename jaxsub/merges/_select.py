"""Order statistics of each model's numbers, exact, from blocks that are read more than once and never sorted.

A float's bits, as an unsigned number, are in the order of the floats once negative ones are turned. A few bits a pass:
a histogram of the leading ones finds in which bin a rank lies, one of the next ones within that bin, and so on. Numbers
are counted a chunk at a time, which stays in the cache; what a chunk has in a bin of a later pass is little.
"""

import concurrent.futures

import numpy as np

DIGITS = {4: (12, 12, 8), 8: (12, 13, 13, 13, 13)}  # bits of each pass, by bytes of the numbers
CHUNK = 1 << 16
THREADS = 4


def magnitudes(rows, ranks):
    """(N, len(ranks)) the numbers of each row at these ranks of |x|, 0 the smallest; see `order_statistics`."""
    return order_statistics(lambda: (block.x[:, : block.count] for block in rows.blocks()), rows, ranks, magnitude=True)


def order_statistics(values, rows, ranks, *, magnitude=False):
    """The entries at `ranks` of each model's values in ascending order.

    Args:
        values: () -> iterator of arrays (N, count), the same every time it is called; finite.
        rows: Rows that they belong to, for N and dtype.
        ranks: 0-based, below the number of values of a row.
        magnitude: of their magnitudes.

    Returns:
        (N, len(ranks)) float64. Reads the values three times, five times for float64.
    """
    size, count = rows.dtype.itemsize, rows.num_models
    found = [[(0, int(rank)) for rank in ranks] for _ in range(count)]  # (leading bits, rank among what has these)
    left = 8 * size
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for digit in DIGITS[size]:
            left -= digit
            counts = [{prefix: np.zeros(1 << digit, np.int64) for prefix, _ in one} for one in found]
            for block in values():
                work = (
                    pool.submit(
                        _count, block[n], left, digit, counts[n], is_first=left + digit == 8 * size, magnitude=magnitude
                    )
                    for n in range(count)
                )
                for done in [*work]:
                    done.result()
            found = [[_step(counts[n], prefix, rank, digit) for prefix, rank in one] for n, one in enumerate(found)]
    keys = np.array([[prefix for prefix, _ in one] for one in found], np.uint64)
    return _floats(keys, rows.dtype)


def _count(x, shift, digit, counts, *, is_first, magnitude):
    """Adds values to the histograms of their next bits, one for each of the leading bits that matter."""
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    shift, width = unsigned.type(shift), unsigned.type(digit)
    for start in range(0, x.size, CHUNK):
        keys = _keys(x[start : start + CHUNK], unsigned, magnitude) >> shift
        if is_first:
            (total,) = counts.values()
            total += np.bincount(keys.astype(np.intp), minlength=len(total))
            continue
        leading = keys >> width
        for prefix, total in counts.items():
            part = keys[leading == prefix] & unsigned.type(len(total) - 1)
            if part.size:
                total += np.bincount(part.astype(np.intp), minlength=len(total))


def _step(counts, prefix, rank, digit):
    """(prefix, rank) one digit further."""
    sums = np.cumsum(counts[prefix])
    at = int(np.searchsorted(sums, rank, side="right"))
    return prefix << digit | at, rank - (int(sums[at - 1]) if at else 0)


def _keys(x, unsigned, magnitude):
    """Unsigned numbers in the order of the floats x, or of their magnitudes; -0.0 lies just under 0.0."""
    keys, top = np.ascontiguousarray(x).view(unsigned), unsigned.type(1 << (8 * unsigned.itemsize - 1))
    if magnitude:
        return keys | top
    negative = keys >= top
    return np.where(negative, ~keys, keys | top) if negative.any() else keys | top


def _floats(keys, dtype):
    """The floats that `_keys` made these of."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    keys, top = keys.astype(unsigned), unsigned.type(1 << (8 * dtype.itemsize - 1))
    return np.where(keys >= top, keys & ~top, ~keys).view(dtype).astype(np.float64)
