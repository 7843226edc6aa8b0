"""A small residual network with convolutions, for square images that come as rows of pixels.

stem -> c channels: x + conv(conv(x)) -> 2 c channels, half the size: the same -> mean over places -> logits
"""

import flax.linen as nn
import jax

from jaxsub.models import _blocks


class CNN(nn.Module):
    """Kernels (kh, kw, i, o): stem, first_1, first_2, second_1, second_2 (3 x 3), shortcut (1 x 1); head (i, o).

    Source: He et al. 2016, "Deep residual learning", without batch statistics; the last convolution of a branch starts
    at half its usual size.
    """

    outputs: int = 10
    channels: int = 8

    @nn.compact
    def __call__(self, x):
        """Logits (n, o) of images (n, s * s)."""
        side, wide = round(x.shape[-1] ** 0.5), 2 * self.channels
        x = jax.nn.relu(_blocks.Conv(self.channels, name="stem")(x.reshape(len(x), side, side, 1)))
        inner = jax.nn.relu(_blocks.Conv(self.channels, name="first_1")(x))
        x = jax.nn.relu(x + 0.5 * _blocks.Conv(self.channels, name="first_2")(inner))
        inner = jax.nn.relu(_blocks.Conv(wide, stride=2, name="second_1")(x))
        shortcut = _blocks.Conv(wide, size=1, stride=2, name="shortcut")(x)
        x = jax.nn.relu(shortcut + 0.5 * _blocks.Conv(wide, name="second_2")(inner))
        return nn.Dense(self.outputs, name="head")(x.mean(axis=(1, 2)))


Model = CNN
