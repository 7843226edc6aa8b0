"""LoRA whose factors lie in joint subspaces of the two axes: h = x W + alpha / r x U_in^T L_in L_out^T U_out.

2 K r numbers a layer. L_out starts at zero, so that training starts at the base; L_in at the scale that LoRA's own
factor has. With `columns` each factor may leave its subspace by a few free directions while a task is trained,
F = U^T L + e f, and `consolidated` makes subspaces and loadings of all tasks so far.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors
from jaxsub.parametrisations import _parts, _spaces, _values

REFERENCE = "EigenLoRAx and Share (Kaushik et al. 2025, 2026), with LoRA's scale alpha / r and a start at the base"
NEEDS_SPACES = True


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the parametrisation."""

    rank: int = 8  # of the updates
    components: int = 0  # K, directions an axis; 0: all that the bundle holds
    alpha: float = 16.0
    augment: int = 0  # random directions more an axis, orthogonal to the bundle's
    columns: int = 0  # free directions of each factor, trained too (Share takes 2)


def init(key, start, spaces, options):
    """See `parametrisations`; {layer: {side: {"loadings": (K, r), "free": (d, phi), "mix": (phi, r)}}}."""
    _parts.require_rank(options.rank)
    trainable, bases = {}, {}
    for name, space in spaces.items():
        if sorted(space.factors) != [0, 1]:
            raise errors.ConfigError(
                f"layer {errors.quote(name)}: factors of both axes of a matrix are needed; fit with "
                "--decomposition=hosvd or hooi"
            )
        trainable[name], bases[name] = {}, {}
        for axis, side in enumerate(("in", "out")):
            own = jax.random.split(jax.random.fold_in(_parts.key_of(key, name), axis), 3)
            basis = _spaces.augmented(space.factors[axis][: options.components or None], options.augment, own[0])
            bases[name][side] = jnp.asarray(basis)
            trainable[name][side] = _side(basis, side, options, own[1:])
    return trainable, {"start": start, "bases": bases}


def _side(basis, side, options, keys):
    k, size = basis.shape
    # Uniform in +-1 / sqrt(K): U^T L then has the scale of LoRA's own factor, uniform in +-1 / sqrt(d).
    loadings = jax.random.uniform(keys[0], (k, options.rank), jnp.float32, -(k**-0.5), k**-0.5)
    found = {"loadings": loadings if side == "in" else jnp.zeros_like(loadings)}
    if options.columns:
        free = jax.random.uniform(keys[1], (size, options.columns), jnp.float32, -(size**-0.5), size**-0.5)
        found |= {"free": free, "mix": jnp.zeros((options.columns, options.rank), jnp.float32)}
    return found


def params(trainable, frozen, options):
    """See `parametrisations`."""
    found, scale = dict(frozen["start"]), options.alpha / options.rank
    for name, sides in trainable.items():
        left, right = (whole(sides[side], frozen["bases"][name][side]) for side in ("in", "out"))
        found[name] = _values.Factored(found[name], left, scale * right.T)
    return found


def whole(parts, basis):
    """The factor (d, r) of one side of a layer."""
    found = basis.T @ parts["loadings"]
    return found + parts["free"] @ parts["mix"] if "free" in parts else found


def consolidated(factors, components):
    """(basis (K, d), [loadings (K, r)]) of one side of a layer after a task, float64.

    Args:
        factors: whole factors (d, r) of all tasks so far, the new one among them.
        components: K.

    The basis is the best of its size for all of them together: what it misses is the tail of their singular values.
    The published code computes the new task's loadings from U^T L alone, which loses what its free columns learnt, and
    centres the columns, which the rebuilt factors then lack.
    """
    factors = [np.asarray(f, np.float64) for f in factors]
    u = np.linalg.svd(np.concatenate(factors, axis=1), full_matrices=False)[0]
    basis = np.ascontiguousarray(u[:, :components].T)
    return basis, [basis @ f for f in factors]
