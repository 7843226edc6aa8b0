"""Choosing models from a Gram matrix, against choosing rows from the weights themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxsub import errors
from jaxsub.linalg import reference_geometry as reference, selection

pytestmark = pytest.mark.usefixtures("x64")


def rows(n=24, d=60, decay=0.7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * decay ** np.arange(d)


def check(x, found, rank):
    """The coefficients, errors and bounds of a selection, against the rows."""
    models, c = np.asarray(found.models), np.asarray(found.coefficients)
    kept = models[models >= 0]
    assert len(np.unique(kept)) == len(kept) == found.num_resolved
    np.testing.assert_allclose(c[kept], np.eye(rank)[models >= 0], atol=0)
    true = np.square(x - c[:, models >= 0] @ x[kept]).sum(1)
    largest = np.square(x).sum(1).max()
    assert (true <= np.asarray(found.squared_errors)).all()
    # Rounding of the bound itself: eps times the reach of the coefficients, squared.
    assert true.sum() <= found.error <= true.sum() + 1e-11 * largest * np.abs(c).sum(1).max() ** 2
    best = np.square(np.linalg.svd(x, compute_uv=False))
    assert found.best == pytest.approx(best[rank:].sum(), abs=1e-12 * largest)
    if found.is_settled and found.num_resolved == rank:
        assert np.linalg.norm(x - c @ x[kept], 2) ** 2 <= found.spectral_bound + 1e-12 * largest


@pytest.mark.parametrize("rank", [1, 5, 23, 24])
def test_pivots_are_those_of_the_rows(rank):
    x = rows()
    found = selection.pivoted_cholesky(x @ x.T, rank=rank)
    chosen, left = reference.greedy_rows(x, rank)
    assert found.pivots.tolist() == chosen and found.num_resolved == rank
    np.testing.assert_allclose(found.residuals, left, atol=1e-12 * np.square(x).sum(1).max())
    whole = np.asarray(found.factor @ found.factor.T)
    np.testing.assert_allclose(np.diag(x @ x.T - whole), found.residuals, atol=1e-12 * whole.max())
    assert found.traces[-1] == pytest.approx(float(found.residuals.sum())) and (np.diff(found.traces) <= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("rank", [1, 6, 24])
def test_selected_models_span_the_collection(decay, rank):
    x = rows(decay=decay)
    found = selection.select_models(x @ x.T, rank=rank)
    check(x, found, rank)
    # A random choice is the weak variant; greedy is near the best on decaying spectra.
    if decay == 0.5 and rank == 6:
        kept = np.arange(6) * 4
        c = np.linalg.lstsq(x[kept].T, x.T, rcond=None)[0].T
        assert found.error < 8 * found.best < np.square(x - c @ x[kept]).sum()


@pytest.mark.slow
def test_a_collection_of_few_distinct_models_is_spanned_exactly():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((20, 4)) @ rng.standard_normal((4, 50))
    found = selection.select_models(x @ x.T, rank=7)
    assert found.num_resolved == 4 and (np.asarray(found.models)[4:] == -1).all()
    assert (np.asarray(found.coefficients)[:, 4:] == 0).all()
    check(x, found, 7)
    assert found.error < 1e-11 * np.square(x).sum()


@pytest.mark.slow
def test_degenerate_collections():
    same = np.ones((5, 3))
    found = selection.select_models(same @ same.T, rank=2)
    assert found.num_resolved == 1 and found.models[1] == -1
    np.testing.assert_allclose(found.coefficients, [[1, 0]] * 5)
    found = selection.select_models(np.zeros((4, 4)), rank=2)
    assert found.num_resolved == 0 and found.error == 0 and found.best == 0 and np.isfinite(found.coefficients).all()
    found = selection.select_models(np.eye(1), rank=1)
    assert found.models.tolist() == [0] and found.error == 0


def kahan(n, angle=1.2):
    c, s = np.cos(angle), np.sin(angle)
    r = np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1))
    return r.T  # rows whose greedy order is 0, 1, 2, ...


@pytest.mark.slow
def test_swaps_mend_what_the_greedy_choice_spoils():
    """Kahan's matrix: every greedy pivot looks right, and the last row left out is the wrong one."""
    x = kahan(30) * (1 - 1e-9 * np.arange(30))[:, None]
    gram = x @ x.T
    greedy = selection.select_models(gram, rank=29, max_swaps=0)
    found = selection.select_models(gram, rank=29)
    assert not greedy.is_settled and found.is_settled and found.num_swaps > 0
    assert np.abs(greedy.coefficients).max() > 100
    assert np.abs(found.coefficients).max() <= 2 * (1 + 1e-9)
    assert found.error < 0.05 * greedy.error
    check(x, greedy, 29)
    check(x, found, 29)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), decay=st.floats(0.05, 1), scale=st.floats(-8, 8))
def test_bounds_hold(seed, decay, scale):
    x = 10.0**scale * rows(12, 16, decay, seed)
    check(x, selection.select_models(x @ x.T, rank=5), 5)


@pytest.mark.slow
def test_float32_gram_matrices_and_their_rounding():
    x = rows(decay=0.5).astype(np.float32)
    gram = jnp.asarray(x) @ jnp.asarray(x).T
    found = selection.select_models(gram, rank=20, gram_rounding=1e-6)
    assert found.coefficients.dtype == jnp.float32 and found.num_resolved < 20
    models = np.asarray(found.models)
    c = np.asarray(found.coefficients, float)[:, models >= 0]
    true = np.square(x.astype(float) - c @ x[models[models >= 0]]).sum(1)
    assert (true <= np.asarray(found.squared_errors)).all()
    half = selection.pivoted_cholesky(gram.astype(jnp.bfloat16), rank=3)
    assert half.factor.dtype == jnp.float32


def test_refusals():
    with pytest.raises(errors.ConfigError, match="gram has shape"):
        selection.pivoted_cholesky(np.ones((3, 4)), rank=1)
    for rank in (0, 4, True, 2.0):
        with pytest.raises(errors.ConfigError, match="expected an integer from 1 to 3"):
            selection.select_models(np.eye(3), rank=rank)
    with pytest.raises(errors.ConfigError, match="growth is 1"):
        selection.select_models(np.eye(3), rank=1, growth=1)
