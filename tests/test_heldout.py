"""Held-out errors from the Gram matrix against decomposing the models themselves again without the held-out ones."""

import time

import numpy as np
import pytest

from jaxsub import heldout, spectrum
from jaxsub.nulls import _draw

NUM_MODELS, NUM_FEATURES = 40, 120
KS = [*range(33), 37, 38, 39, 60]


def gram_of(rows):
    return rows @ rows.T


def centred_gram(rows):
    return gram_of(rows - rows.mean(0))


def directions(others):
    """Principal directions of the rows, those above rounding of the rows themselves."""
    _, values, vt = np.linalg.svd(others - others.mean(0), full_matrices=False)
    return vt[values > 1e-13 * len(others) * max(np.abs(others).max(), values[0])]


def left_out(rows, held_sets, ks):
    """Oracle: error of each held set about mean and components of the other rows, over that about the mean."""
    error, baseline = np.zeros(len(ks)), 0.0
    for held in held_sets:
        others = np.delete(rows, held, axis=0)
        offset = rows[held] - others.mean(0)
        basis = directions(others)
        baseline += (offset**2).sum()
        error += [((offset - offset @ basis[:k].T @ basis[:k]) ** 2).sum() for k in ks]
    return error / baseline


def stacks():
    rng = np.random.default_rng(0)
    n, d = NUM_MODELS, NUM_FEATURES

    def planted(rank, noise):
        return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) + noise * rng.standard_normal((n, d))

    def with_values(values):
        left, right = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (n, d))
        return (left * values) @ right.T

    def with_giants(rows, **sizes):
        for index, size in sizes.items():
            rows[int(index[1:])] *= size
        return rows

    return {
        "noise": rng.standard_normal((n, d)),
        "planted": planted(5, 0.3),
        "low rank": planted(7, 0.0),
        "nearly low rank": planted(7, 1e-6),
        "clustered": with_values(np.repeat([10.0, 5.0, 1.0, 0.1], n // 4)),
        "graded values": with_values(10.0 ** -np.linspace(0, 9, n)),
        "graded features": rng.standard_normal((n, d)) * 10.0 ** -np.linspace(0, 12, d),
        "copies": np.repeat(rng.standard_normal((10, d)), 4, axis=0),
        "near copies": np.repeat(rng.standard_normal((20, d)), 2, axis=0) + 1e-5 * rng.standard_normal((n, d)),
        "pairs of opposites": np.kron([[1.0], [-1.0]], planted(5, 0.1)[: n // 2]),
        "axes": np.eye(n, d),
        "half zero": np.vstack([np.zeros((n // 2, d)), rng.standard_normal((n // 2, d))]),
        "one other": np.vstack([np.zeros((n - 1, d)), np.ones((1, d))]),
        "one giant": with_giants(rng.standard_normal((n, d)), _3=1e6),
        "planted, one giant": with_giants(planted(6, 0.1), _3=1e6),
        "planted, giants of two sizes": with_giants(planted(6, 0.1), _3=1e6, _7=1e3),
        "far mean": planted(4, 0.2) + 1e4,
        "fewer features": rng.standard_normal((n, 6)),
        "tiny": 1e-150 * planted(4, 0.2),
        "huge": 1e150 * planted(4, 0.2),
        "two": rng.standard_normal((2, d)),
        "three": rng.standard_normal((3, d)),
        "four": rng.standard_normal((4, d)),
    }


STACKS = stacks()


@pytest.mark.parametrize("name", STACKS)
def test_leave_one_out_equals_decomposing_without_each_model(name):
    rows = STACKS[name]
    scaled = rows / np.abs(rows).max()  # the oracle's squares must not under- or overflow
    expected = left_out(scaled, range(len(rows)), KS)
    got = heldout.leave_one_out(centred_gram(rows), KS)
    assert np.abs(got - expected).max() < 1e-6


@pytest.mark.parametrize("name", STACKS)
def test_the_quick_way_of_draws_errs_by_a_millionth(name):
    gram = centred_gram(STACKS[name])
    for ks in ([1, 2, 4], [32, 0, 8, 16, 60], KS):
        got = heldout.leave_one_out_of_draw(gram, ks)
        assert np.abs(got - heldout.leave_one_out(gram, ks)).max(initial=0) < 1e-6


@pytest.mark.parametrize("num_models, num_features", [(12, 100), (100, 120), (100, 10**6), (300, 4096)])
def test_draws_of_nulls_take_the_quick_way(num_models, num_features, monkeypatch):
    rng, ks = np.random.default_rng(5), [1, 2, 4, 8, 16, 32]
    grams = [
        _draw.unit_gram(rng, num_models, num_features) * np.outer(s, s) for s in rng.lognormal(0, 1, (3, num_models))
    ]
    exact = [heldout.leave_one_out(spectrum.centred(g), ks) for g in grams]
    monkeypatch.setattr(heldout, "leave_one_out", lambda *_, **__: pytest.fail("the exact way"))
    for gram, wanted in zip(grams, exact, strict=True):
        found = heldout.leave_one_out_of_draw(spectrum.centred(gram), [k for k in ks if k < num_models - 2])
        np.testing.assert_allclose(found, wanted[: len(found)], rtol=0, atol=1e-6)


def test_the_quick_way_takes_leverages():
    rng = np.random.default_rng(6)
    groups = [list(range(9)), list(range(9, 30)), [30, 31, 32]]
    residual, alpha = heldout.within_groups(gram_of(rng.standard_normal((33, 400))), groups)
    exact = heldout.leave_one_out(residual, [1, 4, 8], leverage=alpha)
    np.testing.assert_allclose(
        heldout.leave_one_out_of_draw(residual, [1, 4, 8], leverage=alpha), exact, rtol=0, atol=1e-6
    )
    plain = heldout.leave_one_out_of_draw(residual, [1, 4, 8])
    assert np.abs(plain - exact).max() > 1e-3


def test_leave_one_out_needs_the_rank_one_solution():
    """Projecting on components that saw the model, the shortcut one might take, is far outside the tolerance."""
    rows = STACKS["noise"]
    y = rows - rows.mean(0)
    basis = directions(rows)[:8]
    in_sample = 1.0 - ((y @ basis.T) ** 2).sum() / (y**2).sum()
    assert heldout.leave_one_out(centred_gram(rows), [8])[0] - in_sample > 0.3


def test_leave_one_out_takes_a_decomposition_and_ks_in_any_order():
    gram = centred_gram(STACKS["planted"])
    expected = heldout.leave_one_out(gram, range(17))
    got = heldout.leave_one_out(gram, [16, 2, 0, 2], eigen=heldout.decompose(gram))
    np.testing.assert_allclose(got, expected[[16, 2, 0, 2]], rtol=0, atol=1e-12)
    assert got[2] == 1.0
    assert len(heldout.leave_one_out(gram, [])) == 0


@pytest.mark.parametrize("size", [0, 1, 2, 3, 10])
def test_equal_models_give_ones(size):
    assert heldout.leave_one_out(np.zeros((size, size)), [0, 1, 2, 9]).tolist() == [1.0] * 4


def test_many_sole_contributors_are_decomposed_directly():
    """Twelve models, each alone in its direction, among many equal ones: the others' variance there is rounding."""
    rng = np.random.default_rng(4)
    rows = np.vstack([np.zeros((20, 40)), rng.standard_normal((12, 40))])
    ks = [8, 10, 11, 12, 30]
    got = heldout.leave_one_out(centred_gram(rows), ks)
    assert np.abs(got - left_out(rows, range(32), ks)).max() < 1e-6


@pytest.mark.slow
def test_leave_one_out_of_500_models_takes_under_a_second():
    rng = np.random.default_rng(0)
    gram = centred_gram(
        rng.standard_normal((500, 8)) @ rng.standard_normal((8, 2000)) + rng.standard_normal((500, 2000))
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        heldout.leave_one_out(gram, range(33))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


GROUPS = {
    "three": [[0, 4, 9, 20], [1, 2, 3, 5, 6, 7, 8], [30, 31]],
    "with a single": [list(range(20)), [25], list(range(30, 40))],
    "one": [list(range(40))],
}


@pytest.mark.parametrize("stack", ["noise", "planted", "copies", "low rank"])
@pytest.mark.parametrize("groups", GROUPS)
def test_within_groups_recomputes_the_group_mean(stack, groups):
    rows, groups = STACKS[stack], GROUPS[groups]
    used = [np.array(group) for group in groups if len(group) > 1]
    ks = [0, 1, 2, 4, 8, 16]
    error, baseline = np.zeros(len(ks)), 0.0
    for held_group in used:
        for held in held_group:
            kept = [group[group != held] for group in used]
            residuals = np.vstack([rows[group] - rows[group].mean(0) for group in kept])
            own = held_group[held_group != held]
            offset = rows[held] - rows[own].mean(0)
            _, values, basis = np.linalg.svd(residuals, full_matrices=False)
            basis = basis[values > 1e-10 * np.abs(rows).max()]
            baseline += offset @ offset
            error += [offset @ offset - ((basis[:k] @ offset) ** 2).sum() for k in ks]
    residual, leverage = heldout.within_groups(gram_of(rows), groups)
    got = heldout.leave_one_out(residual, ks, leverage=leverage)
    np.testing.assert_allclose(got, error / baseline, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.trace(residual), sum(((rows[g] - rows[g].mean(0)) ** 2).sum() for g in used))


def test_weights_of_few_values_whose_spectra_have_exact_ties():
    rng, checked = np.random.default_rng(0), 0
    while checked < 200:
        rows = np.sign(rng.standard_normal((8, 5)))
        if np.linalg.matrix_rank(rows - rows.mean(0)) == 5:  # all six components: no tie is cut in two
            got = heldout.leave_one_out(centred_gram(rows), [6])
            np.testing.assert_allclose(got, left_out(rows, range(8), [6]), rtol=0, atol=1e-6)
            checked += 1


@pytest.mark.parametrize("seed", [0, 8, 14, 75])
def test_within_groups_the_direction_that_goes_with_a_model_explains_nothing(seed):
    """16 components of 18 models in two groups: 15 are left without any one, however unequal the models are."""
    rng = np.random.default_rng(seed)
    rows, groups = rng.standard_t(1.2, size=(18, 500)), [list(range(4)), list(range(4, 18))]
    residual, leverage = heldout.within_groups(gram_of(rows), groups)
    got = heldout.leave_one_out(residual, [15, 16], leverage=leverage)
    assert got[1] == pytest.approx(got[0], abs=1e-9) and got[0] > 0.5


def test_within_groups_without_groups_is_empty_and_gives_ones():
    residual, leverage = heldout.within_groups(gram_of(STACKS["noise"]), [[3], []])
    assert residual.shape == (0, 0) and leverage.shape == (0,)
    assert heldout.leave_one_out(residual, [1, 2], leverage=leverage).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("stack", ["noise", "planted", "copies", "low rank", "one other", "far mean"])
def test_leave_group_out_equals_decomposing_without_each_group(stack):
    rows, groups = STACKS[stack], GROUPS["with a single"]
    ks = [0, 1, 3, 8, 16, 45]
    got = heldout.leave_group_out(gram_of(rows - rows[7]), groups, ks)  # any common point
    assert np.abs(got - left_out(rows, groups, ks)).max() < 1e-8


def test_leave_group_out_without_others_gives_ones():
    gram = gram_of(STACKS["noise"])
    assert heldout.leave_group_out(gram, [list(range(40))], [1, 4]).tolist() == [1.0, 1.0]
    assert heldout.leave_group_out(gram, [], [1]).tolist() == [1.0]
    assert heldout.leave_group_out(0 * gram, [[1, 2]], [1]).tolist() == [1.0]


@pytest.mark.parametrize("stack", ["noise", "planted", "clustered"])
def test_split_half_equals_principal_angles_of_the_halves(stack):
    rows, ks = STACKS[stack][:31], [1, 4, 13, 14, 15]
    got = heldout.split_half(gram_of(rows), ks, NUM_FEATURES, num_splits=6, rng=np.random.default_rng(5))
    assert list(got) == [1, 4, 13, 14]  # a half of 15 has 14 components
    rng = np.random.default_rng(5)
    overlaps = []
    for _ in range(6):
        order = rng.permutation(31)
        a, b = directions(rows[order[:15]]), directions(rows[order[15:]])
        overlaps.append([np.mean(np.linalg.svd(a[:k] @ b[:k].T, compute_uv=False) ** 2) for k in got])
    for k, column in zip(got, np.transpose(overlaps), strict=True):
        assert got[k]["overlap"] == pytest.approx(column.mean(), abs=1e-8)
        assert got[k]["low"] == pytest.approx(np.quantile(column, 0.05), abs=1e-8)
        assert got[k]["high"] == pytest.approx(np.quantile(column, 0.95), abs=1e-8)
        assert got[k]["chance"] == k / NUM_FEATURES


def test_split_half_separates_planted_directions_from_noise():
    rng = np.random.default_rng(6)
    noise = rng.standard_normal((60, 2000))
    planted = noise + 40 * rng.standard_normal((60, 3)) @ np.linalg.qr(rng.standard_normal((2000, 3)))[0].T
    chance = heldout.split_half(gram_of(noise), [3], 2000, rng=rng)[3]
    found = heldout.split_half(gram_of(planted), [3], 2000, rng=rng)[3]
    assert chance["overlap"] < 10 * chance["chance"] < 0.02
    assert found["low"] > 0.7
    assert heldout.split_half(np.zeros((9, 9)), [2], 5, rng=rng)[2]["overlap"] == 0.0
    assert heldout.split_half(np.ones((3, 3)), [1], 5, rng=rng) == {}


def test_centre_removes_any_common_point():
    rows = STACKS["planted"]
    np.testing.assert_allclose(spectrum.centred(gram_of(rows + 3.0)), centred_gram(rows), atol=1e-8)
