"""Where coefficients start: a member, or what a few examples say, with or without the members' distribution.

    nearest     the member whose weights have the smallest loss on the examples
    ridge       argmin_c |f(0) + J c - t|^2 + strength |c / s|^2        t one-hot answers, s the members' spread
    posterior   mode of p(c | examples) for c ~ N(m, S), the members' mean and covariance: Gauss-Newton steps

J is the derivative of the outputs by all coefficients at once; the examples are training rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors

KINDS = ("base", "mean", "fresh", "nearest", "ridge", "posterior")
BY_EXAMPLES = KINDS[3:]
SHRINKAGE = 0.1  # share of the members' covariance that is its diagonal: there are fewer members than numbers
STEPS = 8


def unflattener(tree):
    """Function from vectors (K,) to trees like `tree`, of arrays or ShapeDtypeStructs."""
    leaves, structure = jax.tree.flatten(tree)
    sizes = np.cumsum([math.prod(leaf.shape) for leaf in leaves])[:-1].tolist()

    def back(vector):
        parts = jnp.split(vector, sizes)
        return jax.tree.unflatten(structure, [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)])

    return back


def members(spaces, like):
    """(N, K) coefficients of the bundle's models, in the order of `unflattener(like)`.

    Args:
        spaces: {layer: Space}.
        like: {layer: (k...)} coefficients that are trained: the first of the members', where fewer are.

    Raises:
        ConfigError: layers that not all models have, or trained numbers that are no coefficients of the bundle.
    """
    for name in sorted(like):
        if name not in spaces:
            raise errors.ConfigError(
                f"layer {errors.quote(name)}: the bundle has no members of it to start from; start from mean or base, "
                "or give --bundle=FOLDER and a parametrisation of its coefficients"
            )
    rows, counts = [], {len(spaces[name].members) for name in like}
    if len(counts) > 1:
        raise errors.ConfigError("initial: the bundle's layers have different members; start from mean")
    for name, c in sorted(like.items()):
        own = spaces[name].members
        if not hasattr(c, "shape") or any(k > have for k, have in zip(c.shape, own.shape[1:], strict=True)):
            raise errors.ConfigError(
                f"layer {errors.quote(name)}: what is trained are no coefficients of the bundle's members; start from "
                "mean or base"
            )
        own = own[(slice(None), *(slice(k) for k in c.shape))]
        rows.append(own.reshape(len(own), -1))
    return np.concatenate(rows, axis=1)


def nearest(outputs, given, loss, candidates):
    """The candidate (K,) of (N, K) whose outputs have the smallest loss on the examples.

    Args:
        outputs: function of a vector (K,) and `given` to outputs (m, ..., o).
        given: tree with what the outputs are of, "targets" (m, ...) among it.
        loss: function of outputs and targets.
        candidates: (N, K).
    """
    candidates = jnp.asarray(candidates, jnp.float32)
    return candidates[jnp.argmin(_losses(candidates, given, outputs=outputs, loss=loss))]


@functools.partial(jax.jit, static_argnames=("outputs", "loss"))
def _losses(candidates, given, *, outputs, loss):
    return jax.lax.map(lambda c: loss(outputs(c, given), given["targets"]), candidates, batch_size=16)


def ridge(outputs, given, candidates, *, strength=1.0):
    """Least squares of linearised outputs to one-hot answers, coefficients measured by the members' spread.

    Args:
        outputs, given: as of `nearest`; targets are class numbers, negative ones do not count.
        candidates: (N, K) members' coefficients.
        strength: of the penalty, in units of one example.

    Returns:
        (K,) float32.
    """
    spread = jnp.asarray(spread_of(candidates))
    jacobian, at, targets = _linear(jnp.zeros_like(spread), given, outputs=outputs)
    count = at.shape[1]
    asked = (targets >= 0)[:, None].astype(jnp.float32)
    # An answer shall stand above the others by log(o - 1) + 2, which gives it a probability of .88.
    off = jax.nn.one_hot(targets, count) * (math.log(max(count - 1, 1)) + 2) - at
    # Of softmax outputs only differences within a row count.
    off = asked * (off - off.mean(axis=1, keepdims=True))
    jacobian = asked[..., None] * (jacobian - jacobian.mean(axis=1, keepdims=True)) * spread
    square = jnp.einsum("mok,mol->kl", jacobian, jacobian)
    slope = jnp.einsum("mok,mo->k", jacobian, off)
    return spread * jnp.linalg.solve(square + strength * jnp.eye(len(spread)), slope)


def posterior(outputs, given, candidates):
    """Mode of the coefficients' posterior under cross-entropy and the members' Gaussian distribution.

    Arguments as of `ridge`; the members' covariance is shrunk towards its diagonal by SHRINKAGE.

    Returns:
        (K,) float32. A step that does not lower the objective is halved, and dropped after ten halvings.

    Source: Fisher scoring for the softmax likelihood; shrinkage, Ledoit and Wolf 2004, with a fixed share.
    """
    own = np.asarray(candidates, np.float64)
    prior = (jnp.asarray(own.mean(axis=0), jnp.float32), jnp.asarray(np.linalg.inv(_covariance(own)), jnp.float32))
    c = prior[0]
    for _ in range(STEPS):
        step, now = _newton(c, prior, given, outputs=outputs)
        tried = (c - step * 0.5**n for n in range(10))
        better = next((t for t in tried if _objective(t, prior, given, outputs=outputs) < now), None)
        if better is None:
            break
        c = better
    return c


@functools.partial(jax.jit, static_argnames="outputs")
def _objective(c, prior, given, *, outputs):
    """Minus the log of the posterior's density, but for a constant."""
    found, targets = _rows(outputs(c, given), given)
    logs = jax.nn.log_softmax(found)
    chosen = jnp.take_along_axis(logs, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    off = c - prior[0]
    return -jnp.where(targets >= 0, chosen, 0).sum() + 0.5 * off @ prior[1] @ off


@functools.partial(jax.jit, static_argnames="outputs")
def _newton(c, prior, given, *, outputs):
    """(Fisher scoring step, objective) at c."""
    jacobian, at, targets = _linear(c, given, outputs=outputs)
    shares, wanted = jax.nn.softmax(at), jax.nn.one_hot(targets, at.shape[1])
    jacobian = jnp.where((targets >= 0)[:, None, None], jacobian, 0)
    middle = jnp.einsum("mo,mok->mk", shares, jacobian)
    fisher = jnp.einsum("mo,mok,mol->kl", shares, jacobian, jacobian) - middle.T @ middle
    slope = jnp.einsum("mo,mok->k", shares - wanted, jacobian) + prior[1] @ (c - prior[0])
    return jnp.linalg.solve(fisher + prior[1], slope), _objective(c, prior, given, outputs=outputs)


@functools.partial(jax.jit, static_argnames="outputs")
def _linear(c, given, *, outputs):
    """(J (m, o, K), outputs (m, o), targets (m,)) at c, sequences as rows."""
    at, targets = _rows(outputs(c, given), given)
    jacobian = jax.jacfwd(lambda c: _rows(outputs(c, given), given)[0])(c)
    return jacobian, at, targets


def _rows(found, given):
    return found.reshape(-1, found.shape[-1]), given["targets"].reshape(-1)


def spread_of(candidates):
    """(K,) float32 standard deviation of the members' coefficients, at least a thousandth of the largest."""
    spread = np.asarray(candidates, np.float64).std(axis=0)
    return np.maximum(spread, 1e-3 * spread.max(initial=0.0) or 1.0).astype(np.float32)


def _covariance(own):
    found = np.cov(own, rowvar=False).reshape(own.shape[1], -1)
    diagonal = np.maximum(np.diag(found), 1e-6 * np.diag(found).max(initial=0.0) or 1.0)
    return (1 - SHRINKAGE) * found + SHRINKAGE * np.diag(diagonal)
