"""The test ratios of `test_ratios` on eight devices: kernels that take a mesh axis, features padded with zeros."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxsub import placement
from jaxsub.linalg import gram, orth, svd
from tests.linalg.matrices import place
from tests.linalg.test_ratios import (
    EIGHT,
    cases,
    names_of,
    norm,
    orthonormality,
    require,
    svd_ratios,
    ulp,
)

pytestmark = pytest.mark.usefixtures("x64")

AXIS = "features"
COLUMNS, ROWS = P(None, AXIS), P(AXIS, None)
WIDE = ("float32", 1.0, [(500, 4096)])


@functools.cache
def compiled(function, inputs, outputs):
    mesh = placement.make_mesh(8)
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False))
    return lambda x: run(jax.device_put(x, NamedSharding(mesh, inputs)))


def gram64(x):
    return svd.gram_svd(x, dtype="float64", axis=AXIS)


def gram32(x):
    return svd.gram_svd(x, dtype="float32", axis=AXIS)


def full(x, **options):
    columns = x.shape[1] * jax.lax.axis_size(AXIS)
    return svd.randomized_svd(x, jax.random.key(7), rank=min(len(x), columns), axis=AXIS, **options)


def krylov(x):
    return full(x, passes=3, range_finder="krylov")


GRAM_SVD = svd.GramSvd(P(), P(), COLUMNS, P(), P(), P())
RANDOMIZED_SVD = svd.RandomizedSvd(P(), P(), COLUMNS, P(), P(), P())
SVDS = {"gram": (gram64, GRAM_SVD), "randomized": (full, RANDOMIZED_SVD), "krylov": (krylov, RANDOMIZED_SVD)}


def fill(x, least=1):
    """x with zero features at its end: a multiple of eight, and no fewer than `least`."""
    return np.pad(x, [(0, 0), (0, -(-max(x.shape[1], least) // 8) * 8 - x.shape[1])])


def stripped(x, result):
    """u, s, vt of the components that x can have; what lies in the padding or past them shows in the residual."""
    size = min(x.shape)
    assert not np.asarray(result.vt)[:, x.shape[1] :].any() and not np.asarray(result.vt)[size:].any()
    return result.u[:, :size], result.s[:size], result.vt[:size, : x.shape[1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, dtype, scale, shapes", [("gram", *WIDE), *((method, *case) for method in SVDS for case in EIGHT)]
)
def test_singular_value_decompositions(method, dtype, scale, shapes):
    if method == "gram" and dtype == "float64":
        pytest.skip("out of its range: see test_values_over_the_floor_are_true")
    run, found = compiled(SVDS[method][0], COLUMNS, SVDS[method][1]), {}
    for label, x, wide, values in cases(dtype, scale, shapes, names_of(shapes, 8)):
        result = run(fill(x, len(x) if method == "gram" else 1))  # a tall x with sharded columns is refused
        found[label] = svd_ratios(wide, values, *stripped(x, result), dtype)
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("products", ["float32", "float64"])
@pytest.mark.parametrize("dtype, scale, shapes", [*EIGHT, WIDE])
def test_values_over_the_floor_are_true(products, dtype, scale, shapes):
    if dtype == "float64" and products == "float32":
        pytest.skip("float64 weights have float64 products")
    run, found = compiled(gram64 if products == "float64" else gram32, COLUMNS, GRAM_SVD), {}
    for label, x, _, values in cases(dtype, scale, shapes, names_of(shapes, 8)):
        result = run(fill(x, len(x)))
        s, floor = np.asarray(result.s), float(result.floor)
        true = np.pad(values, (0, len(s) - len(values)))
        found[label] = [np.abs(s**2 - true**2).max() / ((values[0] ** 2 or 1) * len(values) * ulp(products))]
        assert np.abs(s - true)[s > floor].max(initial=0) <= floor and not np.any(np.asarray(result.vt)[s <= floor])
    require(found)


def tsqr(x):
    return orth.tsqr(x, AXIS)


def cholesky_qr2(x):
    return orth.cholesky_qr2(x, AXIS)


def cholesky_lq2(x):
    return orth.cholesky_lq2(x, AXIS)


QRS = {"tsqr": tsqr, "cholesky_qr2": cholesky_qr2, "cholesky_lq2": cholesky_lq2}


@pytest.mark.slow
@pytest.mark.parametrize("dtype, scale, shapes", [*EIGHT, WIDE])
@pytest.mark.parametrize("method", QRS)
def test_orthonormalisations(method, dtype, scale, shapes):
    is_wide, found = method == "cholesky_lq2", {}
    run = compiled(QRS[method], *((COLUMNS, (COLUMNS, P())) if is_wide else (ROWS, (ROWS, P()))))
    for label, x, wide, _ in cases(dtype, scale, shapes, names_of(shapes, 8)):
        if len(x) > x.shape[1]:
            x, wide = x.T, wide.T  # the long side is sharded
        q, r = run(fill(x) if is_wide else fill(x).T)
        q, r = np.asarray(q.T if is_wide else q, np.float64), np.asarray(r, np.float64)
        gone = np.pad(wide.T, [(0, len(q) - x.shape[1]), (0, 0)]) - q @ r
        ratios = [norm(gone) / ((norm(wide.T) or 1) * max(x.shape) * ulp(dtype)), orthonormality(q, dtype)]
        found[label] = ratios
        assert np.all(np.triu(r) == r) and np.all(np.diag(r) >= 0)
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("products", ["float32", "float64"])
@pytest.mark.parametrize("dtype, scale, shapes", [*EIGHT, WIDE])
def test_dense_gram_and_mixtures(dtype, scale, shapes, products):
    """The sums of one block, and directions from them, against centred rows in float64."""
    if dtype == "float64" and products == "float32":
        pytest.skip("float64 weights have float64 products")
    mesh, found = placement.make_mesh(8), {}
    for label, x, wide, _ in cases(dtype, scale, shapes, names_of(shapes, 8)):
        n = len(x)
        weights = np.eye(n, dtype=np.float64) - np.eye(n, k=1)
        sums, mixed = gram.dense_gram(place(x, mesh), weights, mesh=mesh, dtype=products)
        again = gram.combinations(place(x, mesh), weights, mesh=mesh, dtype=products)
        y = wide - wide.mean(0)
        # Rounding is that of the rows before their mean is off: what is left of it is the same for all models.
        largest = np.square(wide).sum(1).max() or 1.0
        centred = np.asarray(sums.gram) - np.asarray(sums.gram).mean(0)
        centred = centred - centred.mean(1, keepdims=True)
        unit = (norm(wide.T) or 1) * n * ulp(products)
        found[label] = [
            np.abs(centred - y @ y.T).max() / (largest * n * ulp(products)),
            *(norm((np.asarray(m, np.float64)[:, : x.shape[1]] - weights @ y).T) / unit for m in (mixed, again)),
        ]
    require(found)
