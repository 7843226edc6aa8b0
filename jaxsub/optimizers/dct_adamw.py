"""AdamW on matrices with its moments in r columns of a fixed orthogonal basis: the discrete cosine transform.

    S = G Q          the gradient in the basis, along the shorter side
    keep             the r columns of S with the largest norm, chosen anew every `update_every` steps
    update           Adam on S[:, kept], back by Q[:, kept]^T; what was left out is added to the next gradient

No decomposition is computed. At full rank it is AdamW in another basis of the columns: equal to it for Q = 1 alone, and
so compared in the tests. Vectors, and matrices wider than 32,000, are left to AdamW itself.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsub import errors

REFERENCE = "Modoranu et al. 2025, SVD-free low-rank adaptive optimisation"
KINDS = ("dct2", "dct3", "identity")
WIDEST = 32000


class Columns(typing.NamedTuple):
    """State of one matrix (m, n), n the shorter side."""

    kept: jax.Array  # (r,) int32 columns of the basis
    first: jax.Array  # (m, r)
    second: jax.Array  # (m, r)
    left_out: jax.Array  # (m, n) what was not applied yet, or (0, 0)


def basis(kind, n):
    """(n, n) orthogonal: "dct2" or "dct3", or "identity"; columns are frequencies of the transform of that type."""
    k, i = np.arange(n)[None], np.arange(n)[:, None]
    two = np.sqrt(2 / n) * np.cos(np.pi * (i + 0.5) * k / n)
    two[:, 0] = np.sqrt(1 / n)
    return {"dct2": two, "dct3": two.T, "identity": np.eye(n)}[kind]


def select_columns(transformed, rank, *, norm="l1"):
    """(r,) int32 sorted places of the columns of (m, n) with the largest l1 (as published) or l2 norms."""
    sizes = jnp.sum(jnp.abs(transformed) if norm == "l1" else jnp.square(transformed), axis=0)
    return jnp.sort(jax.lax.top_k(sizes, rank)[1]).astype(jnp.int32)


def make(
    learning_rate,
    rank=8,
    update_every=1,
    error_feedback=True,
    kind="dct2",
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
):
    """The optax transformation.

    Args:
        learning_rate: scalar.
        rank: columns kept, at most the shorter side.
        update_every: steps between choices of columns.
        error_feedback: whether what was left out is kept and added to the next gradient.
        kind: see `basis`.
        b1, b2, eps, weight_decay: as of AdamW.
    """
    errors.require_known("kind", kind, KINDS)

    def is_matrix(p):
        return p.ndim == 2 and min(p.shape) <= WIDEST

    def init(params):
        def one(p):
            if not is_matrix(p):
                return (jnp.zeros_like(p), jnp.zeros_like(p))
            m, n = max(p.shape), min(p.shape)
            r = min(rank, n)
            nothing = jnp.zeros((m, n) if error_feedback and r < n else (0, 0), p.dtype)
            return Columns(
                jnp.arange(r, dtype=jnp.int32), jnp.zeros((m, r), p.dtype), jnp.zeros((m, r), p.dtype), nothing
            )

        return {"count": jnp.zeros((), jnp.int32), "leaves": [one(p) for p in jax.tree.leaves(params)]}

    def adam(g, first, second, count):
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * jnp.square(g)
        step = (first / (1 - b1**count)) / (jnp.sqrt(second / (1 - b2**count)) + eps)
        return step, first, second

    def matrix(g, state, count):
        is_wide = g.shape[0] < g.shape[1]
        g = g.T if is_wide else g
        q = jnp.asarray(basis(kind, g.shape[1]), g.dtype)
        if state.left_out.size:
            g = g + state.left_out
        transformed = g @ q
        r = state.kept.shape[0]
        chosen = jnp.where((count - 1) % update_every == 0, select_columns(transformed, r), state.kept)
        # Moments follow their columns: Q_old^T Q_new is a partial permutation, so that squares stay positive.
        same = (state.kept[:, None] == chosen[None, :]).astype(g.dtype)
        own = jnp.take(transformed, chosen, axis=1)
        step, first, second = adam(own, state.first @ same, state.second @ same, count)
        columns = jnp.take(q, chosen, axis=1)
        left = g - own @ columns.T if state.left_out.size else state.left_out
        back = step @ columns.T
        return (back.T if is_wide else back), Columns(chosen, first, second, left)

    def update(gradients, state, params=None):
        leaves, structure = jax.tree.flatten(gradients)
        own = jax.tree.leaves(params) if params is not None else [None] * len(leaves)
        count, moved, states = state["count"] + 1, [], []
        for g, s, p in zip(leaves, state["leaves"], own, strict=True):
            if isinstance(s, Columns):
                step, s = matrix(g, s, count)
            else:
                step, *s = adam(g, *s, count)
                s = tuple(s)
            step = step + weight_decay * p if weight_decay and p is not None else step
            moved.append((-learning_rate * step).astype(g.dtype))
            states.append(s)
        return jax.tree.unflatten(structure, moved), {"count": count, "leaves": states}

    return optax.GradientTransformation(init, update)
