"""All layers of all models at once, for methods that look at the merged model as a whole, through the user's loss."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from jaxsub.rows import Rows


@dataclasses.dataclass(frozen=True)
class Whole:
    """The models to merge, in memory.

    Attributes:
        layers: name -> Rows of updates.
        stacks: name -> (x (N, *shape), base (*shape) or zeros), or (a (N, r, i), b (N, o, r)) of low-rank updates.
        rebuild: name -> function from a merged update to the layer as the user's loss takes it, traceable; for rows
            that are coefficients of a bundle.
        others: name -> array of the template's tensors that are not merged.
        programs: compiled descents on a loss; see `_descent.minimise`.
    """

    layers: dict[str, Rows]
    stacks: dict
    rebuild: dict
    others: dict
    programs: dict = dataclasses.field(default_factory=dict)

    @property
    def num_models(self):
        """N."""
        return next(iter(self.layers.values())).num_models

    def combined(self, name, c, mask=None):
        """The merged update sum_n c_n x_n (times a mask) of a layer, or factors (a, b) of it; traceable."""
        first, second = self.stacks[name]
        if self.layers[name].factors() is not None:
            right = first.reshape(-1, first.shape[2])
            left = jnp.transpose(second * c.astype(second.dtype)[:, None, None], (1, 0, 2)).reshape(second.shape[1], -1)
            return right, left
        x = jnp.tensordot(c.astype(first.dtype), first, 1)
        return x if mask is None else x * mask

    def weights(self, updates):
        """{layer: array} of a whole model from merged updates, as the user's loss takes it."""
        found = dict(self.others)
        for name, update in updates.items():
            if name in self.rebuild:
                found[name] = self.rebuild[name](update)
            elif self.layers[name].factors() is not None:
                found[name] = update
            else:
                found[name] = self.stacks[name][1] + update
        return found

    def result(self, name, update):
        """The result of a layer's merged update (*shape)."""
        return self.layers[name].result(update)


def stack(rows):
    """What `Whole.stacks` holds of some Rows."""
    if rows.factors() is not None:
        return tuple(jnp.asarray(part, jnp.float32) for part in rows.factors())
    x = np.empty((rows.num_models, rows.size), np.float32)
    base = np.zeros(rows.size, np.float32)
    for block in rows.blocks():
        at = slice(block.start, block.start + block.count)
        x[:, at] = block.x[:, : block.count]
        if block.base is not None:
            base[at] = block.base[: block.count]
    return jnp.asarray(x.reshape(-1, *rows.shape)), jnp.asarray(base.reshape(rows.shape))


def rebuilder(space, shape, origin=None):
    """A traceable function from coefficients to the layer (*shape) of a LinearSubspace or TuckerSubspace."""
    return functools.partial(_rebuilt, space, shape, origin)


def _rebuilt(space, shape, origin, c):
    whole, nothing = space.reconstruct(jnp.stack([c, jnp.zeros_like(c)])).astype(jnp.float32).reshape(2, *shape)
    return whole if origin is None else origin.astype(jnp.float32) + (whole - nothing)
