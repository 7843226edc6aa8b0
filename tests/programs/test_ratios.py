"""LAPACK's test ratios of what the programs give: analyses and fits of files, every dtype at both ends of its range.

    |Y - c B| / (|Y| max(N, D) ulp)          Y: the models minus their mean, c and B as rebuilt from a bundle
    |I - B B.T| / (D ulp)                    of components over the floor
    |s - true| / (s_1 min(N, D) ulp)         of a report and of a bundle
    sin(angle) gap / (s_1 max(N, D) ulp)     to the planted space of rank 3
    |P(P x) - P x| / (|x| D ulp)             projecting what was projected

all under 30; ulp is that of the stored weights, 16-bit ones counting as float32; norms are 1-norms in float64. Kernels
have grids of their own in `tests/linalg/test_ratios*.py`; what only the programs do is here: scaling, centring, files.
"""

import numpy as np
import pytest

import jaxsub
from jaxsub import plugins
from tests.linalg.matrices import LAPACK, planted, spectrum
from tests.linalg.test_ratios import DTYPES, norm, require, ulp
from tests.programs import worlds

SHAPES = [(3, (1, 1)), (9, (1, 1)), (3, (3, 3)), (6, (8, 8)), (50, (20, 20)), (100, (10, 5)), (500, (64, 64))]
ENDS = {  # largest entries: 1, near overflow, near underflow (float32: subnormal)
    "bfloat16": (1.0, 3e38, 1e-36), "float16": (1.0, 6e4, 1e-2), "float32": (1.0, 3e38, 1e-40),
    "float64": (1.0, 1e280, 1e-280),
}  # fmt: skip
CASES = [(dtype, scale, *shape) for dtype in DTYPES for scale in ENDS[dtype] for shape in SHAPES]
ROWS = ("gram", "randomized")
FACTORS = ("hosvd", "sthosvd", "hooi", "row_pca", "col_svd")


def stacks(dtype, scale, count, shape):
    """spectrum -> (N, *shape) in its dtype: planted values, and `lora`, sums of products of two factors."""
    width = int(np.prod(shape))
    found = {name: planted(count, width, spectrum(name, min(count, width)), seed=3)[0] for name in LAPACK}
    rng = np.random.default_rng(8)
    rank = min(2, *shape)
    left, right = rng.standard_normal((shape[0], rank)), rng.standard_normal((count, rank, shape[1]))
    found["lora"] = (left @ right).reshape(count, width)
    return {
        name: (x / (np.abs(x).max() or 1) * scale).astype(DTYPES[dtype]).reshape(count, *shape)
        for name, x in found.items()
    }


@pytest.fixture
def collection(tmp_path):
    return lambda given: str(worlds.write(tmp_path / "c", given))


def centred(x):
    """(rows (N, D) minus their mean, their scale) in float64, near 1: no square leaves the range."""
    wide = x.reshape(len(x), -1).astype(np.float64)
    scale = np.abs(wide).max() or 1.0
    wide = wide / scale
    return wide - wide.mean(0), scale


def singular_values(y, count):
    values = np.zeros(count)
    found = np.linalg.svd(y, compute_uv=False)[:count]
    values[: len(found)] = found
    return values


@pytest.mark.slow
@pytest.mark.parametrize("dtype, scale, count, shape", CASES)
def test_an_analysis(collection, dtype, scale, count, shape):
    """Values over the floor to the ulp of the stored weights, and none over it that the models lack."""
    given = stacks(dtype, scale, count, shape)
    if all(not (x != x[0]).any() for x in given.values()):
        pytest.skip("one weight, the same in all models")
    found = {}
    for layer in jaxsub.analyze(collection(given), draws=1, splits=1).layers:
        y, unit = centred(given[layer["name"]])
        s, floor = np.array(layer["singular_values"]) / unit, layer["floor"] / unit
        values = singular_values(y, len(s))
        # Weights as stored: a layer whose mean is all that it has has values of the mean's rounding.
        first = max(values[0], np.abs(given[layer["name"]].astype(np.float64) / unit).max() * ulp("float64")) or 1
        over = s > floor
        found[layer["name"]] = [np.abs(s - values)[over].max(initial=0) / (first * min(count, len(y.T)) * ulp(dtype))]
        assert np.all(np.diff(s) <= 0) and np.all(s >= 0)
        assert np.abs(s - values)[~over].max(initial=0) <= 2 * floor
    require(found, "analyze")


def rebuilt_ratios(made, opened, given, dtype):
    """name -> (ratios of one bundle's layers)."""
    found = {}
    coefficients, again = made.coefficients(), made.project(opened)
    rebuilt = made.reconstruct(coefficients)
    twice = made.project({name: np.asarray(w) for name, w in rebuilt.items()})
    for layer in made.layers:
        x = given[layer.name]
        y, unit = centred(x)
        back = np.asarray(rebuilt[layer.name], np.float64).reshape(len(x), -1) / unit
        wide = x.reshape(len(x), -1).astype(np.float64) / unit
        found[layer.name] = (layer, y, wide, back, unit)
        c, p, q = (np.asarray(part.values[layer.name], np.float64) / unit for part in (coefficients, again, twice))
        size = max(float(np.abs(wide).sum(1).max()), 1e-300) * y.shape[1] * ulp(dtype)
        ratio = max(np.abs(c - p).max(initial=0), np.abs(p - q).max(initial=0)) / size
        found[layer.name] = (*found[layer.name], ratio)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("dtype, scale, count, shape", CASES)
def test_principal_components(collection, method, dtype, scale, count, shape):
    given = stacks(dtype, scale, count, shape)
    width, folder = int(np.prod(shape)), collection(given)
    rank = min(count - 1, width)
    made, found = jaxsub.fit(folder, decomposition=method, rank=rank), {}
    opened = jaxsub.open_collection(folder)
    for name, (layer, y, wide, back, unit, ratio) in rebuilt_ratios(made, opened, given, dtype).items():
        s = layer.subspace.spectrum.values / unit
        floor, basis = layer.subspace.spectrum.floor / unit, np.asarray(layer.subspace.basis, np.float64)
        values = singular_values(y, len(s))
        kept = basis[np.any(basis, axis=1)]
        left = np.linalg.norm(s[: len(basis)][~np.any(basis, axis=1)]) * width**0.5  # under the floor, and said so
        size = (norm(wide) or 1) * max(count, width) * ulp(dtype)
        first = (values[0] or norm(wide) or 1) * min(count, width) * ulp(dtype)
        ratios = [
            max(norm(wide - back) - left - floor * width**0.5, 0) / size,
            norm(np.eye(len(kept)) - kept @ kept.T) / (width * ulp(dtype)) if len(kept) else 0.0,
            np.abs(s - values)[s > floor].max(initial=0) / first,
            ratio,
        ]
        if name == "rank3" and min(count, width) > 4 and scale == 1 and dtype in ("float32", "float64"):
            ratios.append(angle(y, kept, dtype))
        found[name] = ratios
        error = np.linalg.norm(wide - back, axis=1) / np.where(np.any(wide, axis=1), np.linalg.norm(wide, axis=1), 1)
        assert error.max() <= layer.figures["error_max"] * (1 + 1e-3) + 4 * ulp(dtype) * max(count, width)
    require(found, method)


def angle(y, basis, dtype):
    """Ratio of the angle between the three leading directions of y and of a basis."""
    _, values, vt = np.linalg.svd(y, full_matrices=False)
    k = 3 if values[2] > 1e-3 * values[0] else 2  # centring may take one
    gone = vt[:k] - vt[:k] @ basis[:k].T @ basis[:k]
    gap = values[k - 1] - (values[k] if k < len(values) else 0)
    return np.linalg.norm(gone, 2) * gap / (values[0] * max(y.shape) * ulp(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("method", FACTORS)
@pytest.mark.parametrize("dtype, scale, count, shape", [case for case in CASES if case[2] >= 6 and min(case[3]) > 1])
def test_factors_of_weight_axes(collection, method, dtype, scale, count, shape):
    """At half of every axis: orthonormal, idempotent, the error that is stated, and under its certificate."""
    given = stacks(dtype, scale, count, shape)
    folder = collection(given)
    rank = max(1, min(shape) // 2)
    made, found = jaxsub.fit(folder, decomposition=method, rank=rank), {}
    opened = jaxsub.open_collection(folder)
    for name, (layer, y, wide, back, _, ratio) in rebuilt_ratios(made, opened, given, dtype).items():
        factors = [np.asarray(f, np.float64) for f in layer.subspace.factors.values()]
        loose = [norm(np.eye(len(f)) - f @ f.T) / (f.shape[1] * ulp("float32")) for f in factors]
        found[name] = [*loose, ratio]
        off = np.linalg.norm(wide - back, axis=1)
        norms = np.linalg.norm(wide, axis=1)
        error = off / np.where(norms > 0, norms, 1)
        slack = 8 * ulp("float32") * max(shape)
        np.testing.assert_allclose(layer.figures["error_max"], error.max(), rtol=1e-3, atol=slack)
        whole = np.linalg.norm(y if layer.subspace.procedure.centring != "none" else wide)
        if whole and method != "col_svd":  # whose mean is kept whole, and which fits what it does not take off
            assert np.linalg.norm(off) / whole <= layer.subspace.certificate.bound * (1 + 1e-6) + slack, name
    require(found, method)


def test_every_method_is_measured():
    named = {*ROWS, *FACTORS, "flat_pca"}  # flat_pca is gram with its rank cut
    assert named == {n for n in plugins.available("decompositions") if not n.startswith("lora")}
