"""Gradient descent on subspaces: frames (k, D) move along geodesics, all else as plain gradient descent with momentum.

    g <- momentum g + gradient;   h = -rate (g - g x^T x);   x <- exp(x, h)

A leaf called "frame" is a frame with orthonormal rows; only its span is meant, so that its rows do not turn in it.
"""

import jax
import jax.numpy as jnp
import optax

from jaxsub.linalg import grassmann, products

REFERENCE = "Wang et al. 2023, Get the best of both worlds: Grassmann class representation, algorithm 1"


def make(learning_rate, momentum=0.9):
    """The optax transformation.

    Args:
        learning_rate: scalar.
        momentum: of gradients, kept in the ambient space as published.
    """

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(gradients, state, params=None):
        state = jax.tree.map(lambda s, g: momentum * s + g, state, gradients)
        moved = jax.tree_util.tree_map_with_path(
            lambda path, s, p: _geodesic(p, -learning_rate * s) if _is_frame(path) else -learning_rate * s,
            state,
            params,
        )
        return moved, state

    return optax.GradientTransformation(init, update)


def _is_frame(path):
    return bool(path) and getattr(path[-1], "key", None) == "frame"


def _geodesic(x, direction):
    """What to add to a frame so that it moves along a direction's horizontal part."""
    moved = grassmann.exponential(x, grassmann.project_tangent(x, direction))
    # One Newton-Schulz step takes off the drift that many exponentials would add up (instead of a QR every few steps).
    return 1.5 * moved - 0.5 * products.matmul(products.matmul(moved, moved.T), moved) - x
