"""Test ratios, as in `test_ratios`, of stacks of LoRA updates W_n = scale_n B_n A_n and of truncated Tucker fits.

Updates are formed in full in float64, and what kernels find from the factors is held against them. B_n is a random
frame times a spectrum, A_n a random frame; LoRA has zero rows and columns where ranks differ, as some spectra have.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsub import placement
from jaxsub.linalg import factored, reference_tucker, tucker
from tests.linalg.matrices import LAPACK, frame, lora_sums, spectrum
from tests.linalg.test_ratios import DTYPES, FITS, SCALES, TENSORS, norm, orthonormality, require, ulp
from tests.selected import first

pytestmark = pytest.mark.usefixtures("x64")

QUICK = ("float32", 1.0)
GRID = [(d, s) for d in DTYPES for s in (1.0, *SCALES[d])]
UPDATES = [(1, 1, 1, 1), (2, 1, 3, 2), (6, 3, 5, 64), (12, 4, 40, 24), (40, 8, 64, 96)]  # N, r, o, i


def updates(dtype, scale, shapes):
    """(label, a (N, r, i), b (N, o, r), scales (N,), updates (N, o, i) in float64); a and b take half of `scale`."""
    for shape in shapes:
        count, rank, rows, width = shape
        for name in LAPACK:
            a = np.stack([frame(rank, width, seed=n) for n in range(count)])
            b = np.stack([frame(rank, rows, seed=count + n).T for n in range(count)]) * spectrum(name, rank)
            a, b = ((scale**0.5 * x / (np.abs(x).max() or 1)).astype(DTYPES[dtype]) for x in (a, b))
            scales = np.random.default_rng(5).uniform(0.5, 2, count)
            yield (shape, name), a, b, scales, reference_tucker.updates(a, b, scales)


def require_range(dtype, products):
    if dtype == "float64" and products == "float32":
        pytest.skip("float64 weights have float64 products")


def relative(got, true, size, products):
    """Largest error in units of the largest entry; `size` terms."""
    return np.abs(np.asarray(got, np.float64) - true).max() / ((np.abs(true).max() or 1) * size * ulp(products))


# Dtype, scale, shapes, products.
QUICK_UPDATES = (*QUICK, UPDATES[3:4], "float32")
UPDATE_GRID = [(*case, UPDATES, p) for case in GRID for p in ("float32", "float64")]


@pytest.mark.parametrize("dtype, scale, shapes, products", first([QUICK_UPDATES, *UPDATE_GRID]))
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_gram_matrices_of_updates(devices, dtype, scale, shapes, products):
    require_range(dtype, products)
    mesh, found = placement.make_mesh(devices), {}
    for label, a, b, scales, w in updates(dtype, scale, shapes):
        flat, wide_a, wide_b = w.reshape(len(w), -1), np.float64(a), np.float64(b)
        sums = lora_sums(a, np.swapaxes(b, 1, 2), mesh, products)
        pairs = (
            (np.asarray(sums.gram) * np.outer(scales, scales), flat @ flat.T),
            (sums.b_overlap, np.square(np.einsum("nor,mos->nmrs", wide_b, wide_b, optimize=True)).sum((2, 3))),
            (sums.a_cosines, np.einsum("nri,mri->nm", wide_a, wide_a)),
            (sums.a_gram, np.einsum("nri,nsi->nrs", wide_a, wide_a)),
            (sums.b_gram, np.einsum("nor,nos->nrs", wide_b, wide_b)),
        )
        found[label] = [relative(got, true, len(w), products) for got, true in pairs]
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype, scale, shapes, products", UPDATE_GRID)
def test_mode_grams_of_updates(dtype, scale, shapes, products, centred):
    """In units of what is summed: of updates as they are, also where their mean is taken off."""
    require_range(dtype, products)
    found = {}
    for label, a, b, scales, w in updates(dtype, scale, shapes):
        y = w - w.mean(0) if centred else w
        ratios = []
        for side, axis in (("out", 1), ("in", 2)):
            got = np.asarray(factored.mode_gram(a, b, scales, side=side, centred=centred, dtype=products))
            flat, raw = (reference_tucker.unfold(z, axis) for z in (y, w))
            unit = (norm(raw @ raw.T) or 1) * max(w.shape) * ulp(products)
            ratios.append(norm(got - flat @ flat.T) / unit)
        found[label] = ratios
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype, scale, shapes, products", UPDATE_GRID)
@pytest.mark.parametrize("method", ["hosvd", "hooi"])
def test_shared_factors_of_updates(method, dtype, scale, shapes, products, centred):
    """At half the rank, and at all of it: orthonormal, cores are the contraction, error and certificate are true."""
    require_range(dtype, products)
    found = {}
    for label, a, b, scales, w in updates(dtype, scale, shapes):
        y = w - w.mean(0) if centred else w
        a, b = jnp.asarray(a), jnp.asarray(b)
        for ranks in {tuple(-(-size // 2) for size in w.shape[1:]), w.shape[1:]}:
            result = getattr(factored, method)(a, b, scales, ranks=ranks, centred=centred, dtype=products)
            found[*label, ranks] = truncated_ratios(y, w, result.cores, (None, *result.factors), products)
            error = reference_tucker.error(y, result.cores, (None, *result.factors))
            assert error <= float(result.certificate), (label, ranks)
            assert float(result.lower) <= error * (1 + 1e-6), (label, ranks)
    require(found)


def truncated_ratios(y, raw, core, factors, products):
    """Of the core against the contraction of y with the factors, in units of `raw`, and of each factor."""
    wide = [None if f is None else np.asarray(f, np.float64) for f in factors]
    gone = np.linalg.norm(np.asarray(core, np.float64) - reference_tucker.mode_products(y, wide))
    ratios = [gone / ((np.linalg.norm(raw) or 1) * max(y.shape) * ulp(products))]
    return ratios + [orthonormality(f.T, products) for f in wide if f is not None]


TRUNCATIONS = {
    "half": lambda shape: tuple(-(-size // 2) for size in shape),
    "one": lambda shape: (1,) * len(shape),
    "free": lambda shape: (None, *(-(-size // 2) for size in shape[1:])),  # models axis: JD-Full
}


def decaying(shape, decay):
    rng = np.random.default_rng(4)
    x = rng.standard_normal(shape)
    for axis, size in enumerate(shape):
        turn = np.linalg.qr(rng.standard_normal((size, size)))[0] * decay ** np.arange(size)
        x = reference_tucker.mode_product(x, turn, axis)
    return x / np.abs(x).max()


TENSOR_GRID = [(*case, TENSORS, p) for case in GRID for p in ("float32", "float64")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, ranks, dtype, scale, shapes, products",
    [
        ("hooi", "half", *QUICK, TENSORS[2:3], "float32"),
        *((method, ranks, *case) for method in FITS for ranks in TRUNCATIONS for case in TENSOR_GRID),
    ],
)
def test_truncated_tucker_decompositions(method, ranks, dtype, scale, shapes, products):
    """Orthonormal factors, a core that is their contraction, an error within its bounds and under its certificate."""
    require_range(dtype, products)
    found = {}
    for shape in shapes:
        kept = TRUNCATIONS[ranks](shape)
        for decay in (0.0, 0.5, 1.0):
            x = (scale * decaying(shape, decay)).astype(DTYPES[dtype])
            wide, label = x.astype(np.float64), (shape, decay)
            result = FITS[method](jnp.asarray(x), ranks=kept, dtype=products)
            found[label] = truncated_ratios(wide, wide, result.core, result.factors, products)
            error = reference_tucker.error(wide, result.core, result.factors)
            assert float(result.lower) <= error * (1 + 1e-6), label
            assert error <= min(float(result.certificate), float(result.upper) * (1 + 1e-6)), label
            if method == "hooi":
                start = tucker.sthosvd(jnp.asarray(x), ranks=kept, dtype=products)
                worst = reference_tucker.error(wide, start.core, start.factors)
                # Sweeps are compared by their norms, which tell squared errors apart to rounding.
                assert error**2 <= worst**2 + max(shape) * ulp(products), label
                assert (np.diff(np.asarray(result.sweeps)) <= 0).all(), label
    require(found)
