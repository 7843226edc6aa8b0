"""A small language model over characters: the next character from those before it."""

import flax.linen as nn
import jax.numpy as jnp

from jaxsub.models import _blocks


class Transformer(nn.Module):
    """Kernels (i, o): block_<n>/query, key, value, output, up, down, head; embedding (o, w), position (T, w).

    Source: Radford et al. 2018, decoder only.
    """

    outputs: int = 27
    width: int = 32
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        """Logits (n, T, o) of characters (n, T) int32 in 0 .. o - 1; those at t are for the character after it."""
        embedding = self.param("embedding", nn.initializers.normal(0.5), (self.outputs, self.width))
        position = self.param("position", nn.initializers.normal(0.1), (x.shape[1], self.width))
        x = jnp.take(embedding, x, axis=0) + position[None]
        for number in range(self.depth):
            x = _blocks.Block(self.heads, is_causal=True, name=f"block_{number}")(x)
        return nn.Dense(self.outputs, name="head")(nn.LayerNorm(name="norm")(x))


Model = Transformer
