"""Statistics add over blocks and features, keep float64 digits, and come back from a file as they were."""

import numpy as np
import pytest

from jaxsub import errors
from jaxsub.statistics import ModeEnergies, Statistics
from tests.test_figures import statistics


def halves(x):
    return statistics(x[:, :30]), statistics(x[:, 30:])


def test_sums_over_features_add():
    x = np.random.default_rng(0).standard_normal((9, 80)) + 1
    whole, (a, b) = statistics(x), halves(x)
    a.merge(b)
    for name in ("gram", "cross", "mean_square", "row_sums", "row_fourths", "variance_squares", "deviation_fourths"):
        np.testing.assert_allclose(getattr(a, name), getattr(whole, name), rtol=1e-12)
    with pytest.raises(ValueError):
        a.merge(statistics(x[:5]))


@pytest.mark.parametrize("exponent", [-300, 0, 300])
def test_scales_are_powers_of_two_and_exact(exponent):
    x = np.random.default_rng(0).standard_normal((6, 40))
    plain, scaled = (
        statistics(x),
        Statistics.empty("w", (40,), "dense", tuple(f"m{n}" for n in range(6)), "float64", "float64"),
    )
    scaled.add(plain, exponent)
    assert (scaled.gram == plain.gram).all() and scaled.exponent == exponent
    scaled.add(plain, exponent + 3)  # the same numbers, 8 times as large
    np.testing.assert_allclose(np.ldexp(scaled.gram, 6), plain.gram * 65, rtol=1e-14)


def test_the_factor_keeps_what_a_gram_matrix_loses():
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((12, 12)))[0], np.linalg.qr(rng.standard_normal((200, 12)))[0]
    x = (u * np.logspace(0, -11, 12)) @ v.T
    y = x - x.mean(0)
    want = np.linalg.svd(y, compute_uv=False)[:11]
    stats, (left, right) = statistics(x), halves(x)
    for part, rows in ((stats, y), (left, y[:, :30]), (right, y[:, 30:])):
        part.add_factor(rows, 0)
    left.merge(right)
    for part in (stats, left):
        np.testing.assert_allclose(np.sqrt(part.centred_energies()[:11]), want, rtol=1e-4)
    stats.factor = None
    assert abs(np.sqrt(stats.centred_energies()[9]) / want[9] - 1) > 1


@pytest.mark.parametrize("seed", range(8))  # rounding of the sums takes either sign
def test_zero_rows_and_rows_lost_beside_a_large_one_are_told_apart(seed):
    x = np.random.default_rng(seed).standard_normal((20, 1200)) + 0.7
    x[3] = 0
    plain = statistics(x)
    assert np.flatnonzero(plain.zero()).tolist() == np.flatnonzero(plain.lost()).tolist() == [3]
    assert not plain.norms()[3] and not plain.uncentred()[3].any()
    x[5] *= 1e12
    large = statistics(x)
    assert np.flatnonzero(large.zero()).tolist() == [3] and np.flatnonzero(~large.lost()).tolist() == [5]
    assert np.count_nonzero(large.uncentred()) == 1


def test_a_file_brings_everything_back(tmp_path):
    stats = statistics(np.random.default_rng(0).standard_normal((5, 4, 3)))
    stats.modes = (ModeEnergies(1, 3, np.array([2.0, 1.0]), 4.0, 512, False),)
    stats.digest, stats.roundings, stats.base_norm = "abc", np.full(5, 1e-8), 2.5
    path = tmp_path / "s.safetensors"
    stats.save(path)
    back = Statistics.load(path)
    for name, value in vars(stats).items():
        if name != "modes":
            np.testing.assert_array_equal(getattr(back, name), value)
    assert vars(back.modes[0]) | {"values": None} == vars(stats.modes[0]) | {"values": None}
    np.testing.assert_array_equal(back.modes[0].values, stats.modes[0].values)


def test_a_foreign_file_is_refused(tmp_path):
    from jaxsub.formats import safetensors

    safetensors.write(str(tmp_path / "s.safetensors"), {"gram": np.zeros((2, 2))}, {"jaxsub": "{}"})
    with pytest.raises(errors.InputError, match="statistics"):
        Statistics.load(tmp_path / "s.safetensors")
