"""A small vision transformer for square images that come as rows of pixels.

patches -> embedding + position -> blocks -> mean over patches -> logits
"""

import flax.linen as nn

from jaxsub.models import _blocks


class ViT(nn.Module):
    """Kernels (i, o): embedding, block_<n>/query, key, value, output, up, down, head; positions (T, w).

    Source: Dosovitskiy et al. 2021, with the mean of the patches instead of a class token.
    """

    outputs: int = 10
    width: int = 24
    depth: int = 2
    heads: int = 2
    patch: int = 2  # pixels a side

    @nn.compact
    def __call__(self, x):
        """Logits (n, o) of images (n, s * s)."""
        n, side = len(x), round(x.shape[-1] ** 0.5)
        across = side // self.patch
        x = x.reshape(n, across, self.patch, across, self.patch).transpose(0, 1, 3, 2, 4)
        x = nn.Dense(self.width, name="embedding")(x.reshape(n, across**2, self.patch**2))
        position = self.param("position", nn.initializers.normal(0.02), (across**2, self.width))
        x = x + position[None]
        for number in range(self.depth):
            x = _blocks.Block(self.heads, name=f"block_{number}")(x)
        return nn.Dense(self.outputs, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


Model = ViT
