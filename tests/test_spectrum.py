"""Ranks, shares, effective ranks and the Marchenko-Pastur edge against closed forms."""

import math

import numpy as np
import pytest

from jaxsub import spectrum


def test_ranks_are_none_where_the_share_is_never_reached():
    ranks = spectrum.rank_at([5.0, 3.0], total=10.0)
    assert ranks["0.5"] == 1 and ranks["0.8"] == 2 and ranks["0.9"] is None
    assert spectrum.rank_at([0.0, 0.0])["0.5"] is None


def test_full_spectrum_reaches_every_share():
    assert spectrum.rank_at([1.0] * 100) == {
        "0.5": 50,
        "0.6": 60,
        "0.7": 70,
        "0.8": 80,
        "0.9": 90,
        "0.95": 95,
        "0.99": 99,
    }


def test_energy_stops_at_the_number_of_components():
    assert spectrum.energy_at([3.0, 1.0]) == {"1": 0.75}
    assert spectrum.energy_at([0.0] * 5) == {"1": None, "4": None}


def test_effective_ranks_of_a_flat_and_of_a_rank_one_spectrum():
    flat = spectrum.effective_ranks(np.full(8, 2.0))
    assert all(flat[n] == pytest.approx(8) for n in ("stable_rank", "participation_ratio", "erank", "erank_energy"))
    assert flat["entropy"] == pytest.approx(1)
    one = spectrum.effective_ranks([4.0, 0.0])
    assert one["stable_rank"] == one["participation_ratio"] == one["erank"] == 1 and one["entropy"] == 0


def test_effective_ranks_leave_out_what_is_no_share_at_all():
    with np.errstate(divide="raise", invalid="raise"):
        assert spectrum.effective_ranks([1e10, 1.0, 5e-324]) == spectrum.effective_ranks([1e10, 1.0])


def test_effective_ranks_tell_values_from_energies():
    ranks = spectrum.effective_ranks([4.0, 1.0])
    p = np.array([2 / 3, 1 / 3])
    assert ranks["erank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert ranks["participation_ratio"] == pytest.approx(25 / 17)


def test_centred_removes_the_mean_and_nothing_else():
    x = np.random.default_rng(0).standard_normal((6, 40)) + 3
    y = x - x.mean(0)
    np.testing.assert_allclose(spectrum.centred(x @ x.T), y @ y.T, atol=1e-11)


@pytest.mark.parametrize("n, d", [(40, 400), (100, 10000), (60, 80)])
@pytest.mark.parametrize("spikes", [0, 1, 5])
def test_marchenko_pastur_counts_planted_components(n, d, spikes):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((n, d))
        basis = np.linalg.qr(rng.standard_normal((d, max(spikes, 1))))[0].T[:spikes]
        # Each planted component holds 6 times the energy of the noise edge.
        x += math.sqrt(6) * (math.sqrt(d) + math.sqrt(n)) / math.sqrt(n) * rng.choice([-1, 1], (n, spikes)) @ basis
        values = spectrum.energies(spectrum.centred(x @ x.T))
        assert spectrum.marchenko_pastur_count(values, n, d) == spikes


def test_marchenko_pastur_on_noise_is_rarely_above_zero():
    found = 0
    for seed in range(60):
        x = np.random.default_rng(seed).standard_normal((50, 2000))
        found += spectrum.marchenko_pastur_count(spectrum.energies(spectrum.centred(x @ x.T)), 50, 2000) > 0
    assert found <= 2


def test_iid_stack_has_the_known_spectrum():
    """100 stacks of 768 x 768: top-1 .0103, top-16 .1648, from Wishart noise of the same N and D."""
    rng = np.random.default_rng(0)
    d = 768 * 768
    n = 100
    # A Wishart matrix by its Cholesky factor (Bartlett 1933) instead of 59 million normals.
    factor = np.tril(rng.standard_normal((n, n)), -1) + np.diag(np.sqrt(rng.chisquare(d - np.arange(n))))
    shares = spectrum.energy_at(spectrum.energies(spectrum.centred(factor @ factor.T)))
    assert shares["1"] == pytest.approx(0.0103, abs=5e-4)
    assert shares["16"] == pytest.approx(0.1648, abs=5e-4)


def test_rounding_of_the_mean_is_no_difference_between_models():
    gram = spectrum.centred(np.diag([1.0, 2.0, 4.0, 3.0]))
    for dtype, least in (("float32", 1e-21), ("float64", 1e-40)):
        same, other = gram * least / 10, gram * least * 10
        assert not spectrum.unless_equal(same, 1.0, dtype).any()
        np.testing.assert_array_equal(spectrum.unless_equal(other, 1.0, dtype), other)
    assert np.isnan(spectrum.unless_equal(gram * np.nan, 1.0, "float32")).all()  # products that failed
