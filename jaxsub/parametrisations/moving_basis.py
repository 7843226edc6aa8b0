"""Basis and coefficients together: W = start + sum_j c_j V_j with V kept orthonormal while it is trained.

`qr`, `polar` and `newton_schulz` train an unconstrained matrix and orthonormalise it in every step; `riemannian` trains
the frame itself and needs an optimizer that keeps it on the manifold (`--optimizer=riemannian_sgd`).
"""

import dataclasses

import jax.numpy as jnp

from jaxsub import errors
from jaxsub.linalg import frames
from jaxsub.parametrisations import _spaces

REFERENCE = "Zhou et al. 2019, Continuity of rotation representations; Wang et al. 2023, Grassmann class representation"
NEEDS_SPACES = True
MANIFOLD = "riemannian_sgd"  # the optimizer for frames
METHODS = {"qr": frames.qr, "polar": frames.polar, "newton_schulz": frames.newton_schulz, "riemannian": None}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 0  # components a layer; 0: all that the bundle holds
    method: str = "newton_schulz"  # qr, polar, newton_schulz or riemannian


def require_optimizer(options, optimizer):
    """Refuses to train a frame itself with steps that leave the manifold: V V^T - I came to 159 with Adam, unsaid."""
    if options.method == "riemannian" and optimizer != MANIFOLD:
        raise errors.ConfigError(
            f"method=riemannian: optimizer={optimizer} does not keep frames orthonormal; give --optimizer={MANIFOLD}, "
            "or another method"
        )


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: {"c": (k,) zeros, "frame": (k, D)}}, the bundle's basis first."""
    errors.require_known("method", options.method, METHODS)
    del key
    trainable = {}
    for name, space in spaces.items():
        basis = _spaces.chosen(space, options.rank, name)
        frame = jnp.asarray(basis.reshape(len(basis), -1))
        trainable[name] = {"c": jnp.zeros(len(basis), jnp.float32), "frame": frame}
    return trainable, {"start": start}


def params(trainable, frozen, options):
    """See `parametrisations`."""
    found = dict(frozen["start"])
    orthonormal = METHODS[options.method]
    for name, parts in trainable.items():
        frame = parts["frame"] if orthonormal is None else orthonormal(parts["frame"])
        found[name] = found[name] + (parts["c"] @ frame).reshape(found[name].shape)
    return found
