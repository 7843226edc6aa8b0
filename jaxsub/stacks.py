"""The models of one layer as one array, as decompositions take them.

A stack is whole on its devices. Collections whose layers do not fit are read block by block into `statistics`; that way
leads to a Gram matrix, not here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxsub import errors


@dataclasses.dataclass(frozen=True)
class DenseStack:
    """N models of one layer, `x` (N, *shape) of any float dtype."""

    x: jax.Array
    name: str = ""
    model_ids: tuple[str, ...] = ()

    @classmethod
    def create(cls, x, name="", model_ids=()):
        """A checked stack.

        Raises:
            InputError: NaN or Inf, naming the layer and the first such model.
            ConfigError: fewer than two models, no weights, or not floating point.
        """
        x = jnp.asarray(x)
        if x.ndim < 2 or len(x) < 2 or not x.size:
            raise errors.ConfigError(f"a stack of shape {x.shape}: expected (N, ...) with at least two models")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise errors.ConfigError(f"a stack of dtype {x.dtype}: expected floating point")
        finite = np.asarray(jnp.isfinite(x).reshape(len(x), -1).all(axis=1))
        if not finite.all():
            n = int(np.flatnonzero(~finite)[0])
            label = model_ids[n] if model_ids else f"model {n}"
            raise errors.InputError(label, "holds NaN or Inf", key=name or None, rule="N1")
        return cls(x, name, tuple(model_ids))

    @property
    def num_models(self):
        """N."""
        return self.x.shape[0]

    @property
    def shape(self):
        """Shape of one model's weights."""
        return self.x.shape[1:]

    @property
    def num_features(self):
        """D, product of `shape`."""
        return math.prod(self.shape)

    def take(self, models):
        """The stack of some of its models, given by their positions."""
        return DenseStack(self.x[np.asarray(models)], self.name)


@dataclasses.dataclass(frozen=True)
class LoraStack:
    """N low-rank updates of one layer, W_n = scales_n b_n a_n, kept as their factors.

    Attributes:
        a: (N, r, i) float32 or float64; mixed ranks padded with zero rows.
        b: (N, o, r).
        scales: (N,) float64.
        name, model_ids: for messages.
    """

    a: jax.Array
    b: jax.Array
    scales: np.ndarray
    name: str = ""
    model_ids: tuple[str, ...] = ()

    @property
    def num_models(self):
        """N."""
        return self.a.shape[0]

    @property
    def shape(self):
        """(o, i), shape of one update."""
        return self.b.shape[1], self.a.shape[2]

    def take(self, models):
        """The stack of some of its models, given by their positions: the others stay as updates of zero.

        An update of zero changes no sum of products, and the shapes are those that are compiled already.
        """
        scales = np.zeros_like(self.scales)
        scales[models] = self.scales[models]
        return dataclasses.replace(self, scales=scales)
