"""LAPACK's test ratios for every method over its stated range: shapes, spectra, scales and storage dtypes.

    residual |x - found| / (|x| max(m, n) ulp),   |I - q.T q| / (m ulp),   |s - true| / (s_1 min(m, n) ulp)

all under 30; ulp is that of the stored weights, 16-bit ones counting as float32; norms are 1-norms. Orthonormality is
asked of components that are reported. What float32 products square is measured as a square: energies, not values.
Values over a method's floor must be near true ones: nothing else may be taken for signal.
"""

import functools
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsub import placement
from jaxsub.linalg import gram, incremental, moments, orth, reference_tucker, selection, single_pass, svd, tucker
from tests.figures_log import record
from tests.linalg.matrices import LAPACK, place, planted, spectrum
from tests.selected import first

pytestmark = pytest.mark.usefixtures("x64")

THRESHOLD = 30
SMALL, LARGE = [(1, 1), (2, 3), (6, 64)], [(1, 9), (9, 1), (40, 24), (24, 40), (50, 400), (400, 50)]
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
# Largest entries at both ends of what `svd` and the rest say they take; float16 has less.
SCALES = {"bfloat16": [1e-14, 1e14], "float16": [1e-3, 1e4], "float32": [1e-14, 1e14], "float64": [1e-140, 1e149]}
GRID = [("float32", 1.0, SMALL)]
GRID += [(dtype, scale, SMALL) for dtype in DTYPES for scale in SCALES[dtype]] + [("float64", 1.0, SMALL)]
LARGE_GRID = [(dtype, 1.0, shapes) for dtype in DTYPES for shapes in (LARGE, [(500, 4096)])]
# On eight devices, with few spectra of the last: forced host devices solve the same small problem eight times.
EIGHT = [*GRID, *((dtype, 1.0, [(1, 9), (9, 1), (40, 24)]) for dtype in DTYPES)]
EIGHT += [(dtype, 1.0, [(50, 400)]) for dtype in ("float32", "float64")]
FEW = ["clustered_low", "geometric", "rank3"]
DEVICES = [*((*case, 1) for case in [*GRID, *LARGE_GRID]), *((*case, 8) for case in EIGHT)]


def names_of(shapes, devices):
    return FEW if devices > 1 and min(shapes[0]) >= 50 else LAPACK


def with_products(cases):
    """Cases (dtype, ...) with each dtype of products in front; float64 weights have float64 products alone."""
    both = ("float32", "float64")
    return [(products, *case) for products in both for case in cases if (products, case[0]) != both]


def ulp(dtype):
    return 2.0**-52 if dtype == "float64" else 2.0**-23


def norm(x):
    """1-norm."""
    return float(np.abs(x).sum(0).max(initial=0))


def cases(dtype, scale, shapes, names=LAPACK):
    """(label, x in its dtype, x in float64, its singular values) over shapes and spectra."""
    for shape in shapes:
        for name in names:
            yield (shape, name), *_case(dtype, scale, shape, name)


@functools.lru_cache(maxsize=len(LAPACK))
def _case(dtype, scale, shape, name):
    x = planted(*shape, spectrum(name, min(shape)), seed=3)[0]
    x = (scale * x / (np.abs(x).max() or 1)).astype(DTYPES[dtype])
    wide = x.astype(np.float64)
    found = x, wide, np.linalg.svd(wide, compute_uv=False)
    for one in found:
        one.flags.writeable = False
    return found


def orthonormality(q, dtype):
    """Ratio of the non-zero columns of q (m, l)."""
    q = np.asarray(q, np.float64)
    q = q[:, np.any(q != 0, axis=0)]
    return norm(np.eye(q.shape[1]) - q.T @ q) / (len(q) * ulp(dtype)) if q.size else 0.0


def svd_ratios(x, values, u, s, vt, dtype):
    u, s, vt = (np.asarray(a, np.float64) for a in (u, s, vt))
    assert np.all(np.diff(s) <= 0) and np.all(s >= 0)
    unit = (norm(x) or 1) * max(x.shape) * ulp(dtype)
    first = (values[0] or 1) * len(values) * ulp(dtype)
    # Components without vectors are left out of the residual: as much as they hold is no error of the others.
    left = s[: len(vt)][~np.any(vt != 0, axis=1)].sum() * max(x.shape) ** 0.5
    residual = max(norm(x - (u * s[: len(vt)]) @ vt) - left, 0)
    ratios = [residual / unit, orthonormality(u, dtype), orthonormality(vt.T, dtype)]
    return [*ratios, np.abs(s - values[: len(s)]).max() / first]


def require(found, method=None):
    """All ratios of {label: ratios} under the threshold, not NaN either; logs the largest, and of how many classes."""
    over = {label: ratios for label, ratios in found.items() if not max(ratios) < THRESHOLD}
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[2].removesuffix(" (call)")
    named = method or test.partition("[")[2].partition("-")[0].rstrip("]")
    if "test_ratios_sharded" in os.environ.get("PYTEST_CURRENT_TEST", "") or test.endswith("-8]"):
        named += ", 8 devices"
    largest = max((max(ratios), str(label)) for label, ratios in found.items())
    record("NUM-1", f"{test.partition('[')[0]}, {named}", [float(largest[0]), largest[1], len(found), len(over)])
    assert not over, over


def full(x):
    return svd.randomized_svd(x, jax.random.key(7), rank=min(x.shape))


def krylov(x):
    return svd.randomized_svd(x, jax.random.key(7), rank=min(x.shape), passes=3, range_finder="krylov")


def gram64(x):
    return svd.gram_svd(x, dtype="float64")


# A float64 matrix through its Gram matrix keeps half its digits, which its floor says: not part of the range.
SVDS = {"thin": svd.thin_svd, "gram": gram64, "randomized": full, "krylov": krylov}


@pytest.mark.parametrize("dtype, scale, shapes", first([*GRID, *LARGE_GRID]))
@pytest.mark.parametrize("method", first(["thin", "gram", "randomized", "krylov"], 2))
def test_singular_value_decompositions(method, dtype, scale, shapes):
    if method == "gram" and dtype == "float64":
        pytest.skip("out of its range: see test_values_over_the_floor_are_true")
    found = {}
    for label, x, wide, values in cases(dtype, scale, shapes):
        result = SVDS[method](jnp.asarray(x))
        found[label] = svd_ratios(wide, values, result.u, result.s, result.vt, dtype)
        assert np.array_equal(np.any(result.vt, axis=1), np.any(result.u, axis=0))
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e36])
def test_thin_svd_takes_more_scales(scale):
    found = {}
    for label, x, wide, values in cases("float32", scale, SMALL):
        result = svd.thin_svd(jnp.asarray(x))
        found[label] = svd_ratios(wide, values, result.u, result.s, result.vt, "float32")
    require(found)


@pytest.mark.parametrize(
    "products, dtype, scale, shapes",
    first([*with_products(GRID[:1]), *with_products([*GRID[1:], *LARGE_GRID])], 2),
)
def test_values_over_the_floor_are_true(products, dtype, scale, shapes):
    """Energies of a Gram matrix are right to the ulp of its products; a value over the floor is one of x."""
    found = {}
    for label, x, _, values in cases(dtype, scale, shapes):
        result = svd.gram_svd(jnp.asarray(x), dtype=products)
        s, floor = np.asarray(result.s), float(result.floor)
        assert np.array_equal(result.is_resolved, s > floor)
        unit = (values[0] ** 2 or 1) * len(values) * ulp(products)
        found[label] = [np.abs(s**2 - values**2).max() / unit]
        assert np.abs(s - values)[s > floor].max(initial=0) <= floor and not np.any(np.asarray(result.vt)[s <= floor])
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, scale, shapes", [*GRID, *LARGE_GRID])
def test_single_pass_of_at_most_the_rank_it_keeps(dtype, scale, shapes):
    found = {}
    for label, x, wide, values in cases(dtype, scale, shapes, ["zero", "rank3", "low_rank"]):
        if dtype in ("bfloat16", "float16") and min(x.shape) > 8:
            continue  # rounding to 16 bits has made it full rank
        rank = min(8, *x.shape)
        result = single_pass.single_pass_svd([(0, 0, x)], jax.random.key(1), shape=x.shape, rank=rank)
        found[label] = svd_ratios(wide, values, result.u, result.s, result.vt, dtype)
        true = np.linalg.norm(wide - (np.asarray(result.u, np.float64) * result.s) @ np.asarray(result.vt, np.float64))
        assert true <= float(result.upper) * np.linalg.norm(wide)
    if not found:
        pytest.skip("all of full rank in 16 bits")
    require(found)


METHODS = {"tsqr": orth.tsqr, "cholesky_qr2": orth.cholesky_qr2, "qr": orth.qr}


@pytest.mark.slow
@pytest.mark.parametrize("dtype, scale, shapes", [*GRID, *LARGE_GRID])
@pytest.mark.parametrize("method", [*METHODS, "cholesky_lq2"])
def test_orthonormalisations(method, dtype, scale, shapes):
    found = {}
    for label, x, wide, _ in cases(dtype, scale, shapes):
        if len(x) < x.shape[1]:
            x, wide = x.T, wide.T
        if method == "cholesky_lq2":
            q, r = orth.cholesky_lq2(jnp.asarray(x.T))
            q = q.T
        else:
            q, r = METHODS[method](jnp.asarray(x))
        q, r = np.asarray(q, np.float64), np.asarray(r, np.float64)
        residual = norm(wide - q @ r) / ((norm(wide) or 1) * max(x.shape) * ulp(dtype))
        found[label] = [residual, orthonormality(q, dtype)]
        assert np.all(np.triu(r) == r) and np.all(np.diag(r) >= 0)
    require(found)


FITS = {"hosvd": tucker.hosvd, "sthosvd": tucker.sthosvd, "hooi": tucker.hooi}
TENSORS = [(1, 1, 1), (1, 5, 1), (6, 5, 4), (20, 30, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("products, dtype, scale", with_products([(d, s) for d in DTYPES for s in (1.0, *SCALES[d])]))
@pytest.mark.parametrize("method", FITS)
def test_tucker_decompositions(method, products, dtype, scale):
    unit, found = ulp(products), {}
    for shape in TENSORS:
        for decay in (0.0, 0.5, 1.0):
            rng = np.random.default_rng(4)
            x = rng.standard_normal(shape)
            for axis, size in enumerate(shape):
                turn = np.linalg.qr(rng.standard_normal((size, size)))[0] * decay ** np.arange(size)
                x = reference_tucker.mode_product(x, turn, axis)
            x = (scale * x / np.abs(x).max()).astype(DTYPES[dtype])
            result = FITS[method](jnp.asarray(x), ranks=shape, dtype=products)
            wide = x.astype(np.float64)
            ratios = [reference_tucker.error(wide, result.core, result.factors) / (max(shape) * unit)]
            for axis, (factor, energies) in enumerate(zip(result.factors, result.energies, strict=True)):
                ratios.append(orthonormality(np.asarray(factor).T, products))
                flat = np.moveaxis(wide, axis, 0).reshape(shape[axis], -1)
                true = np.zeros(shape[axis])
                values = np.linalg.svd(flat, compute_uv=False) ** 2
                true[: len(values)] = values[: shape[axis]]
                got = np.zeros(shape[axis])
                got[: len(energies)] = energies
                ratios.append(np.abs(got - true).max() / (true[0] * shape[axis] * unit))
                over = got > float(result.floors[axis])
                assert np.abs(np.sqrt(got) - np.sqrt(true))[over].max(initial=0) ** 2 <= float(result.floors[axis])
            found[shape, decay] = ratios
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("products, dtype, scale, shapes, devices", with_products(DEVICES))
def test_incremental_components(products, dtype, scale, shapes, devices):
    """Of a stream that fits its rows: energies to the ulp of the products, and no value over the floor that x lacks."""
    mesh, found = placement.make_mesh(devices), {}
    for label, x, wide, _ in cases(dtype, scale, shapes, names_of(shapes, devices)):
        size = len(x)
        stream = incremental.start(place(x, mesh).shape[1], rows=size, dtype=products)
        for batch in (x[: size // 2], x[size // 2 :]):
            if len(batch):
                stream = incremental.update(stream, place(batch, mesh), mesh=mesh)
        result = incremental.finish(stream, rank=size, mesh=mesh)
        values = np.zeros(size)
        true = np.linalg.svd(wide - wide.mean(0), compute_uv=False)
        values[: len(true)] = true[:size]
        s, floor = np.asarray(result.singular_values), float(result.floor)
        # A mean far longer than what is left rounds at its own scale, which `energy_error` carries.
        unit = max(values[0] ** 2, (ulp("float64") * norm(wide)) ** 2) * min(x.shape) * ulp(products)
        unit = max(unit, np.finfo(np.float64).tiny)
        found[label] = [
            orthonormality(np.asarray(result.basis)[:, : x.shape[1]].T, products),
            np.abs(s**2 - values**2).max() / unit,
        ]
        assert np.abs(s - values)[s > floor].max(initial=0) <= floor
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, scale, shapes", [*GRID, *LARGE_GRID])
def test_selections(dtype, scale, shapes):
    found = {}
    for label, x, wide, values in cases(dtype, scale, shapes):
        exact = wide @ wide.T
        compute = "float64" if dtype == "float64" else "float32"
        g = exact.astype(compute)
        n, largest = len(x), exact.max() or 1.0
        result = selection.pivoted_cholesky(jnp.asarray(g), rank=n)
        factor = np.asarray(result.factor, np.float64)
        kept = int(result.num_resolved)
        rest = np.diag(exact - factor @ factor.T) - np.asarray(result.residuals)
        # Every resolved step stands for a direction of x over the rounding of its Gram matrix.
        floor = n * ulp(compute) * largest
        assert kept <= np.sum(values**2 > floor / THRESHOLD)
        found[label] = [np.abs(rest).max() / (largest * n * ulp(compute))]
        chosen = selection.select_models(jnp.asarray(g), rank=max(1, n // 2), gram_rounding=ulp(compute))
        models = np.asarray(chosen.models)
        c = np.asarray(chosen.coefficients, np.float64)[:, models >= 0]
        true = np.square(wide - c @ wide[models[models >= 0]]).sum(1)
        assert (true <= np.asarray(chosen.squared_errors)).all()
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("products, dtype, scale, shapes, devices", with_products(DEVICES))
def test_moments(products, dtype, scale, shapes, devices):
    mesh, found = placement.make_mesh(devices), {}
    for label, x, wide, _ in cases(dtype, scale, shapes, names_of(shapes, devices)):
        n = len(x)
        if n < 2:
            continue
        old, new = x[: n // 2], x[n // 2 :]
        mean = old.astype(np.float64).mean(0)
        run = functools.partial(moments.border, mesh=mesh, dtype=products)
        sums = gram.dense_gram(place(old, mesh), np.zeros((0, len(old)), np.float32), mesh=mesh, dtype=products)[0]
        added = moments.add_models(sums, run(place(old, mesh), place(new, mesh), place(mean, mesh)))
        kept = moments.remove_models(added, np.arange(len(old)))
        largest = np.square(wide - mean).sum(1).max() or 1.0
        ratios = []
        for result, rows in ((added, wide), (kept, old.astype(np.float64))):
            y = rows - rows.mean(0)
            ratios.append(np.abs(np.asarray(result.gram) - y @ y.T).max() / (largest * n * ulp(products)))
        found[label] = ratios
    require(found)
