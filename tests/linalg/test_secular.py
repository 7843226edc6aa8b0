"""Rank-one downdates against an explicit eigendecomposition of every updated matrix."""

import numpy as np
import pytest

from jaxsub.linalg import secular

SIZE = 14


def cases():
    rng = np.random.default_rng(0)
    spread = np.sort(rng.random(SIZE))[::-1]
    dense = rng.standard_normal((5, SIZE))
    sparse = dense * (rng.random((5, SIZE)) < 0.5)
    sparse[0] = 0.0
    return {
        "generic": (spread, dense),
        "zero entries": (spread, sparse),
        "tiny entries": (spread, dense * 10.0 ** -rng.uniform(0, 12, (5, SIZE))),
        "repeated values": (np.repeat([3.0, 2.0], SIZE // 2), dense),
        "clusters": (np.repeat([3.0, 2.0], SIZE // 2) - 1e-12 * np.arange(SIZE), dense),
        "one large": (np.concatenate([[1e6], spread[1:]]), dense),
        "graded": (10.0 ** -np.arange(SIZE), dense * 10.0 ** -(np.arange(SIZE) / 2)),
        "rank deficient": (np.concatenate([spread[:6], np.zeros(SIZE - 6)]), dense),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [1, 6, SIZE - 1])
def test_downdate_equals_the_explicit_eigenproblem(name, rank):
    values, z = CASES[name]
    # Downdates of covariances stay positive semi-definite; so does this one: a |z|^2 is kept below the smallest value.
    leverage = np.array([1.0, 1.05, 1.5, 2.0, 1.2])
    z = z * np.sqrt(values) / np.sqrt(2 * SIZE)
    roots, projections = secular.downdate(values, z**2, leverage, rank=rank)
    for i, a in enumerate(leverage):
        w, q = np.linalg.eigh(np.diag(values) - a * np.outer(z[i], z[i]))
        np.testing.assert_allclose(roots[i], w[::-1][:rank], rtol=0, atol=secular.STEP_TOLERANCE * values[0])
        # Within a cluster only the sum of projections is determined: compare sums up to a real gap.
        sums = np.cumsum((q[:, ::-1].T @ z[i]) ** 2)[:rank]
        gaps = w[::-1][:rank] - w[::-1][1 : rank + 1]
        apart = gaps > 1e-6 * values[0]
        np.testing.assert_allclose(np.cumsum(projections[i])[apart], sums[apart], rtol=0, atol=1e-9 * values[0])


def test_roots_interlace_and_projections_are_positive():
    values, z = CASES["generic"]
    roots, projections = secular.downdate(values, (0.1 * z) ** 2, np.ones(5), rank=SIZE - 1)
    assert (roots <= values[:-1]).all() and (roots >= values[1:]).all()
    assert (projections >= 0).all() and (projections.sum(1) <= (0.01 * z**2).sum(1) * (1 + 1e-9)).all()


def test_untouched_eigenvectors_are_deflated():
    values = np.array([5.0, 4.0, 4.0, 1.0])
    weights = np.array([[0.0, 0.2, 0.3, 0.0], [0.5, 0.0, 0.0, 0.1]])
    roots, projections = secular.downdate(values, weights, np.ones(2), rank=3)
    np.testing.assert_allclose(roots[0], [5.0, 4.0, 3.5], atol=1e-14)
    np.testing.assert_allclose(projections[0], [0.0, 0.0, 0.5], atol=1e-14)
    np.testing.assert_allclose(roots[1, 1:], [4.0, 4.0], atol=1e-14)
    assert projections[1, 1:].max() < 1e-14


def test_no_components_wanted():
    roots, projections = secular.downdate(np.array([1.0, 0.5]), np.ones((3, 2)), np.ones(3), rank=0)
    assert roots.shape == projections.shape == (3, 0)


def spectra():
    rng = np.random.default_rng(2)
    wigner = rng.standard_normal((300, 300))
    return {
        "flat": 1 + 1e-3 * np.linalg.eigvalsh(wigner + wigner.T)[::-1] / 30,
        "slow decay": 0.98 ** np.arange(300.0),
        "power law": 1 / np.arange(1.0, 301),
        "two levels": np.concatenate([np.linspace(3, 2.9, 20), np.linspace(1, 0.9, 280)]),
    }


@pytest.mark.parametrize("name", spectra())
def test_distant_poles_may_enter_as_a_polynomial(name, monkeypatch):
    values = spectra()[name]
    weights = values * np.random.default_rng(3).chisquare(1, (40, 300)) / 300
    leverage = np.full(40, 40 / 39)
    found = secular.downdate(values, weights, leverage, rank=32)
    assert any(poles.far is not None for poles in secular._poles(values / values[0], 32))
    monkeypatch.setattr(secular, "DEGREE", 1)
    weak = secular.downdate(values, weights, leverage, rank=32)
    monkeypatch.setattr(secular, "NEAR", np.inf)
    exact = secular.downdate(values, weights, leverage, rank=32)
    sums = [np.cumsum(projections, axis=1) for _, projections in (found, weak, exact)]
    assert np.abs(sums[0] / sums[2] - 1).max() < 1e-9
    assert np.abs(sums[1] / sums[2] - 1).max() > 1e-6
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-12)


@pytest.mark.parametrize("name", ["generic", "zero entries", "repeated values", "clusters", "one large", "graded"])
def test_sums_from_an_integral_are_those_of_the_roots(name):
    values, z = CASES[name]
    leverage, ks = np.array([1.0, 1.05, 1.5, 2.0, 1.2]), [0, 1, 5, 6, 7, SIZE - 1]
    weights = z**2 * values / (2 * SIZE)
    _, projections = secular.downdate(values, weights, leverage, rank=SIZE - 1)
    sums = np.concatenate([np.zeros((5, 1)), np.cumsum(projections * leverage[:, None] ** 2, axis=1)], axis=1)
    found = secular.explained(values, weights, leverage, ks)
    largest = max(weights.sum(axis=1).max(), 1e-9 * values[0])
    np.testing.assert_allclose(found, sums[:, ks], rtol=0, atol=1e-7 * largest)


def test_a_coarser_integral_is_not_enough(monkeypatch):
    values, z = CASES["generic"]
    weights = z**2 * values / (2 * SIZE)
    fine = secular.explained(values, weights, np.ones(5), [6])
    for name, value in (("NODE_STEP", 1.0), ("LEAST", 1e-2), ("MOST", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(secular, name, value)
            assert (
                np.abs(secular.explained(values, weights, np.ones(5), [6]) - fine).max() > 1e-7 * weights.sum(1).max()
            )
