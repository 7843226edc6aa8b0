"""A long side taken a piece at a time, so that no copy of the whole is made; and by several programs side by side.

On CPU the threads of one program wait for one another after every product, and of small products one thread does all:
64 rows of 2**20 columns take two cores as long as one (jax 0.10.2). So where the pieces are many, several programs
take a share of them each, from threads of their own.
"""

from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import hostmemory

MANY = 16  # pieces a program, at least
MOST = 8  # programs


def fold(step, length, piece, carry, share=None):
    """step(start, size, carry) over `length` in pieces of `piece`, the last one shorter; nothing is padded.

    Args:
        step: function of (() int32 or int, size, carry), size static; compiled for two sizes at most.
        length, piece: static; a piece is at most the length, and at least 1.
        carry: pytree of arrays.
        share: (() int32 index, number) of the share of the pieces to take, or None for all.

    Returns:
        The carry after the last piece.
    """
    piece = max(1, min(piece, length))
    whole, left = divmod(length, piece)
    return folds(step, whole, piece, lambda carry: step(whole * piece, left, carry) if left else carry, carry, share)


def part(x, start, size, axis=0):
    """`size` entries of x along `axis` from `start` on, to be traced; see `box`."""
    starts, sizes = [0] * x.ndim, list(x.shape)
    starts[axis], sizes[axis] = start, size
    return box(x, starts, sizes)


def box(x, starts, sizes):
    """jax.lax.dynamic_slice that makes no float32 copy of a whole bfloat16 array, to be traced.

    XLA on CPU has no slices of bfloat16: it converts the operand, and takes that out of a loop over parts of it, as
    the same in each turn (jax 0.10.2; float16 is spared). Tied to where a part begins it is another in each turn, and
    a part alone is converted.
    """
    starts = tuple(jnp.asarray(at, int) for at in starts)  # of one dtype, that literals have
    if x.dtype == jnp.bfloat16:
        x, starts = jax.lax.optimization_barrier((x, starts))
    return jax.lax.dynamic_slice(x, starts, sizes)


def folds(step, whole, piece, last, carry, share=None):
    """`fold` over `whole` pieces, where what is left is up to `last`, a function of the carry to the carry."""
    if share is None:
        return last(jax.lax.fori_loop(0, whole, lambda j, c: step(j * piece, piece, c), carry))
    index, number = jnp.asarray(share[0], int), share[1]  # of the dtype that literals have
    first, end = whole * index // number, whole * (index + 1) // number
    carry = jax.lax.fori_loop(first, end, lambda j, c: step(j * piece, piece, c), carry)
    return jax.lax.cond(index == number - 1, last, lambda carry: carry, carry)


def programs(x, count):
    """Number of programs that `count` pieces of x are worth: 1 in traced functions, and but for one CPU device."""
    if is_traced(x):
        return 1
    devices = x.devices() if isinstance(x, jax.Array) else set(jax.local_devices()[:1])
    return number(count) if [d.platform for d in devices] == ["cpu"] else 1


def is_traced(*arrays):
    """Whether one of them is, or arrays would be that are made now: threads have no part in their trace."""
    return any(isinstance(a, jax.core.Tracer) for a in (*arrays, jax.device_put(np.int32(0))))


def number(count):
    """Number of programs that `count` pieces are worth on this machine's cores."""
    return max(1, min(hostmemory.cores(), MOST, count // MANY))


def side_by_side(kernel, x, number):
    """[kernel(x, 0), ..., kernel(x, number - 1)], each from a thread of its own; waited for."""
    is_wide, x = jax.config.jax_enable_x64, jax.device_put(x)  # once for all

    def run(index):
        with jax.enable_x64(is_wide):  # threads do not inherit it
            return jax.block_until_ready(kernel(x, np.int32(index)))

    with futures.ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))
