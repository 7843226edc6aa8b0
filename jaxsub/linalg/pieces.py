"""A long side taken a piece at a time, so that no copy of the whole is made."""

import jax


def fold(step, length, piece, carry):
    """step(start, size, carry) over `length` in pieces of `piece`, the last one shorter; nothing is padded.

    Args:
        step: function of (() int32 or int, size, carry), size static; compiled for two sizes at most.
        length, piece: static; a piece is at most the length, and at least 1.
        carry: pytree of arrays.

    Returns:
        The carry after the last piece.
    """
    piece = max(1, min(piece, length))
    carry = jax.lax.fori_loop(0, length // piece, lambda j, c: step(j * piece, piece, c), carry)
    return step(length // piece * piece, length % piece, carry) if length % piece else carry
