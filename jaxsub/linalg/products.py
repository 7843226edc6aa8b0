"""The one place that multiplies: precision and memory layout are decided here.

On accelerators the default matmul precision is reduced (TF32, bfloat16), which would move the noise floor of
every spectrum by three digits, so `precision` is always stated. On CPU, XLA turns a product for a consumer that takes
its transpose: of (y.T @ x).T it makes x.T @ y, which takes 4 to 8 times as long (jax 0.10.2); `row_major` pins it.
"""

import functools
import pathlib

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


def of_rows(a, b, dtype):
    """a @ b.T of rows (m, d) and (n, d), summed in `dtype`: of bfloat16 ones by the processor's own products.

    Those are exact in float32. XLA's library takes them as they are only if told of both by their rows: of a transposed
    operand it makes float32 first (jax 0.10.2).
    """
    by_rows = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, by_rows, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


@functools.cache
def takes(dtype):
    """Whether a CPU's products of two such 16-bit numbers gain from not being made float32 first, with sums as exact.

    True of bfloat16 on CPUs with AMX tiles: four to five times the rate of float32 there, and no larger errors. Others,
    and accelerators, whose adders may cut digits off, have not been measured.
    """
    return dtype == "bfloat16" and "amx_bf16" in _flags()


def _flags():
    """Words on the processor that Linux knows; none elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])
