"""Lineages on worlds of known descent, and on worlds made to fool the finder."""

import numpy as np
import pytest

from jaxsub import lineage


def cosine(x):
    return lineage.cosines(x @ x.T)


def family(rng, size, d, share):
    """Models that keep `share` of their energy from one start."""
    start = rng.standard_normal(d)
    return np.sqrt(share) * start + np.sqrt(1 - share) * rng.standard_normal((size, d))


@pytest.mark.parametrize("share", [0.25, 0.6, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_families_hidden_among_strangers_are_found(share, seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.standard_normal((30, 4000)), family(rng, 12, 4000, share), family(rng, 5, 4000, share)])
    order = rng.permutation(len(x))
    found = lineage.groups(cosine(x[order]), 4000)
    truth = [sorted(np.flatnonzero((order >= 30) & (order < 42))), sorted(np.flatnonzero(order >= 42))]
    assert found == truth


@pytest.mark.parametrize("seed", range(5))
def test_unrelated_models_have_no_lineage(seed):
    x = np.random.default_rng(seed).standard_normal((80, 500))
    assert lineage.groups(cosine(x), 500) == []


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_a_shared_subspace_is_no_lineage(seed, k):
    """Coefficients of both signs in a common subspace: single linkage would chain them all into one family."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((100, k)) @ np.linalg.qr(rng.standard_normal((3000, k)))[0].T * np.sqrt(3000 / k) * 2
    x = x + rng.standard_normal(x.shape)
    c = cosine(x)
    assert lineage.groups(c, 3000) == []
    assert (c > 0.5).sum() > 3 * len(c)  # pairs that look related abound


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_one_start_for_all_is_one_lineage(share):
    x = family(np.random.default_rng(0), 20, 1000, share)
    c = cosine(x)
    # Of .5 the smallest cosine says it, of .2 the linkage.
    assert (c.min() > lineage.chance_threshold(1000)) == (share == 0.5)
    assert lineage.groups(c, 1000) == [list(range(20))]


def test_one_direction_with_coefficients_of_both_signs_is_no_lineage_and_two_opposite_families_are():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 1)) * rng.standard_normal(500) + 1e-3 * rng.standard_normal((40, 500))
    norms = np.linalg.norm(x, axis=1)
    assert sorted(map(len, lineage.groups(cosine(x), 500))) != []  # cosines alone cannot tell
    assert lineage.groups(cosine(x), 500, norms=norms) == []
    x = np.repeat([[1.0], [-1.0]], 20, axis=0) * rng.standard_normal(500) + 0.3 * rng.standard_normal((40, 500))
    found = lineage.groups(cosine(x), 500, norms=np.linalg.norm(x, axis=1))
    assert found == [list(range(20)), list(range(20, 40))]


@pytest.mark.parametrize("offset", [1.0, 2.0, 30.0])
def test_entries_that_have_a_mean_are_no_kinship(offset):
    rng = np.random.default_rng(0)
    x = offset + rng.standard_normal((20, 2000)) * rng.uniform(0.5, 2, (20, 1))
    x[7] = x[3] + 0.1 * rng.standard_normal(2000)
    about, plain = lineage.related([(list(range(20)), x @ x.T, x.sum(1), 2000)], 20)
    np.testing.assert_allclose(about, np.corrcoef(x), atol=1e-9)
    assert lineage.groups(about, 2000) == [[3, 7]]
    assert lineage.groups(plain, 2000) != [[3, 7]]


def test_rows_of_one_number_tell_nothing_unless_there_is_nothing_else():
    rng = np.random.default_rng(0)
    x, ones = rng.standard_normal((4, 1000)), np.ones((4, 5000)) * [[1.0], [1.0], [2.0], [-1.0]]
    ones += 1e-9 * rng.standard_normal(ones.shape)
    flat, told = (ones @ ones.T, ones.sum(1), 5000), (x @ x.T, x.sum(1), 1000)
    about, plain = lineage.related([(range(4), *flat), (range(4), *told)], 4)
    np.testing.assert_allclose(about, np.corrcoef(x), atol=1e-9)
    assert plain[0, 1] > 0.8
    about, plain = lineage.related([(range(4), *flat)], 4)
    np.testing.assert_array_equal(about, plain)
    assert plain[0, 3] == pytest.approx(-1)


def test_zero_models_and_pairs_without_common_layers():
    x = np.concatenate([np.zeros((2, 300)), np.random.default_rng(0).standard_normal((6, 300))])
    c = cosine(x)
    assert np.isfinite(c).all() and lineage.groups(c, 300) == []
    combined = lineage.combine([([0, 1], np.eye(2), 10)], 3)
    assert np.isnan(combined[0, 2]) and combined[0, 0] == 1
    assert lineage.groups(combined, 10) == []


def test_combine_weighs_by_features():
    got = lineage.combine([([0, 1], np.full((2, 2), 1.0), 30), ([0, 1], np.zeros((2, 2)), 10)], 2)
    assert got[0, 1] == pytest.approx(0.75)


def test_near_copies_are_listed_closest_first():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 2000))
    x = np.concatenate([a, a[:1] + 0.01 * rng.standard_normal(2000), a[1:2] + 0.05 * rng.standard_normal(2000)])
    assert [p[:2] for p in lineage.near_copies(cosine(x))] == [(0, 3), (1, 4)]


def test_group_energy_against_explicit_means():
    rng = np.random.default_rng(0)
    x = np.concatenate([family(rng, 6, 50, 0.9), family(rng, 4, 50, 0.9), rng.standard_normal((3, 50))])
    y = x - x.mean(0)
    groups = [list(range(6)), [6, 7, 8, 9]]
    want = sum(len(g) * np.square(y[g].mean(0)).sum() for g in groups) / np.square(y).sum()
    assert lineage.group_energy(y @ y.T, groups) == pytest.approx(want)
    assert lineage.group_energy(np.zeros((3, 3)), [[0, 1]]) is None


@pytest.mark.parametrize("draw", ["uniform", "normal", "truncated"])
def test_fresh_initialisations_are_recognised_and_trained_ones_are_not(draw):
    rng = np.random.default_rng(0)
    shape = (128, 64)
    width = 1 / np.sqrt(64)
    if draw == "uniform":
        w = rng.uniform(-width, width, shape)
    elif draw == "normal":
        w = rng.standard_normal(shape) * width * np.sqrt(2)
    else:
        w = np.clip(rng.standard_normal(shape), -9, 9)
        while (np.abs(w) > 2).any():
            w = np.where(np.abs(w) > 2, rng.standard_normal(shape), w)
        w = w / w.std() * width
    assert lineage.looks_untrained((w**2).sum(), (w**4).sum(), shape, w.size)
    moved = w + 0.6 * width * rng.standard_normal((128, 1)) @ rng.standard_normal((1, 64))
    assert not lineage.looks_untrained((moved**2).sum(), (moved**4).sum(), shape, w.size)
    assert not lineage.looks_untrained((w**2).sum(), (w**4).sum(), (64,), 64)


@pytest.mark.parametrize("shape", [(64, 48), (32, 32), (20, 90)])
def test_products_of_the_width_of_an_initialiser_do_not_look_untrained(shape):
    rng = np.random.default_rng(0)

    def looks(w, **more):
        w = w / w.std() / np.sqrt(shape[1])
        values = np.linalg.svd(w, compute_uv=False)
        return lineage.looks_untrained((w**2).sum(), (w**4).sum(), shape, w.size, values if more else None)

    thin = [rng.standard_normal((shape[0], 16)) @ rng.standard_normal((16, shape[1])) for _ in range(200)]
    assert not any(looks(w, values=True) for w in thin)
    assert sum(map(looks, thin)) > 5  # entries alone do not tell
    for draw in (rng.standard_normal, rng.random):
        fresh = [draw(shape) - (draw == rng.random) / 2 for _ in range(200)]
        assert sum(looks(w, values=True) for w in fresh) > 180


def test_picture_order_keeps_lineages_together():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((5, 500)), family(rng, 4, 500, 0.8), family(rng, 3, 500, 0.8)])
    c = cosine(x)
    groups = lineage.groups(c, 500)
    assert sorted(lineage.order(c, groups)[:4]) == groups[0] == [5, 6, 7, 8]
    assert sorted(lineage.order(c, groups)) == list(range(12))
