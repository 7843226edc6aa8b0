"""How a bundle's numbers are stored: as computed, as bfloat16, or as 8-bit whole numbers with a scale a component.

    float32 --encode--> {"": int8, "_scale": float32} --decode--> float32

A bundle in memory holds what decoding gives, so that it is the same before it is saved and after it is loaded; what
rounding costs is measured when it is fitted. Encoding what was decoded changes nothing.
"""

import ml_dtypes
import numpy as np

from jaxsub import errors

AS_COMPUTED, BFLOAT16, INT8 = "", "bfloat16", "int8"
DTYPES = (AS_COMPUTED, BFLOAT16, INT8)
STEPS = 127  # of the largest entry of a component


def encode(array, dtype, *, component):
    """Arrays to store, by the ending of their name.

    Args:
        array: float32 or float64.
        dtype: one of DTYPES.
        component: axis along which 8-bit scales differ: 0 for rows of a basis; -1 for coefficients (n, k...), whose
            scales are those of each of the trailing entries over the models.

    Raises:
        ConfigError: entries that the dtype cannot hold.
    """
    array = np.asarray(array)
    if dtype == AS_COMPUTED or not array.size:
        return {"": array}
    if dtype == BFLOAT16:
        with np.errstate(over="ignore"):
            found = array.astype(ml_dtypes.bfloat16)
        if not np.isfinite(found.astype(np.float32)).all():
            raise errors.ConfigError(f"bfloat16 cannot hold entries of {np.abs(array).max():.3g}; store them otherwise")
        return {"": found}
    scale = np.abs(array).max(axis=tuple(range(1, array.ndim)) if component == 0 else 0) / STEPS
    divisor = _along(np.where(scale > 0, scale, 1), array.ndim, component)
    return {"": np.rint(array / divisor).astype(np.int8), "_scale": scale.astype(array.dtype)}


def decode(arrays, *, component):
    """The array of what `encode` gave: float32, or float64 where it was."""
    array = arrays[""]
    if array.dtype == np.int8:
        wanted = array.shape[:1] if component == 0 else array.shape[1:]
        if arrays["_scale"].shape != wanted:  # which would make a larger array of the two
            raise ValueError(f"scales of shape {arrays['_scale'].shape}, not {wanted}")
        return array * _along(arrays["_scale"], array.ndim, component)
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def rounded(array, dtype, *, component):
    """The array as it comes back after storing."""
    return decode(encode(array, dtype, component=component), component=component)


def of_mean(dtype):
    """Storage of a mean beside a basis of this storage: it holds too much of a model for 8 bits."""
    return BFLOAT16 if dtype == INT8 else dtype


def component_bytes(itemsize, dtype):
    """(bytes of one entry, bytes of one 8-bit scale) where the computed dtype has `itemsize` bytes."""
    return {AS_COMPUTED: (itemsize, 0), BFLOAT16: (2, 0), INT8: (1, itemsize)}[dtype]


def _along(scale, ndim, component):
    return scale.reshape(-1, *[1] * (ndim - 1)) if component == 0 else scale
