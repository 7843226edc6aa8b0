"""A network with one hidden layer, and the same network with low-rank adapters on a frozen base.

logits = act(x @ hidden + b) @ output + c
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

SHRINKAGE = 0.5  # the usual half-width of soft shrinkage


def soft_shrink(x):
    """Soft shrinkage, x moved towards zero by 1/2 and zero in between: odd, and sparse like a ReLU."""
    return x - jnp.clip(x, -SHRINKAGE, SHRINKAGE)


ACTIVATIONS = {"soft_shrink": soft_shrink, "relu": jax.nn.relu, "tanh": jnp.tanh}


class MLP(nn.Module):
    """One hidden layer; kernels (i, o) start as He normal, variance 2 / i, biases at zero.

    Source: He et al. 2015, "Delving deep into rectifiers".
    """

    hidden: int = 64
    outputs: int = 10
    activation: str = "soft_shrink"

    @nn.compact
    def __call__(self, x):
        """Logits (n, o) of inputs x (n, i)."""
        init = nn.initializers.he_normal()
        h = ACTIVATIONS[self.activation](nn.Dense(self.hidden, kernel_init=init, name="hidden")(x))
        return nn.Dense(self.outputs, kernel_init=init, name="output")(h)


class LoraDense(nn.Module):
    """x @ (W + scale * a.T @ b.T) + bias with W (i, o), bias (o,) frozen in the collection "base".

    Parameters: lora_a (r, i) uniform in +-1 / sqrt(i), as PEFT starts it; lora_b (o, r) zero.
    """

    features: int
    rank: int
    scale: float

    @nn.compact
    def __call__(self, x):
        """Outputs (n, o) of inputs x (n, i)."""
        width = x.shape[-1]
        kernel = self.variable("base", "kernel", jnp.zeros, (width, self.features), jnp.float32).value
        bias = self.variable("base", "bias", jnp.zeros, (self.features,), jnp.float32).value
        bound = 1.0 / width**0.5

        def start(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        a = self.param("lora_a", start, (self.rank, width))
        b = self.param("lora_b", nn.initializers.zeros, (self.features, self.rank))
        return x @ kernel + self.scale * ((x @ a.T) @ b.T) + bias[None, :]


class LoraMLP(nn.Module):
    """The MLP with adapters on both kernels; same names as in MLP.

    Source: Hu et al. 2021, "LoRA".
    """

    hidden: int = 64
    outputs: int = 10
    activation: str = "soft_shrink"
    rank: int = 4
    scale: float = 2.0

    @nn.compact
    def __call__(self, x):
        """Logits (n, o) of inputs x (n, i)."""
        h = ACTIVATIONS[self.activation](LoraDense(self.hidden, self.rank, self.scale, name="hidden")(x))
        return LoraDense(self.outputs, self.rank, self.scale, name="output")(h)


Model = MLP
