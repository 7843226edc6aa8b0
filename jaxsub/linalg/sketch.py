"""Random test matrices whose row i depends on the key and on i alone.

So a device draws the rows of its own features, a stream those of its next block, and padding at the end changes
nothing: the same matrix for every number of devices and every cut into blocks. All have E[t @ t.T] = l I for their
(m, l) matrix t, and entries of mean square 1. They stay dense: a product with one costs the same whatever its
kind, and what sign and sparse ones save is the drawing.
"""

import jax
import jax.numpy as jnp

from jaxsub.linalg import operands

NONZEROS = 8  # a row of `sparse`: Tropp, Yurtsever, Udell, Cevher 2019


def gaussian(key, rows, columns, *, start=0):
    """(rows, columns) float32 independent standard normal entries, rows `start` ... of an endless matrix.

    Args:
        key: typed PRNG key.
        rows: number of rows, static.
        columns: number l of test vectors, static; the first entries of a row do not depend on it being even.
        start: () int32 first row, may be traced.

    Source: Halko, Martinsson, Tropp 2011.
    """
    return jax.vmap(lambda k: jax.random.normal(k, (columns,), jnp.float32))(_row_keys(key, rows, start))


def sign(key, rows, columns, *, start=0):
    """(rows, columns) float32 independent entries +1 or -1, one random bit each. Arguments as in `gaussian`.

    Fails on: one test vector against rows that differ in few entries; then l of them are far from l directions.
    Source: Rademacher test matrices, Martinsson and Tropp 2020.
    """
    return jax.vmap(lambda k: random_signs(k, (columns,), jnp.float32))(_row_keys(key, rows, start))


def random_signs(key, shape, dtype):
    """+1 or -1, one random bit each: 25 times faster than one random number each."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 32)), jnp.uint32)
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (2 * bits.astype(dtype) - 1).reshape(*shape[:-1], 32 * words.shape[-1])[..., : shape[-1]]


def sparse(key, rows, columns, *, start=0, nonzeros=NONZEROS):
    """(rows, columns) float32 with `nonzeros` entries +-sqrt(l / nonzeros) a row, one in each of as many column groups.

    `nonzeros=1` is the count-sketch. Arguments otherwise as in `gaussian`; no more nonzeros than columns are used.

    Fails on: matrices whose energy lies in fewer than about l columns, for which rows collide; take `gaussian` there.
    Source: Nelson and Nguyen 2013, "OSNAP", block construction; Clarkson and Woodruff 2013 (count-sketch).
    """
    count = min(nonzeros, columns)
    edges = jnp.asarray([columns * j // count for j in range(count + 1)], jnp.uint32)
    words = jax.vmap(lambda k: jax.random.bits(k, (count, 2), jnp.uint32))(_row_keys(key, rows, start))
    # The remainder favours low columns by columns / 2**32, which is no bias that could be seen.
    places = (edges[:-1] + words[..., 0] % (edges[1:] - edges[:-1])).astype(jnp.int32)
    values = (2 * (words[..., 1] & 1).astype(jnp.float32) - 1) * (columns / count) ** 0.5
    return jnp.zeros((rows, columns), jnp.float32).at[jnp.arange(rows)[:, None], places].set(values)


def count_sketch(key, rows, columns, *, start=0):
    """(rows, columns) float32 with one entry +-sqrt(l) a row: `sparse` with a single nonzero."""
    return sparse(key, rows, columns, start=start, nonzeros=1)


TESTS = {"gaussian": gaussian, "sign": sign, "sparse": sparse, "count_sketch": count_sketch}


def named(test):
    """The function called `test` in TESTS, or `test` itself: see `operands.step`."""
    return operands.step("test", test, TESTS)


def _row_keys(key, rows, start):
    index = jnp.asarray(start, jnp.uint32) + jnp.arange(rows, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
