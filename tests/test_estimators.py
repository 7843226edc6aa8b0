"""Array-level estimators: scikit-learn's own checks, and its PCA as oracle."""

import math
import warnings

import numpy as np
import pytest

from jaxsub import estimators

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from tests.selected import first


def checks():
    found = []
    for estimator in (estimators.GramPCA(), estimators.RandomizedPCA(n_components=1), estimators.Tucker(energy=0.99)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would have estimators inherit from scikit-learn
            every = list(estimator_checks_generator(estimator))
        for _, check in every:
            name = getattr(check, "func", check).__name__
            found.append(pytest.param(estimator, check, id=f"{type(estimator).__name__}-{name}"))
    return found


@pytest.mark.slow  # many shapes, each compiled
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("estimator, check", checks())
def test_scikit_learn_accepts_it(estimator, check):
    check(clone(estimator))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((40, 12)) @ (rng.standard_normal((12, 200)) * 0.7 ** np.arange(12)[:, None]) + 3


@pytest.mark.parametrize("estimator", first([estimators.GramPCA(6), estimators.RandomizedPCA(6)]))
def test_pca_equals_scikit_learn(rows, estimator):
    oracle = PCA(6, svd_solver="full").fit(rows)
    found = estimator.fit(rows)
    np.testing.assert_allclose(found.singular_values_, oracle.singular_values_, rtol=1e-8)
    np.testing.assert_allclose(found.explained_variance_ratio_, oracle.explained_variance_ratio_, rtol=1e-8)
    np.testing.assert_allclose(np.abs(found.transform(rows)), np.abs(oracle.transform(rows)), atol=1e-7)
    np.testing.assert_allclose(
        found.inverse_transform(found.transform(rows)), oracle.inverse_transform(oracle.transform(rows)), atol=1e-7
    )
    true = np.linalg.norm(rows - found.inverse_transform(found.transform(rows))) / np.linalg.norm(rows - rows.mean(0))
    assert abs(found.relative_error_ - true) < 1e-7


def test_share_of_variance_chooses_the_components(rows):
    assert estimators.GramPCA(0.9).fit(rows).n_components_ == PCA(0.9, svd_solver="full").fit(rows).n_components_
    with pytest.raises(ValueError, match="1 to 39"):
        estimators.GramPCA(40).fit(rows)
    assert estimators.GramPCA().fit(rows).n_components_ == 12  # what lies under the floor is not counted


@pytest.mark.slow
def test_tucker_of_all_directions_is_exact_and_fewer_say_their_error(rows):
    whole = estimators.Tucker((10, 20), ranks=(10, 20)).fit(rows)
    np.testing.assert_allclose(whole.inverse_transform(whole.transform(rows)), rows, atol=1e-8)
    part = estimators.Tucker((10, 20), ranks=(4, 7)).fit(rows)
    rebuilt = part.inverse_transform(part.transform(rows))
    true = np.linalg.norm(rows - rebuilt) / np.linalg.norm(rows - rows.mean(0))
    assert part.transform(rows).shape == (40, 28) and abs(part.relative_error_ - true) < 1e-6


@pytest.mark.parametrize("dtype", first(["float32", "float64"]))
@pytest.mark.parametrize("noise", first([1e-4, 1e-2, 1e-3, 1e-5], 1))
def test_errors_are_those_of_the_residual(dtype, noise):
    """A difference of sums of squares in float32 would say 0 of 3e-5 and 6e-4 of 1e-4."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 5)) @ rng.standard_normal((5, 1000))
    x = (x + noise * np.linalg.norm(x) / math.sqrt(x.size) * rng.standard_normal(x.shape)).astype(dtype)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    for estimator in (estimators.RandomizedPCA(5), estimators.GramPCA(5)):
        v = estimator.fit(x).components_.astype(np.float64)
        truth = np.linalg.norm(centred - centred @ v.T @ v) / np.linalg.norm(centred)
        assert estimator.relative_error_ == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("count", [1.0, 1.5, True, 0, -1, 999, "2", float("nan")])
def test_numbers_of_components_that_are_none_are_refused(rows, count):
    for make in (estimators.GramPCA, estimators.RandomizedPCA):
        with pytest.raises(ValueError, match="n_components="):
            make(count).fit(rows)
    with pytest.raises(ValueError, match="ranks="):
        estimators.Tucker(ranks=(count,)).fit(rows)


def test_ranks_of_numpy_are_taken_and_lists_of_another_length_refused(rows):
    assert [len(f) for f in estimators.Tucker(ranks=np.array([2])).fit(rows).factors_] == [2]
    for ranks in ((2, 2), (None,), ()):
        with pytest.raises(ValueError, match="ranks="):
            estimators.Tucker(ranks=ranks).fit(rows)


def test_works_in_a_pipeline(rows):
    assert make_pipeline(StandardScaler(), estimators.GramPCA(3)).fit_transform(rows).shape == (40, 3)


@pytest.mark.parametrize("num_models", [5, 7])
def test_rounding_of_a_large_mean_is_no_component(num_models):
    """Rows exactly of rank one about a base, float64."""
    rng = np.random.default_rng(0)
    base = np.ldexp(np.round(rng.standard_normal(3000) * 2**40), -30)
    step = np.ldexp(np.round(rng.standard_normal(3000) * 2**12), -39)
    x = base + np.outer(rng.integers(-3, 4, num_models).astype(float), step)
    assert estimators.GramPCA().fit(x).n_components_ == 1
