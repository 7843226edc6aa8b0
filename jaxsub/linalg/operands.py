"""What kernels accept: shapes, dtypes and names of steps, checked before anything is computed.

Subspaces are (k, D) with orthonormal rows, 1 <= k <= D. bfloat16 and float16 compute in float32; float32 and float64
are kept. Shapes are static, so the checks also run under `jax.jit`, `jax.vmap` and `jax.grad`.
"""

import numbers

import jax.numpy as jnp
import numpy as np

from jaxsub import errors


def widen(x, name):
    """`x` as an array of the dtype that computes: float32 for narrower floats, otherwise its own.

    Raises:
        ConfigError: if `x` is not of a real floating dtype.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise errors.ConfigError(f"{name} has dtype {x.dtype}, expected a real floating dtype: convert it first")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rows(x, name):
    """`x` widened, refused unless its shape is (k, D) with 1 <= k <= D.

    Raises:
        ConfigError: for another shape or dtype.
    """
    x = widen(x, name)
    if x.ndim != 2 or not 1 <= x.shape[0] <= x.shape[1]:
        raise errors.ConfigError(
            f"{name} has shape {x.shape}, expected (k, D) with 1 <= k <= D: components are rows, and there is no "
            "subspace of dimension 0"
        )
    return x


def pair(a, b, names=("a", "b"), *, same_rank=False):
    """Two arrays of rows in their common dtype, refused unless they have the same number of features.

    Args:
        a: (k1, D) rows.
        b: (k2, D) rows.
        names: what error messages call them.
        same_rank: also refuse k1 != k2.

    Raises:
        ConfigError: for other shapes or dtypes.
    """
    a, b = rows(a, names[0]), rows(b, names[1])
    if a.shape[1] != b.shape[1] or (same_rank and a.shape != b.shape):
        wanted = "the same shape" if same_rank else "the same number of features"
        raise errors.ConfigError(f"{names[0]} has shape {a.shape} and {names[1]} {b.shape}: both need {wanted}")
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def square(x, name):
    """`x` widened, refused unless its shape is (N, N) with N >= 1.

    Raises:
        ConfigError: for another shape or dtype.
    """
    x = widen(x, name)
    if x.ndim != 2 or x.shape[0] != x.shape[1] or not x.shape[0]:
        raise errors.ConfigError(f"{name} has shape {x.shape}, expected (N, N) with N >= 1")
    return x


def step(option, value, known):
    """The function called `value` in `known`, or `value` itself if it is a function.

    Raises:
        ConfigError: naming the option and all names, for an unknown one.
    """
    return value if callable(value) else known[errors.require_known(option, value, known)]


def require_rank(rank, largest, what):
    """`rank` as an int, refused unless it lies in 1 ... `largest`, the most that `what` has.

    Raises:
        ConfigError: naming both numbers.
    """
    if isinstance(rank, (bool, np.bool_)) or not isinstance(rank, numbers.Integral) or not 1 <= rank <= largest:
        raise errors.ConfigError(f"rank is {rank!r}, expected an integer from 1 to {largest}, the most that {what} has")
    return int(rank)
