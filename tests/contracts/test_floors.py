"""No decomposition takes rounding for signal: what it puts over its floor is a value of the stack, and has a direction.

Stacks of small integers are of exact rank in every dtype, so all values past that rank are rounding.
"""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxsub import precision, subspace
from tests.contracts.test_decompositions import NAMES, NUM_MODELS, SHAPE, fit

RANK = 3
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
QUICK = ("float64", "float32", 16, 64)
WIDE = ("float64", "float64", 1, 64)
CASES = [
    c for c in itertools.product(("float32", "float64"), DTYPES, (1, 16, 2**10), (0, 64)) if c not in (QUICK, WIDE)
]
CASES = [c for c in CASES if c[:2] != ("float32", "float64")]  # float64 weights have float64 products alone


def stack(strength, dtype, mean):
    """(N, *SHAPE) of rank 3 along every axis, the second and third direction `strength` and its square weaker.

    With `mean` a common base, in multiples of it, whose sum with the rest no dtype holds exactly.
    """
    rng = np.random.default_rng(2)
    left, middle, right = (rng.integers(-1, 2, (n, RANK)) for n in (NUM_MODELS, *SHAPE))
    x = np.einsum("na,oa,ia->noi", left, middle, right * float(strength) ** -np.arange(RANK))
    return (x + mean * rng.integers(1, 3, SHAPE)).astype(dtype)


def true_values(x, procedure, axis):
    """Singular values of the stack centred and unfolded as the procedure says, float64."""
    x = np.asarray(x, np.float64)
    if procedure.centring != "none":
        over = tuple(a for a in range(x.ndim) if a != int(axis) + 1) if procedure.centring == "columns" else 0
        x = x - x.mean(axis=over, keepdims=True)
    flat = x.reshape(len(x), -1) if axis == "models" else np.moveaxis(x, int(axis) + 1, 0).reshape(SHAPE[int(axis)], -1)
    return np.linalg.svd(flat, compute_uv=False)


@pytest.mark.parametrize(
    "name, products, dtype, strength, mean",
    [
        *((name, *QUICK) for name in ("gram", "hooi")),
        ("gram", *WIDE),
        *(pytest.param(name, *case, marks=pytest.mark.slow) for name in NAMES for case in (QUICK, WIDE)),
        *(pytest.param(name, *case, marks=pytest.mark.slow) for name in NAMES for case in CASES),
    ],
)
def test_values_over_the_floor_are_values_of_the_stack(monkeypatch, name, products, dtype, strength, mean):
    if products == "float32":
        monkeypatch.setattr(precision, "FLOAT64_WORK", 0)
    x = stack(strength, DTYPES[dtype], mean)
    with jax.enable_x64(True):
        found = fit(name, x)
    is_flat = isinstance(found, subspace.LinearSubspace)
    spectra = {"models": found.spectrum} if is_flat else found.spectra
    for axis, spectrum in spectra.items():
        true = true_values(x, found.procedure, axis)
        over = spectrum.values > spectrum.floor
        want = np.pad(true, (0, max(len(over) - len(true), 0)))[: len(over)]
        assert over[0] and over.sum() <= np.sum(true > 1e-12 * true[0])
        # Low is no harm: a random basis, and a stack that other axes have shrunk, hold a little less.
        assert (spectrum.values - want)[over].max() <= spectrum.floor
        if is_flat:
            assert not np.asarray(found.basis)[~over[: found.rank]].any()
