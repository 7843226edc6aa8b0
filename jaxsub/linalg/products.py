"""The one place that multiplies: precision and memory layout are decided here.

On accelerators the default matmul precision is reduced (TF32, bfloat16), which would move the noise floor of
every spectrum by three digits, so `precision` is always stated. On CPU, XLA turns a product for a consumer that takes
its transpose: of (y.T @ x).T it makes x.T @ y, which takes 4 to 8 times as long (jax 0.10.2); `row_major` pins it.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def row_major(x):
    """`x` with its layout pinned to row-major on CPU; elsewhere `x` itself."""
    if jax.default_backend() != "cpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def matmul(a, b):
    """a @ b at full precision of their common dtype."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=a.dtype)


def einsum(spec, *operands):
    """einsum at full precision of the operands' dtype."""
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST, preferred_element_type=operands[0].dtype)
