"""Random linear maps from d numbers to D weights with columns of unit norm: dense, sparse, and Fastfood.

| kind     | numbers kept            | product                | columns                                       |
|----------|-------------------------|------------------------|-----------------------------------------------|
| dense    | D d                     | D d                    | Gaussian, each of norm 1                      |
| sparse   | D sqrt(d)               | the same               | 1 / sqrt(D) with signs, a share 1 / sqrt(d)   |
| fastfood | 4 D (padded to blocks)  | D log(block)           | of norm 1 in each block, blocks independent   |

Not for orthonormal columns: see `orth`.
"""

import math

import jax
import jax.numpy as jnp

from jaxsub.linalg import products

KINDS = ("dense", "sparse", "fastfood")


def walsh_hadamard(x, /):
    """H x along the last axis, H the Hadamard matrix of Sylvester's order (entries 1 and -1, unscaled).

    Args:
        x: (..., n), n a power of two.

    Returns:
        (..., n), in n log n additions.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"length {n} is no power of two")
    lead, half = x.shape[:-1], 1
    while half < n:
        pairs = x.reshape(*lead, n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(*lead, n)
        half *= 2
    return x


def draw(kind, key, size, dimension, /):
    """What `apply` needs of one random map, a tree of arrays.

    Args:
        kind: of KINDS.
        key: typed key.
        size: D.
        dimension: d.
    """
    if kind == "dense":
        columns = jax.random.normal(key, (dimension, size), jnp.float32)
        return {"rows": columns / jnp.linalg.norm(columns, axis=1, keepdims=True)}
    if kind == "sparse":
        return _sparse(key, size, dimension)
    block = 1 << max(math.ceil(math.log2(dimension)), 0)
    count = -(-size // block)
    sign, gauss, shuffle = jax.random.split(key, 3)
    gaussian = jax.random.normal(gauss, (count, block), jnp.float32)
    order = jax.vmap(lambda k: jax.random.permutation(k, block))(jax.random.split(shuffle, count))
    return {
        "signs": jnp.where(jax.random.bernoulli(sign, shape=(count, block)), 1.0, -1.0).astype(jnp.float32),
        "order": order.astype(jnp.int32),
        "gaussian": gaussian,
        # H G P H S has columns of norm sqrt(block) |g|; all blocks together shall have norm 1
        "scale": 1.0 / jnp.sqrt(block * jnp.sum(jnp.square(gaussian)) * (size / (count * block))),
    }


def _sparse(key, size, dimension):
    """Each weight hangs on about sqrt(d) of the d numbers, drawn with replacement, with random signs."""
    count = max(round(math.sqrt(dimension)), 1)
    place, sign = jax.random.split(key)
    at = jax.random.randint(place, (size, count), 0, dimension, jnp.int32)
    values = jnp.where(jax.random.bernoulli(sign, shape=(size, count)), 1.0, -1.0).astype(jnp.float32)
    squares = jnp.zeros(dimension, jnp.float32).at[at].add(jnp.square(values))
    return {"at": at, "values": values, "scale": 1.0 / jnp.sqrt(jnp.maximum(squares, 1.0))}


def apply(drawn, z, size, /):
    """P z, (D,) from z (d,).

    Source: dense, sparse and Fastfood maps of Li et al. 2018, sections S6 and S7 of the supplement; Fastfood,
    Le, Sarlos and Smola 2013.
    """
    if "rows" in drawn:
        return products.matmul(z, drawn["rows"])
    if "at" in drawn:
        return jnp.sum((z * drawn["scale"])[drawn["at"]] * drawn["values"], axis=1)
    count, block = drawn["signs"].shape
    x = jnp.zeros(block, z.dtype).at[: z.shape[0]].set(z)
    x = walsh_hadamard(x[None] * drawn["signs"])
    x = jnp.take_along_axis(x, drawn["order"], axis=1) * drawn["gaussian"]
    return (drawn["scale"] * walsh_hadamard(x)).reshape(-1)[:size]
