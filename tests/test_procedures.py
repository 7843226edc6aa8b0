"""The released procedures V1 to V5 against what their originals compute, defects included where asked for."""

import jax
import numpy as np
import pytest

from jaxsub import plugins, stacks

RNG = np.random.default_rng(0)


def fit(name, x, **options):
    module = plugins.load("decompositions", name)
    return module.fit(stacks.DenseStack.create(np.asarray(x)), module.Options(**options), jax.random.key(0))


def same_span(rows, columns, tolerance=1e-5):
    cosines = np.linalg.svd(np.asarray(rows, np.float64) @ columns, compute_uv=False)
    assert cosines.min() > 1 - tolerance


def spread(*shape, decay=0.8):
    """A random tensor whose last axes have a decaying spectrum and a mean."""
    x = RNG.standard_normal(shape) * decay ** np.arange(shape[-1])
    return (x + RNG.standard_normal(shape[1:])).astype(np.float32)


def test_row_pca_is_pca_of_all_rows():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = spread(9, 20, 30)
    rows = (x - x.mean(0)).reshape(-1, 30)
    original = decomposition.PCA(12).fit(rows)
    found = fit("row_pca", x, rank=12)
    same_span(found.factors[1], original.components_.T)
    np.testing.assert_allclose(found.spectra[1].shares[:12], original.explained_variance_ratio_, rtol=1e-4)
    codes = np.abs(original.transform(rows)).reshape(9, 20, 12)
    np.testing.assert_allclose(np.abs(found.project(x)), codes, atol=1e-3)


def test_procedures_answer_to_the_name_they_report():
    found = fit("row-pca", spread(9, 20, 30), rank=3)
    assert found.procedure.name == "row-pca"
    assert plugins.load("decompositions", found.procedure.name) is plugins.load("decompositions", "row_pca")


@pytest.mark.slow
def test_row_pca_faithful_keeps_the_cap_or_refits_as_the_scripts_do():
    x = RNG.standard_normal((6, 40, 30)).astype(np.float32)  # flat: 10 of 30 directions hold about 0.37
    honest = fit("row_pca", x, cap=10)
    assert honest.rank == {1: 10} and not honest.procedure.reached
    held = honest.spectra[1].shares[:10].sum()
    faithful = fit("row_pca", x, cap=10, faithful=True)
    assert faithful.rank == {1: int(0.9 * 10 / held)} and faithful.procedure.faithful
    enough = fit("row_pca", x, cap=29, faithful=True)
    assert enough.rank == {1: 29} and enough.procedure.reached  # the released scripts keep all they asked for
    assert fit("row_pca", x, cap=29).rank[1] < 29


@pytest.mark.slow
def test_a_stack_of_narrow_factors_is_flagged():
    """Defect 4.3-1: d x 16 factors stacked on axis 0 have 16 components by construction."""
    narrow, square = spread(10, 128, 16), spread(10, 32, 30)
    found = fit("row_pca", narrow, energy=1.0)
    assert found.procedure.cap == 16 and "narrow_axis" in found.procedure.flags
    assert fit("row_pca", square).procedure.flags == ()


@pytest.mark.slow
def test_col_svd_is_the_uncentred_left_basis_and_flags_full_rank():
    x = spread(5, 70, 40)
    u = np.linalg.svd(np.concatenate(list(x), axis=1).astype(np.float64), full_matrices=False)[0]
    found = fit("col_svd", x)
    assert found.procedure.centring == "none" and found.rank == {0: 64} and not found.procedure.flags
    same_span(found.factors[0], u[:, :64], 1e-4)
    small = fit("col_svd", spread(5, 12, 3, 2))
    assert "full_rank" in small.procedure.flags and small.certificate.relative_error < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_col_svd", "lora_cov"])
def test_lora_columns_and_the_mean_that_is_never_added_back(name):
    x = spread(7, 40, 4)  # B factors, d = 40
    x += 2 * RNG.standard_normal((40, 1)).astype(np.float32)  # every column far from the origin
    columns = np.concatenate(list(x), axis=1).astype(np.float64)
    mean = columns.mean(1, keepdims=True)
    u = np.linalg.svd(columns - mean, full_matrices=False)[0][:, :6]
    honest, faithful = fit(name, x, rank=6), fit(name, x, rank=6, faithful=True)
    same_span(honest.factors[0], u)
    np.testing.assert_array_equal(np.asarray(honest.factors[0]), np.asarray(faithful.factors[0]))
    rebuilt = np.asarray(faithful.reconstruct(faithful.project(x)), np.float64)
    np.testing.assert_allclose(rebuilt, np.einsum("da,ea,ner->ndr", u, u, x), atol=1e-3)
    with_mean = np.asarray(honest.reconstruct(honest.project(x)), np.float64)
    errors_of = [np.linalg.norm(x - r) / np.linalg.norm(x) for r in (rebuilt, with_mean)]
    assert errors_of[0] > 2 * errors_of[1]  # the defect shows
    assert abs(faithful.certificate.relative_error - errors_of[0]) < 1e-4


@pytest.mark.slow
def test_lora_factors_may_lie_either_way():
    x = spread(7, 40, 4)
    a = fit("lora_cov", x, rank=5)
    b = fit("lora_cov", np.swapaxes(x, 1, 2).copy(), rank=5)
    assert list(a.factors) == [0] and list(b.factors) == [1]
    np.testing.assert_allclose(a.factors[0], b.factors[1], atol=1e-5)


@pytest.mark.slow
def test_lora_tucker_orders():
    x = spread(6, 30, 4)
    columns = np.concatenate(list(x), axis=1).astype(np.float64)
    u = np.linalg.svd(columns, full_matrices=False)[0][:, :5]
    second, third = fit("lora_tucker", x, rank=5), fit("lora_tucker", x, rank=5, order=3)
    same_span(second.factors[0], u)
    same_span(third.factors[0], u)  # at ranks (N, K, r) there is nothing left to alternate
    tensorly = pytest.importorskip("tensorly.decomposition")
    original = tensorly.tucker(x.astype(np.float64), rank=[6, 5, 4], init="svd", tol=1e-6)
    same_span(third.factors[0], original.factors[1])


@pytest.mark.slow
def test_flat_pca_is_pca_of_flattened_factors():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = spread(12, 10, 4)
    original = decomposition.PCA(5, svd_solver="full").fit(x.reshape(12, -1))
    found = fit("flat_pca", x, rank=5)
    same_span(found.basis, original.components_.T)
    np.testing.assert_allclose(found.mean, original.mean_, atol=1e-5)
    assert fit("flat_pca", x, rank=200).rank == 11
