"""Which dtype computes, which accumulates, and below what a number is noise.

    storage (as in the file) -> compute (float32 or float64) -> accumulate (float64, always)

A Gram matrix squares the condition number: with float32 products, singular values under about
8 * sqrt(eps32) = 2.8e-3 of the largest are noise; with float64 products that line is near 1e-7.
So float64 computes wherever it is cheap, and for float64 weights always.
"""

import math

import numpy as np

EPS32, EPS64 = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)

# Multiply-adds of a layer's Gram product up to which float64 computes it: 2**34 take 0.25 s on two
# cores (70 G multiply-adds a second measured), where float32 would take 0.1 s.
FLOAT64_WORK = 2**34

# Exponents of the largest entry between which float32 fourth powers neither overflow nor lose bits that count.
SAFE_EXPONENT = 20

# Exponents of the largest entry up to which a dtype has room for sums over a model's entries, and for its last bits:
# coefficients are norms, and XLA takes numbers under 2**-126 (float32) or 2**-1022 (float64) for zero.
ROOM = {"float32": 100, "float64": 960}
ROOM_FOR_SQUARES = 480  # the same in float64 for what is squared as it is: updates of low rank

# Energy about the mean over the whole, by the dtype of the products: what rounding of the mean leaves of equal models.
CONSTANT = {"float64": 1e-40, "float32": 1e-21}

_WIDTH = {"float8_e5m2": 2, "float8_e4m3fn": 3, "bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}


def compute_dtype(storage, work, policy="auto"):
    """'float32' or 'float64' for products of `work` multiply-adds on weights stored as `storage`."""
    if storage == "float64" or policy == "float64":
        return "float64"
    if policy == "float32":
        return "float32"
    return "float64" if work <= FLOAT64_WORK else "float32"


def widest(dtypes):
    """The narrowest dtype name that holds every value of all `dtypes` exactly."""
    names = sorted(set(dtypes))
    if len(names) == 1 and not names[0].startswith("float8"):
        return names[0]
    return "float64" if "float64" in names else "float32"


def exponent_of(largest, safe=SAFE_EXPONENT):
    """Power of two that brings a number near 1; 0 up to `safe`, where its square is safe as it is."""
    exponent = math.frexp(largest)[1] if largest else 0
    return 0 if abs(exponent) <= safe else exponent


def has_room(exponent, dtype):
    """Whether numbers near 2**exponent can be coefficients and means in 'float32' or 'float64'."""
    return abs(exponent) <= ROOM[str(dtype)]


def largest(x):
    """Largest absolute value of an array, as a float; 0 for an empty one."""
    return max(float(x.max()), -float(x.min()), 0.0) if x.size else 0.0


def power_of(*numbers):
    """Exponent of the product of numbers, which itself may have no room in a float; 0 where one is zero."""
    return sum(math.frexp(number)[1] for number in numbers) if all(numbers) else 0


def scaled(x, exponent):
    """x * 2**exponent on the host: exact, 16-bit numbers as float32; float64 where float32 has no room."""
    x = x if x.dtype.itemsize >= 4 else x.astype(np.float32)
    x = x if not exponent or has_room(exponent, x.dtype) else x.astype(np.float64)
    return np.ldexp(x, exponent) if exponent else x


def unit_factors(a, b, scales):
    """Low-rank updates scales_n b_n a_n with every part near 1, and the exponent that this took off.

    Args:
        a, b: arrays of the host, float32 or float64.
        scales: (n,) float64.

    Returns:
        (a, b, scales, exponent): the updates are 2**exponent times those of the first three. 0 where squares of the
        parts and of their products are safe as they are.
    """
    parts, total = [], 0
    for part in (a, b, np.asarray(scales, np.float64)):
        power = exponent_of(largest(part))
        parts.append(np.ldexp(part, -power) if power else part)
        total += power
    return (*parts, total)


def rounding(storage):
    """Root-mean-square relative rounding error of one stored weight: 2**-(bits + 1) / sqrt(3)."""
    return 2.0 ** -(_WIDTH[storage] + 1) / math.sqrt(3.0)


def gram_floor(largest, num_models, dtype):
    """Singular values under this are noise of the Gram product; `largest` is the first one."""
    relative = 8 * math.sqrt(EPS32) if dtype == "float32" else math.sqrt(max(num_models, 4) * EPS64)
    return largest * relative


def factor_floor(largest, num_models):
    """Singular values from a float64 QR factor are right to about N eps of the largest."""
    return largest * max(num_models, 4) * EPS64


def storage_floor(norms, num_features, roundings):
    """Largest singular value that rounding to the stored dtypes alone would cause.

    Rounding adds to each of the N rows an independent vector of norm `rounding * |row|`; N such vectors in D
    dimensions have no singular value above about their root-mean-square norm times 1 + sqrt(N / D).

    Args:
        norms: (N,) norms of the rows as they are stored, before any base is subtracted.
        num_features: D.
        roundings: (N,) relative rounding error of each row's dtype.
    """
    noise = float(np.sqrt(np.mean(np.square(np.asarray(norms) * roundings)))) if len(norms) else 0.0
    return noise * (1.0 + math.sqrt(len(norms) / max(num_features, 1)))
