"""Parts that several networks share: a transformer block, and a convolution that many networks can run at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Kernels (i, o): query, key, value, output (w, w), up (w, 4 w) and down (4 w, w). Biases start at
    zero, kernels LeCun normal.

    Source: Vaswani et al. 2017; norms before the sublayers, Xiong et al. 2020.
    """

    heads: int
    is_causal: bool = False

    @nn.compact
    def __call__(self, x):
        """(n, T, w) from (n, T, w)."""
        n, length, width = x.shape
        normed = nn.LayerNorm(name="norm_attention")(x)
        query, key, value = (
            nn.Dense(width, name=name)(normed).reshape(n, length, self.heads, width // self.heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / (width // self.heads) ** 0.5
        if self.is_causal:
            allowed = jnp.tril(jnp.ones((length, length), bool))
            scores = jnp.where(allowed[None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value).reshape(n, length, width)
        x = x + nn.Dense(width, name="output")(mixed)
        hidden = nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm_mlp")(x))
        return x + nn.Dense(width, name="down")(jax.nn.gelu(hidden))


class Conv(nn.Module):
    """Convolution of images (n, h, w, i) with a kernel (kh, kw, i, o), zeros around them, He normal start.

    As one product with shifted images: where many networks run under `vmap`, XLA makes one grouped convolution of
    theirs, which on CPUs has no fast kernel.
    """

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        """(n, ceil(h / stride), ceil(w / stride), o)."""
        n, height, width, channels = x.shape
        shape = (self.size, self.size, channels, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        edge = self.size // 2
        padded = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        shifted = [
            padded[:, dy : dy + height : self.stride, dx : dx + width : self.stride]
            for dy in range(self.size)
            for dx in range(self.size)
        ]
        patches = jnp.concatenate(shifted, axis=-1)
        return patches @ kernel.reshape(-1, self.features) + bias
